"""Attention does not leak: whole model, one document changed, all other logits bit-identical."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "leakage.py"


def report(folder: Path, mode: str) -> list[dict[str, bool]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(folder / mode), mode],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: list[dict[str, bool]] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_changing_one_document_leaves_the_logits_of_the_others_bit_identical(
    tmp_path: Path,
) -> None:
    rows = report(tmp_path, "packed")
    assert rows == [{"others_identical": True, "own_changed": True}] * 4


def test_the_same_check_sees_a_leak_where_there_is_one(tmp_path: Path) -> None:
    """Plain causal attention over the pack: later documents see earlier ones."""
    rows = report(tmp_path, "causal")
    assert not rows[0]["others_identical"]
