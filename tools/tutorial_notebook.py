"""Write examples/tutorial.ipynb from docs/tutorial.md: the same text, its commands in cells.

    python tools/tutorial_notebook.py

`tests/documentation` refuses a notebook that is another than this makes, and runs its cells.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"

_BLOCK = re.compile(r"^```([\w-]*)\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)
_SAVED = re.compile(r"Save this\s+as\s+`([^`]+)`")
_ADDED = re.compile(r"add a\s+line\s+to\s+`([^`]+)`")
_LINK = re.compile(r"(\]\()(?!https?:|#)")
# Behind this heading are runs for machines that no notebook is on.
_END = "## Larger machines"
_FIRST = """\
import os
import sys

# The commands of the environment that runs this notebook, whose set-up is `make venv`.
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
!meco doctor
"""


def notebook(page: str) -> str:
    """Return the notebook of a page's text."""
    body = page.partition(_END)[0]
    cells: list[dict[str, Any]] = []
    end = 0
    for block in _BLOCK.finditer(body):
        language, content = block.groups()
        before = body[end : block.start()]
        saved = _SAVED.search(before)
        found = saved or _ADDED.search(before)
        name = found[1] if found else ""
        _add(cells, "markdown", before)
        end = block.end()
        if "make venv" in content:
            _add(cells, "code", _FIRST)
        elif language == "":
            _add(cells, "code", f"%%bash -e\n{content}")
        elif name:
            _add(cells, "code", f"%%writefile {'' if saved else '-a '}{name}\n{content}")
        elif language != "text":
            _add(cells, "markdown", block[0])
    _add(cells, "markdown", body[end:])
    _add(cells, "markdown", f"[{_END.lstrip('# ')}](tutorial.md): one GPU, eight GPUs, Slurm.")
    content = {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _add(cells: list[dict[str, Any]], kind: str, text: str) -> None:
    text = text.strip("\n")
    if not text:
        return
    if kind == "markdown":
        text = _LINK.sub(r"\1../docs/", text)
    cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    cells.append(cell | {"source": text.splitlines(keepends=True)})


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(PAGE.read_text()))
