"""`meco doctor`: verdicts as a function of facts, probes that survive anything, a clean report."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import write_gpu_libraries

from megatron_meco import cli
from megatron_meco.doctor import command
from megatron_meco.doctor import facts as doctor_facts
from megatron_meco.doctor.facts import Facts
from megatron_meco.doctor.verdicts import diagnose

ROOT = Path(__file__).resolve().parents[1]

CPU_HOST = Facts(
    python="3.12.1",
    system="Linux",
    requirements=(("megatron-core", ">=0.19.2,<0.20", "0.19.2"), ("torch", ">=2.10", "2.13.0")),
    torch={
        "version": "2.13.0",
        "cuda_build": "13.0",
        "varlen": True,
        "gloo": True,
        "nccl": True,
        "no_gpu": "Found no NVIDIA driver on your system",
        "broken_gpu": None,
    },
    megatron={"version": "0.19.2", "helpers": True, "training": True, "imported": True},
    extension={"path": "_core.so", "compiler": "GCC: (x) 12.2.0", "self_test": ""},
)
GPU_HOST = dataclasses.replace(
    CPU_HOST,
    driver="580.65.06",
    torch={
        "version": "2.13.0",
        "cuda_build": "13.0",
        "varlen": True,
        "gloo": True,
        "nccl": True,
        "nccl_version": "2.29.7",
        "gpus": [{"name": "NVIDIA H100", "capability": "9.0", "memory_gib": 79.6}] * 2,
    },
    transformer_engine={"version": "2.20.2", "loads": True},
)


def check(facts, name):
    return next(c for c in diagnose(facts).checks if c.name == name)


def change(facts, **fields):
    """Replace dictionaries of facts by merged ones."""
    merged = {
        name: {**getattr(facts, name), **value} if value else {} for name, value in fields.items()
    }
    return dataclasses.replace(facts, **merged)


def test_cpu_host_can_train():
    diagnosis = diagnose(CPU_HOST)
    assert diagnosis.can_train
    assert diagnosis.device == "cpu"
    assert "scaled_dot_product_attention" in diagnosis.attention
    assert diagnosis.optimizer == "torch AdamW"
    assert check(CPU_HOST, "GPU").verdict == "note"
    assert "no NVIDIA driver" in check(CPU_HOST, "GPU").found
    assert not any(c.verdict in ("warning", "problem") for c in diagnosis.checks)


def test_gpu_host_can_train():
    diagnosis = diagnose(GPU_HOST)
    assert diagnosis.can_train
    assert diagnosis.device == "cuda"
    assert "THD" in diagnosis.attention
    assert diagnosis.optimizer == "Transformer Engine FusedAdam"
    assert "Transformer Engine" in diagnosis.layers
    gpu = check(GPU_HOST, "GPU")
    assert gpu.found == "2 x NVIDIA H100, capability 9.0, 79.6 GiB; driver 580.65.06"
    assert "2.29.7" in check(GPU_HOST, "communication").found


def test_gpu_without_transformer_engine():
    facts = change(GPU_HOST, transformer_engine={})
    diagnosis = diagnose(facts)
    assert diagnosis.can_train
    assert "varlen" in diagnosis.attention
    assert diagnosis.optimizer == "torch AdamW"
    assert "[gpu]" in check(facts, "Transformer Engine").remedy
    old_torch = change(facts, torch={"varlen": False})
    assert "scaled_dot_product_attention" in diagnose(old_torch).attention
    with_apex = change(facts, apex={"version": "0.1", "real": True, "loads": True})
    assert diagnose(with_apex).optimizer == "apex FusedAdam"


def test_apex_of_pypi_is_told_apart():
    facts = change(GPU_HOST, apex={"version": "0.9.10.dev0", "real": False})
    assert check(facts, "apex").verdict == "warning"
    assert "pip uninstall apex" in check(facts, "apex").remedy
    assert diagnose(facts).optimizer != "apex FusedAdam"


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (dataclasses.replace(CPU_HOST, python="3.11.7"), "Python"),
        (
            dataclasses.replace(
                CPU_HOST, requirements=(("megatron-core", ">=0.19.2,<0.20", "0.20.0"),)
            ),
            "megatron-core",
        ),
        (dataclasses.replace(CPU_HOST, requirements=(("rich", ">=13", None),)), "rich"),
        (change(CPU_HOST, megatron={}), "megatron-core"),
        (
            change(CPU_HOST, megatron={"error": "broken", "error_type": "RuntimeError"}),
            "megatron-core",
        ),
        (change(CPU_HOST, megatron={"training": False}), "megatron.training"),
        (change(CPU_HOST, megatron={"helpers": False}), "megatron helpers_cpp"),
        (change(CPU_HOST, torch={}), "torch"),
        (change(CPU_HOST, torch={"gloo": False}), "communication"),
        (change(CPU_HOST, torch={"broken_gpu": "/dev/nvidia0 exists, but"}), "GPU"),
        (change(GPU_HOST, torch={"nccl": False}), "communication"),
        (change(CPU_HOST, extension={}), "C++ extension"),
        (change(CPU_HOST, extension={"self_test": "a plan loses documents"}), "C++ extension"),
        (
            change(
                GPU_HOST,
                transformer_engine={"loads": False, "error": "libx", "error_type": "OSError"},
            ),
            "Transformer Engine",
        ),
    ],
)
def test_each_problem_is_named_with_a_remedy(facts, name):
    diagnosis = diagnose(facts)
    problems = [c for c in diagnosis.checks if c.verdict == "problem"]
    assert not diagnosis.can_train
    assert name in [c.name for c in problems]
    assert all(c.remedy for c in problems)


def test_failing_import_of_transformer_engine_is_a_warning():
    te = {"loads": False, "error": "no libx", "error_type": "ImportError"}
    facts = change(GPU_HOST, transformer_engine=te)
    assert diagnose(facts).can_train
    assert check(facts, "Transformer Engine").verdict == "warning"


@pytest.mark.parametrize(
    "state",
    [{"loads": True}, {"error": "libx", "error_type": "OSError"}, {"error": "libx"}],
    ids=["loads", "breaks Megatron", "cannot be imported"],
)
def test_gpu_libraries_without_a_gpu_are_not_used(state):
    facts = change(
        CPU_HOST,
        transformer_engine={"version": "2.20.2", **state},
        apex={"version": "0.1", "real": True, **state},
    )
    diagnosis = diagnose(facts)
    assert diagnosis.can_train
    assert diagnosis.optimizer == "torch AdamW"
    assert "Transformer Engine" not in diagnosis.layers
    for name in ("Transformer Engine", "apex"):
        assert check(facts, name).verdict == "note"
        assert check(facts, name).found.endswith("not used without a GPU")
    # PyPI's apex misleads the GPU nodes that share the environment.
    assert check(change(CPU_HOST, apex={"version": "0.9", "real": False}), "apex").remedy


def test_nothing_is_known():
    empty = Facts(python="3.12.1", system="Linux", requirements=())
    assert not diagnose(empty).can_train


@pytest.mark.parametrize("style", ["table", "json"])
def test_report(style, capsys, monkeypatch):
    broken = change(CPU_HOST, extension={"self_test": "[bold]a plan loses documents[/nonsense]"})
    monkeypatch.setattr(command, "collect_facts", lambda: broken)
    assert cli.main(["doctor", *(["--json"] if style == "json" else [])]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    if style == "json":
        report = json.loads(out)
        assert report["can_train"] is False
        assert {c["verdict"] for c in report["checks"]} <= {"ok", "note", "warning", "problem"}
    else:
        assert "1 problem keeps training" in out
        assert "make clean venv" in " ".join(out.split())


def test_report_without_the_library_that_draws_it(capsys, monkeypatch):
    monkeypatch.setattr(command, "collect_facts", lambda: GPU_HOST)
    assert cli.main(["doctor"]) == 0
    drawn = capsys.readouterr().out
    for name in ("rich", "rich.console", "rich.table", "rich.text"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["doctor"]) == 0
    plain = capsys.readouterr().out
    # The same words; the other draws lines to a width.
    assert set(drawn.split()) <= set(plain.replace(":", " ").split()) | set(plain.split())
    assert plain.endswith("Training can run here.\n")


def test_what_doctor_itself_lacks_is_not_left_to_doctor(capsys, monkeypatch):
    def lack():
        raise ModuleNotFoundError("No module named 'packaging'", name="packaging")

    monkeypatch.setattr(command, "collect_facts", lack)
    assert cli.main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert "packaging is not installed. Reinstall this package" in err and "meco doctor" not in err


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("import os; print('noise', flush=True); os.abort()", "signal 6"),
        ("raise RuntimeError('no such card\\nand more')", "no such card"),
        ("import sys; sys.exit(3)", "3"),
    ],
)
def test_probe_survives_a_broken_library(module, expected, tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text(module, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = doctor_facts._run_probe("flash_attention")
    assert expected in result["error"]
    assert "\n" not in result["error"]


def test_probe_that_hangs_is_ended(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor_facts, "_PROBE_SECONDS", 2)
    begin = time.monotonic()
    assert "did not finish" in doctor_facts._run_probe("flash_attention")["error"]
    assert time.monotonic() - begin < 30


def test_probe_finds_the_impostor_of_apex(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("import pyramid", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor_facts._run_probe("apex") == {"version": "unknown", "real": False}


def test_gpu_libraries_on_a_host_without_a_gpu(tmp_path):
    """The whole report agrees with a run, which hides them from Megatron."""
    result = subprocess.run(
        [sys.executable, "-m", "megatron_meco", "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(write_gpu_libraries(tmp_path)),
            "CUDA_VISIBLE_DEVICES": "-1",
        },
        timeout=240,
    )
    report = json.loads(result.stdout)
    assert report["can_train"], [c for c in report["checks"] if c["verdict"] == "problem"]
    assert report["optimizer"] == "torch AdamW"
    found = {c["name"]: c["found"] for c in report["checks"]}
    assert found["Transformer Engine"] == "2.20.2, not used without a GPU"
    assert found["apex"] == "unknown, not used without a GPU"
    assert found["megatron-core"].startswith("0.")
    assert "cannot be imported" not in found["megatron-core"]


def test_extension_passes_its_self_test():
    result = doctor_facts._run_probe("extension")
    assert "error" not in result, result
    assert result["self_test"] == ""
    assert Path(result["path"]).name.startswith("_core")


def test_this_environment_can_train():
    result = subprocess.run(
        [sys.executable, "-m", "megatron_meco", "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
    )
    report = json.loads(result.stdout)
    assert result.returncode == (0 if report["can_train"] else 1)
    assert report["can_train"], [c for c in report["checks"] if c["verdict"] == "problem"]
    assert result.stderr == ""
