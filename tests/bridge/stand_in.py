"""A stand-in for Megatron-Bridge, which does not install without a GPU stack.

Written from the signatures of Megatron-Bridge 0.6.0, not a copy of it: the classes and functions
that `megatron_meco.bridge` imports, with the fields, keys and calls that Bridge's loader and
forward step have. `install()` puts it where Bridge would be. What Bridge does around these is not
here, and is not tested.
"""

from __future__ import annotations

import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(kw_only=True)
class DataloaderConfig:
    dataloader_type: str | None = None
    num_workers: int = 2
    data_sharding: bool = True
    pin_memory: bool = True
    drop_last: bool = True
    persistent_workers: bool = True
    trust_remote_code: bool | None = None

    def finalize(self) -> None:
        if self.num_workers == 0:
            self.persistent_workers = False


@dataclass(frozen=True)
class DatasetBuildContext:
    train_samples: int
    valid_samples: int
    test_samples: int
    tokenizer: Any | None = None
    pg_collection: Any | None = None


@dataclass
class DatasetProvider(DataloaderConfig, ABC):
    @abstractmethod
    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, Any]:
        raise NotImplementedError


class Callback:
    def on_train_step_start(self, context: Any) -> None: ...


@dataclass
class GlobalState:
    cfg: Any
    train_state: Any = None


def loader(dataset: Any, micro_batch_size: int, consumed_samples: int = 0) -> Iterator[Any]:
    """Bridge's `single` loader on one rank: the dataset's own collate function."""
    collate = dataset.collate_fn if hasattr(dataset, "collate_fn") else None
    for begin in range(consumed_samples, len(dataset) - micro_batch_size + 1, micro_batch_size):
        yield collate([dataset[i] for i in range(begin, begin + micro_batch_size)])


DEVICE_KEYS = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
HOST_KEYS = ("max_seqlen_q", "max_seqlen_kv")


def middle_stage_needs_batch(dataset_config: Any) -> bool:
    """Whether a pipeline stage in the middle gets document borders."""
    return bool(getattr(dataset_config, "enable_in_batch_packing", False))


def forward_step(
    state: GlobalState, data_iterator: Any, model: Any, return_schedule_plan: bool = False
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """The keys that Bridge takes from a batch, and the arguments that it gives a model.

    Bridge copies them to the device first; here all is on the host.
    """
    batch = next(data_iterator)
    taken = {key: batch[key] for key in DEVICE_KEYS if batch.get(key) is not None}
    taken |= {key: batch[key] for key in HOST_KEYS if batch.get(key) is not None}
    packed = PackedSeqParams(
        qkv_format="thd", **{key: value.squeeze() for key, value in taken.items()}
    )
    # A wrapped model is asked for its attributes.
    assert model.vp_stage is None
    # Without the loss mask: that is what 0.6.0 does.
    output = model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
        packed_seq_params=packed,
    )
    return output, partial(masked_next_token_loss, batch["loss_mask"])


def masked_next_token_loss(loss_mask: torch.Tensor, output: torch.Tensor) -> Any:
    total = (output.view(-1).float() * loss_mask.view(-1)).sum()
    return total, loss_mask.sum().int(), {"lm loss": torch.stack([total, loss_mask.sum()])}


def install() -> None:
    """Put the stand-in where Megatron-Bridge would be, unless it is there."""
    members = {
        "config": {
            "DatasetBuildContext": DatasetBuildContext,
            "DatasetProvider": DatasetProvider,
        },
        "callbacks": {"Callback": Callback},
        "gpt_step": {"forward_step": forward_step},
        "state": {"GlobalState": GlobalState},
    }
    for name in ("megatron.bridge", "megatron.bridge.training"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    for name, content in members.items():
        module = types.ModuleType(f"megatron.bridge.training.{name}")
        vars(module).update(content)
        sys.modules[module.__name__] = module


@dataclass
class Recorder:
    """A model that remembers what it was called with; its loss of each token is 1."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    vp_stage: int | None = None

    def __call__(self, **arguments: Any) -> torch.Tensor:
        self.calls.append(arguments)
        return torch.ones(arguments["labels"].shape)
