"""Patches of Megatron: what they change, and that another Megatron is not patched blindly."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
from megatron.core.datasets import utils
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_meco.errors import MeCoError
from megatron_meco.training import megatron_patches
from megatron_meco.training.megatron_patches import SaveInterval


class TestSaveInterval:
    def test_it_is_due_at_multiples_and_at_the_switch(self) -> None:
        interval = SaveInterval(5, also=[8])
        assert [i for i in range(1, 16) if i % interval == 0] == [5, 8, 10, 15]
        assert interval == 5
        both = SaveInterval(5, also=[3, 8])
        assert [i for i in range(1, 16) if i % both == 0] == [3, 5, 8, 10, 15]

    def test_it_is_pickled_as_an_int(self) -> None:
        again = pickle.loads(pickle.dumps(SaveInterval(5, also=[8])))
        assert type(again) is int
        assert again == 5


class TestAnotherMegatron:
    """Names of private or replaced things change between versions."""

    def test_an_optimizer_with_other_methods_stays_as_it_is(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        setter = "_set_main_param_and_optimizer_states"
        patch = megatron_patches.let_distributed_optimizer_resume.__wrapped__

        def other(self: object, tensors: object) -> None: ...

        for replacement in (other, None):
            monkeypatch.setattr(DistributedOptimizer, setter, replacement)
            before = dict(vars(DistributedOptimizer))
            patch()
            assert dict(vars(DistributedOptimizer)) == before

    def test_the_installed_optimizer_has_the_methods_that_are_replaced(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = ("state_dict", "load_state_dict", "_set_main_param_and_optimizer_states")
        before = {name: getattr(DistributedOptimizer, name) for name in names}
        for name in names:
            monkeypatch.setattr(DistributedOptimizer, name, before[name])  # undone at the end
        megatron_patches.let_distributed_optimizer_resume.__wrapped__()
        assert all(getattr(DistributedOptimizer, name) is not before[name] for name in names)

    def test_another_compiler_of_helpers_is_still_called(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def compile_helpers(folder: str) -> None: ...

        monkeypatch.setattr(utils, "compile_helpers", compile_helpers)
        megatron_patches.skip_helper_compilation()
        assert utils.compile_helpers is compile_helpers

    @pytest.mark.parametrize("replacement", [None, lambda data_iterator, args: None])
    def test_skipped_steps_are_refused(
        self, replacement: object, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other tensor-parallel ranks would wait forever."""
        from megatron.training import training

        monkeypatch.setattr(training, "dummy_train_step", replacement)
        with pytest.raises(MeCoError, match=r"megatron-core: has no .*dummy_train_step.*0\.19\.2"):
            megatron_patches.skip_steps_without_reading_batches()
        assert training.dummy_train_step is replacement

    def test_experts_of_another_router_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Padding would count."""
        from megatron.core.transformer.moe.router import TopKRouter

        def other(self: object, routing_map: object) -> None: ...

        monkeypatch.setattr(TopKRouter, "_apply_expert_bias", other)
        with pytest.raises(MeCoError, match=r"megatron-core: has no TopKRouter._apply_expert_bias"):
            megatron_patches.keep_padding_out_of_experts.__wrapped__()
        assert TopKRouter._apply_expert_bias is other

    def test_an_unknown_scale_is_not_taken_for_1(self) -> None:
        assert megatron_patches.rotary_scale(SimpleNamespace(_yarn_concentration_factor=1.5)) == 1.5
        with pytest.raises(MeCoError, match=r"megatron-core: has no .*_yarn_concentration_factor"):
            megatron_patches.rotary_scale(SimpleNamespace())

    def test_a_function_is_called_for_its_layers_where_megatron_does_not(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from megatron.core.transformer import transformer_block
        from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
        from megatron.training import argument_utils

        stock = transformer_block._get_block_submodules
        patch = megatron_patches.let_functions_be_specs.__wrapped__
        patch()
        assert transformer_block._get_block_submodules is stock
        monkeypatch.setattr(transformer_block, "_get_block_submodules", stock)
        # Megatron 0.18 has none.
        monkeypatch.delattr(argument_utils, "gpt_config_from_args", raising=False)
        patch()
        made = TransformerBlockSubmodules(layer_specs=[])

        def make(config: object, vp_stage: int | None = None) -> TransformerBlockSubmodules:
            assert (config.transformer, vp_stage) == ("config", 1)
            return made

        assert transformer_block._get_block_submodules("config", make, 1) is made
        assert transformer_block._get_block_submodules("config", made) is made
        monkeypatch.setattr(transformer_block, "_get_block_submodules", lambda spec: spec)
        with pytest.raises(MeCoError, match="has no transformer_block"):
            patch()


class TestSavesInTheBackground:
    """On a CPU Megatron's worker process would get the tensors that training changes."""

    @pytest.fixture
    def writer(self, monkeypatch: pytest.MonkeyPatch) -> type:
        from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

        writer, caller = filesystem_async.FileSystemWriterAsync, async_utils.PersistentAsyncCaller
        # Undone at the end.
        name = "get_save_function_and_args"
        monkeypatch.setattr(writer, name, getattr(writer, name))
        monkeypatch.setattr(caller, "async_loop", staticmethod(caller.async_loop))
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
        return writer

    def test_the_worker_gets_copies(self, writer: type) -> None:
        weight = torch.arange(4.0)
        found = object.__new__(writer)
        found.use_msc, found.results_queue = False, "results"
        found.write_buckets = [("ckpt/a", "a", ([("item", b"bytes")], [("item", weight)]))]
        megatron_patches.save_from_the_cpu_in_the_background.__wrapped__(print)
        save, stage, (rank, buckets, results) = found.get_save_function_and_args()
        assert callable(save)
        assert (stage, rank, results) == (None, 3, "results")
        weight += 1
        [(path, name, (data, [(item, copy)]))] = buckets
        assert (path, name, data, item) == ("ckpt/a", "a", [("item", b"bytes")], "item")
        assert copy.tolist() == [0, 1, 2, 3]
        found.write_buckets = []
        assert found.get_save_function_and_args() == (None, None, [])

    def test_a_worker_of_another_kind_is_refused(
        self, writer: type, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writer, "get_save_function_and_args", lambda self, plan: None)
        with pytest.raises(MeCoError, match=r"megatron-core: has no PersistentAsyncCaller"):
            megatron_patches.save_from_the_cpu_in_the_background.__wrapped__(print)
