"""Pickles that would run code, at each place where a foreign folder is read."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import io
import json
import operator
import os
import pickle
import shutil
import struct
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from inference.synthetic import run_args, write_run
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_meco import cli
from megatron_meco.untrusted.inert_pickle import (
    READ_ERRORS,
    Inert,
    read_pickle,
    read_saved,
)


class Reduces:
    """Pickled as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call

    def __call__(self) -> None:
        """pickle requires a callable; it is never called."""


def payloads(mark: Path) -> dict[str, Any]:
    """Objects that create a file when unpickled, by mechanism."""
    touch = Reduces(os.mkdir, str(mark))
    return {
        "a call": touch,
        "inside a list": [{"deep": (touch,)}],
        "exec": Reduces(exec, f"import os; os.mkdir({str(mark)!r})"),
        "getattr": Reduces(Reduces(getattr, os, "mkdir"), str(mark)),
        "partial": Reduces(Reduces(functools.partial, os.mkdir, str(mark))),
        "operator": Reduces(Reduces(operator.methodcaller, "mkdir", str(mark)), os),
        "a key": {touch: 1},
        "flags": Namespace(args=touch),
        "an argument of an allowed class": Reduces(OrderedDict, [["a", touch]]),
    }


HOW = list(payloads(Path("x")))


@pytest.fixture(autouse=True)
def modules_by_name() -> Any:
    """Make modules picklable, as a hand-written pickle could name them."""
    copyreg.pickle(type(os), lambda module: (__import__, (module.__name__,)))
    yield
    copyreg.dispatch_table.pop(type(os))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_nothing_is_called(tmp_path: Path, how: str, protocol: int) -> None:
    mark = tmp_path / "mark"
    content = pickle.dumps(payloads(mark)[how], protocol)
    read_pickle(content)
    assert not mark.exists()
    # The same bytes do it, where pickle itself reads them.
    pickle.loads(content)
    assert mark.exists()


def test_plain_values_come_back_as_they_are() -> None:
    value = {"a": [1, 2.5, None, True, b"x", "\u00e9"], "b": ({1, 2}, OrderedDict(c=1))}
    for protocol in (2, 5):
        again = read_pickle(pickle.dumps(value, protocol))
        assert again["b"] == value["b"] and again["a"][:4] == value["a"][:4]
    assert read_pickle(pickle.dumps(torch.Size([2, 3]))) == (2, 3)
    known = {("torch", "bfloat16"): torch.bfloat16}
    assert read_pickle(pickle.dumps(torch.bfloat16), known) is torch.bfloat16
    flags = read_pickle(pickle.dumps(Namespace(seed=7)))
    assert (flags.qualified_name, flags.state) == ("argparse.Namespace", {"seed": 7})


def test_what_torch_saves_is_read_without_its_tensors() -> None:
    file = io.BytesIO()
    torch.save({"seed": 7, "tensor": torch.zeros(3)}, file)
    state = read_saved(file.getvalue())
    assert state["seed"] == 7 and isinstance(state["tensor"], Inert)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("archive/data.pkl", pickle.dumps("x" * 10**6))
    with pytest.raises(ValueError, match="compressed"):
        read_saved(archive.getvalue())


def test_a_file_changes_nothing_for_the_next_one() -> None:
    """BUILD with a pair sets attributes of the top of the stack, which may be a class."""
    for module, name in (("collections", "OrderedDict"), ("torch", "Size"), ("evil", "Thing")):
        # GLOBAL, MARK, NONE, dict {"__init__": 5}, TUPLE2, BUILD, STOP
        code = b"c" + module.encode() + b"\n" + name.encode() + b"\n"
        code += b"N(X\x08\x00\x00\x00__init__K\x05d\x86b."
        with pytest.raises(READ_ERRORS):
            read_pickle(code)
    assert OrderedDict(a=1) == {"a": 1} and Inert("x").args == ("x",)


@pytest.mark.parametrize(
    "code",
    [
        pickle.PROTO + b"\x02Nr" + b"\xff\xff\xff\x7f.",  # a memo of two billion places
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",  # a buffer of a terabyte
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",  # a frame of a terabyte
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",  # bytes
        b"(" * 200_000 + b"t" * 200_000 + b".",  # nested
        b"\x82\x01.",  # a registered class
        b"",
        b"\x80",
        b"junk",
    ],
)
def test_numbers_in_the_file_allocate_nothing(code: bytes) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(*READ_ERRORS):
        read_pickle(code)
    # Kilobytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


# ---- Each place ----


@pytest.fixture
def saved(tmp_path: Path, tokenizer_folder: Path) -> Path:
    return write_run(tmp_path / "run", tokenizer_folder)


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Export and return the error: one line, nothing run, nothing written."""
    out = tmp_path / "out"
    assert cli.main(["export", "--load", str(tmp_path / "run"), "--output", str(out)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("meco: error: ") and err.count("\n") == 1
    assert not (tmp_path / "mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    return err


@pytest.mark.parametrize("how", HOW)
def test_the_index(saved: Path, tmp_path: Path, how: str, capsys: Any) -> None:
    payload = payloads(tmp_path / "mark")[how]
    folder = saved / "iter_0000020"
    (folder / ".metadata").write_bytes(pickle.dumps(payload))
    assert "its index cannot be used" in refused(tmp_path, capsys)
    # An index that is right but for what it holds.
    shutil.rmtree(saved)
    write_run(saved, tmp_path / "no-tokenizer")
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = payload
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert "has no tokenizer.json" in refused(tmp_path, capsys)


@pytest.mark.parametrize("how", HOW)
def test_the_state_of_the_run(saved: Path, tmp_path: Path, how: str, capsys: Any) -> None:
    payload = payloads(tmp_path / "mark")[how]
    torch.save(payload, saved / "iter_0000020" / "common.pt")
    assert "holds no" in refused(tmp_path, capsys)
    state = {"args": run_args(tmp_path / "no"), "iteration": 20, "rerun": payload}
    torch.save(state, saved / "iter_0000020" / "common.pt")
    assert "has no tokenizer.json" in refused(tmp_path, capsys)
    # The same inside of a .distcp file.
    folder = saved / "iter_0000020"
    shutil.rmtree(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {"common_state/shard_0_1": [payload]},
            storage_writer=dcp.FileSystemWriter(folder),
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
            no_dist=True,
        )
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert "holds no" in refused(tmp_path, capsys)


def test_a_tensor(saved: Path, tmp_path: Path, capsys: Any) -> None:
    folder = saved / "iter_0000020"
    file = io.BytesIO()
    torch.save(payloads(tmp_path / "mark")["a call"], file)
    (folder / "evil.distcp").write_bytes(file.getvalue())
    index = pickle.loads((folder / ".metadata").read_bytes())
    place = index.storage_data[MetadataIndex("decoder.final_layernorm.weight", torch.Size([0]))]
    place.relative_path, place.offset, place.length = "evil.distcp", 0, len(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert "cannot be read" in refused(tmp_path, capsys)


def test_weights_of_a_hugging_face_folder(exported: Path, tmp_path: Path, capsys: Any) -> None:
    """Pickled weights are refused, and so is code that lies beside the model."""
    model = shutil.copytree(exported, tmp_path / "model")
    mark = tmp_path / "mark"
    (model / "model.safetensors").unlink()
    torch.save(payloads(mark)["a call"], model / "pytorch_model.bin")
    flags = ["--model", str(model)]
    for command in (
        ["import", *flags, "--output", str(tmp_path / "out")],
        ["generate", *flags, "--prompt", "x", "--device", "cpu"],
        ["eval", *flags, "--tasks", "local_choice", "--device", "cpu"],
        ["steer", *flags, "--output", str(tmp_path / "out"), "--device", "cpu"],
    ):
        assert cli.main(command) == 1
        assert "holds no safetensors files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_code_beside_a_model_is_not_run(exported: Path, tmp_path: Path, capsys: Any) -> None:
    model = shutil.copytree(exported, tmp_path / "model")
    mark = tmp_path / "mark"
    code = f"import os\nos.mkdir({str(mark)!r})\nclass C: pass\ndef generate(*a, **k): pass\n"
    run = ["generate", "--model", str(model), "--prompt", "x", "--device", "cpu"]
    (model / "evil.py").write_text(code)
    # Jinja, which a chat template is, can reach any class.
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    for name, changes in (
        ("config.json", {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.C", "evil.C"]}}),
        ("tokenizer_config.json", {"chat_template": template}),
    ):
        content = json.loads((model / name).read_text()) | changes
        (model / name).write_text(json.dumps(content))
    assert cli.main([*run, "--max-new-tokens", "2"]) == 0
    config = json.loads((model / "config.json").read_text())
    for changes, message in (
        ({"model_type": "evil"}, "not a folder that `meco export` wrote"),
        ({"attn_implementation": "a/b"}, "asks for code from the hub"),
        ({"text_config": {"_experts_implementation": "a/b"}}, "asks for code from the hub"),
    ):
        (model / "config.json").write_text(json.dumps(config | changes))
        capsys.readouterr()
        assert cli.main(run) == 1
        assert message in capsys.readouterr().err
    (model / "config.json").write_text(json.dumps(config))
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code)
    assert cli.main(run) == 1
    assert "it contains code" in capsys.readouterr().err
    assert not mark.exists()
