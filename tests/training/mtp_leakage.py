"""Multi-token prediction over packed documents: what reaches another document, and what is trained.

Run as a script: `mtp_leakage.py RENDEZVOUS`. Two further heads by Megatron's own code, on MeCo's
layers for hosts without Transformer Engine. Prints, for each document, what became of the further
heads' states of the others when it changed; and whether gradients depend on labels outside the
loss mask, with the mask that MeCo's training step hands to the model and without it. Then, for
heads with experts, how many tokens each head's router counted.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from megatron_meco.training.cpu import enable_cpu_platform

enable_cpu_platform()

import torch  # noqa: E402
from apart import change_documents, documents, other_ids, positions_of, start  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_meco.training.attention import packed_local_layer_spec  # noqa: E402
from megatron_meco.training.megatron_patches import keep_padding_out_of_experts  # noqa: E402

LENGTH, BOUNDS, VOCAB_SIZE, HEADS = 48, [0, 13, 14, 30, 48], 100, 2


def make_model(**changes: Any) -> GPTModel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        apply_rope_fusion=False,
        use_cpu_initialization=True,
        mtp_num_layers=HEADS,
        mtp_loss_scaling_factor=0.5,
        **changes,
    )
    spec = packed_local_layer_spec(SimpleNamespace(transformer=config))
    return GPTModel(
        config,
        spec,
        VOCAB_SIZE,
        LENGTH,
        position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False),
    )


def count_tokens() -> list[int]:
    """Of the model's layers and its heads, with one expert for each token; 8 tokens are padding."""
    keep_padding_out_of_experts()
    model = make_model(
        num_moe_experts=4,
        moe_ffn_hidden_size=8,
        moe_router_topk=1,
        moe_router_load_balancing_type="none",
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
    )
    padding = torch.zeros(1, LENGTH, dtype=torch.bool)
    padding[0, LENGTH - 8 :] = True
    tokens = torch.randint(0, VOCAB_SIZE, (1, LENGTH))
    model(
        tokens,
        positions_of(BOUNDS),
        None,
        labels=tokens,
        packed_seq_params=documents(BOUNDS),
        padding_mask=padding,
    )
    return [
        int(module.local_tokens_per_expert.sum())
        for module in model.modules()
        if getattr(module, "enable_expert_bias", False)
    ]


def main() -> None:
    start(sys.argv[1])
    model = make_model()
    packed, positions = documents(BOUNDS), positions_of(BOUNDS)
    tokens = torch.randint(0, VOCAB_SIZE, (1, LENGTH))
    labels = tokens.roll(-1, 1)
    # The first tokens of each document are a prefix, and none is predicted across a border.
    mask = torch.ones(1, LENGTH)
    for begin, end in pairwise(BOUNDS):
        mask[0, begin : begin + 3] = 0
        mask[0, end - 1] = 0
    states: list[torch.Tensor] = []
    model.mtp.register_forward_hook(lambda *hooked: states.append(hooked[-1].detach().clone()))

    def heads(ids: torch.Tensor) -> torch.Tensor:
        states.clear()
        with torch.no_grad():
            model(
                ids[None], positions, None, labels=labels, loss_mask=mask, packed_seq_params=packed
            )
        # The states of the model itself come first.
        return states[0].view(1 + HEADS, LENGTH, -1)

    rows = change_documents(heads, tokens[0], BOUNDS, other_ids(VOCAB_SIZE))

    def gradients(targets: torch.Tensor, given: torch.Tensor | None) -> list[torch.Tensor]:
        model.zero_grad()
        losses = model(
            tokens, positions, None, labels=targets, loss_mask=given, packed_seq_params=packed
        )
        (losses * mask).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    other = torch.where(mask == 0, (labels + 11) % VOCAB_SIZE, labels)
    report = {"documents": rows}
    for name, given in (("with_mask", mask), ("without_mask", None)):
        pairs = zip(gradients(labels, given), gradients(other, given), strict=True)
        report[f"same_gradients_{name}"] = all(torch.equal(a, b) for a, b in pairs)
    report["counted"] = count_tokens()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
