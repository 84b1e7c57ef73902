"""The CPU platform. It changes torch for good, so what it does is checked in another process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from runs import ROOT, command, launch, write_gpu_libraries

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron_meco.training import cpu  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a host without CUDA")


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_platform_answers_for_one_cpu_device() -> None:
    out = run_python(
        """
        import os
        import warnings
        import torch
        from megatron_meco.training import cpu

        assert cpu.should_use_cpu()
        cpu.enable_cpu_platform()
        real_is_available = torch.cuda.is_available
        cpu.enable_cpu_platform()
        assert torch.cuda.is_available is real_is_available
        assert cpu.should_use_cpu() and torch.cuda.is_available()
        assert torch.cuda.device_count() == 1

        # Every way to say "the GPU" is the CPU.
        index = torch.cuda.current_device()
        for device in ("cuda", "cuda:0", index, torch.device("cuda"), torch.device("cuda", index)):
            assert torch.zeros(2, device=device).device.type == "cpu"
            assert torch.ones(2).to(device).device.type == "cpu"
            assert torch.ones(2).to(device=device, dtype=torch.bfloat16).device.type == "cpu"
        assert torch.device(f"cuda:{index}").index == 0
        assert torch.empty(2, pin_memory=True).sum().device.type == "cpu"
        x = torch.ones(2)
        assert x.cuda(non_blocking=True) is x and x.pin_memory() is x
        module = torch.nn.Linear(2, 2)
        assert module.cuda(index) is module
        assert module.to("cuda").weight.device.type == "cpu"
        assert x.type() == "torch.cuda.FloatTensor"
        assert x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert x.type("torch.cuda.HalfTensor").dtype is torch.float16
        assert x.type(torch.int32).dtype is torch.int32

        # Streams, events and statistics.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream), torch.cuda.device(index):
            begin.record()
            x.record_stream(stream)
            end.record()
        torch.cuda.synchronize()
        assert begin.elapsed_time(end) > 0
        assert torch.cuda.memory_allocated() == 0
        assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] == 0

        # Random states: the CUDA generator is the default one.
        torch.cuda.manual_seed(5)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3, device="cuda"), first)

        # A data loader with workers that asks for pinned memory works and does not warn.
        from torch.utils.data import DataLoader
        with warnings.catch_warnings(record=True) as caught:
            loader = DataLoader(torch.arange(6), batch_size=2, num_workers=2, pin_memory=True)
            assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5]]
        assert not [w for w in caught if "pin_memory" in str(w.message)], caught

        # Megatron: its own random states, no compilation of helpers or of functions.
        from megatron.core.datasets.utils import compile_helpers
        from megatron.core.tensor_parallel import get_cuda_rng_tracker
        compile_helpers()
        tracker = get_cuda_rng_tracker()
        tracker.add("ours", 1)
        outside = torch.get_rng_state()
        with tracker.fork("ours"):
            a = torch.rand(3)
        with tracker.fork("ours"):
            b = torch.rand(3)
        assert not torch.equal(a, b)
        assert torch.equal(torch.get_rng_state(), outside)
        from megatron.core.fusions.fused_bias_swiglu import swiglu
        assert not hasattr(swiglu, "_torchdynamo_orig_callable")
        assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
        print("fine")
        """
    )
    assert out.endswith("fine\n")


def test_enabling_after_megatron_core_was_imported() -> None:
    out = run_python(
        """
        import torch
        import megatron.core
        from megatron.core.tensor_parallel import get_cuda_rng_tracker
        from megatron_meco.training import cpu

        cpu.enable_cpu_platform()
        tracker = get_cuda_rng_tracker()
        tracker.add("ours", 1)
        with tracker.fork("ours"):
            first = torch.rand(3, device="cuda")
        torch.manual_seed(1)
        assert torch.equal(first, torch.rand(3))
        from megatron.core.fusions.fused_bias_swiglu import swiglu
        assert swiglu(torch.ones(1, 4)).shape == (1, 2)
        print("fine")
        """
    )
    assert out.endswith("fine\n")


def test_distributed_optimizer_resumes_with_the_step_it_was_saved_at() -> None:
    out = run_python(
        """
        import tempfile
        import torch
        from megatron_meco.training import cpu

        cpu.enable_cpu_platform()
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer import TransformerConfig

        store = torch.distributed.FileStore(tempfile.mktemp(), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)

        def make_optimizer():
            model = DistributedDataParallel(
                config,
                DistributedDataParallelConfig(use_distributed_optimizer=True),
                torch.nn.Linear(4, 4),
            )
            settings = OptimizerConfig(lr=0.1, use_distributed_optimizer=True, bf16=False)
            chained = get_megatron_optimizer(settings, [model])
            return model, chained.chained_optimizers[0]

        model, trained = make_optimizer()
        for _ in range(3):
            model.zero_grad_buffer()
            model(torch.ones(2, 4)).sum().backward()
            model.finish_grad_sync()
            trained.step()
        _, fresh = make_optimizer()
        assert {float(v["step"]) for v in fresh.optimizer.state.values()} == set()
        fresh.load_state_dict(fresh.state_dict())
        fresh.load_state_dict(trained.state_dict())
        # What one checkpoint format holds for a parameter, with a stale count as in another.
        for stale in ({}, {"step": torch.tensor(0.0)}):
            for parameter in fresh.model_param_group_index_map:
                values = {"param": torch.zeros(1), "exp_avg": torch.ones(1), **stale}
                values["exp_avg_sq"] = torch.ones(1)
                with torch.no_grad():
                    fresh._set_main_param_and_optimizer_states(parameter, values)
        steps = [values["step"] for values in fresh.optimizer.state.values()]
        assert len(steps) == 2
        assert [float(step) for step in steps] == [3.0, 3.0]
        assert steps[0].data_ptr() != steps[1].data_ptr()
        assert all(v["exp_avg"].eq(1).all() for v in fresh.optimizer.state.values())
        print("fine")
        """
    )
    assert out.endswith("fine\n")


def test_gpu_libraries_are_hidden_unless_they_are_in_use(tmp_path: Path) -> None:
    out = run_python(
        f"""
        import importlib.util
        import sys
        sys.path.insert(0, {str(write_gpu_libraries(tmp_path))!r})
        import apex
        from megatron_meco.training import kernels

        assert importlib.util.find_spec("transformer_engine") is not None
        kernels.hide_gpu_libraries()
        assert importlib.util.find_spec("transformer_engine") is None
        try:
            import transformer_engine.pytorch
        except ImportError:
            print("hidden")
        assert sys.modules["apex"] is apex
        """
    )
    assert out == "hidden\n"


@pytest.mark.distributed
def test_a_run_uses_no_gpu_library(corpus: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    """As on the login node of a cluster, with the environment of its GPU nodes."""
    flags = "--meco --meco-cooldown-fraction 0.5 --train-iters 2 --eval-iters 0 --save-interval 2"
    result = launch(
        command(corpus, tokenizer_folder, *flags.split(), "--save", f"{tmp_path}/checkpoints"),
        ranks=1,
        PYTHONPATH=os.pathsep.join([str(write_gpu_libraries(tmp_path / "site")), str(ROOT)]),
    )
    assert result.status == 0, result.log[-3000:]
    assert "optimizer: torch AdamW" in result.log
    assert sorted(result.losses) == [1, 2]


def megatron_args(*flags: str) -> argparse.Namespace:
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    parser.set_defaults(**cpu.CPU_DEFAULTS)
    return parser.parse_args(list(flags))


def test_defaults_exist_in_megatron_and_are_possible() -> None:
    args = megatron_args()
    for dest, value in cpu.CPU_DEFAULTS.items():
        actual = getattr(args, dest)
        assert getattr(actual, "name", actual) == value
    assert cpu.impossible_flags(args) == []


def test_every_gpu_only_flag_exists_in_megatron() -> None:
    args = vars(megatron_args())
    missing = [dest for dest, *_ in cpu._GPU_ONLY if dest not in args]
    assert missing == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--transformer-impl", "transformer_engine"], "--transformer-impl transformer_engine"),
        (["--distributed-backend", "nccl"], "--distributed-backend nccl"),
        (["--fp8-format", "hybrid"], "--fp8-format hybrid"),
        (["--attention-backend", "flash"], "--attention-backend flash"),
        (["--context-parallel-size", "2"], "--context-parallel-size 2"),
        (["--cuda-graph-impl", "local"], "--cuda-graph-impl local"),
    ],
)
def test_impossible_flags_are_named_with_a_remedy(flags: list[str], expected: str) -> None:
    [(flag, remedy)] = cpu.impossible_flags(megatron_args(*flags))
    assert flag == expected
    assert remedy


def test_possible_flags_are_not_refused() -> None:
    flags = "--bf16 --use-distributed-optimizer --sequence-parallel --context-parallel-size 1"
    assert cpu.impossible_flags(megatron_args(*flags.split())) == []


@pytest.mark.parametrize(
    ("visible", "device_exists", "reason"),
    [
        (None, False, None),
        ("", False, None),
        ("0,1", False, "CUDA_VISIBLE_DEVICES=0,1"),
        (None, True, "/dev/nvidia0"),
        # Hidden on purpose.
        ("-1", True, None),
        ("", True, None),
    ],
)
def test_broken_gpu_setup_is_recognised(
    visible: str | None, device_exists: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(
        cpu.Path, "exists", lambda self: device_exists and str(self) == "/dev/nvidia0"
    )
    found = cpu.looks_like_broken_gpu_setup()
    assert found is None if reason is None else found is not None and reason in found


def test_commands_use_no_gpu_library(corpus: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    plan = "plan --seq-length 64 --train-iters 5 --global-batch-size 4 --eval-iters 0 --json"
    data = ["--data-path", corpus, "--tokenizer-type", "HuggingFaceTokenizer"]
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "megatron_meco", *plan.split(), *data),
            *("--tokenizer-model", str(tokenizer_folder)),
        ],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(write_gpu_libraries(tmp_path)), str(ROOT)]),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["num_iterations"] == 5
