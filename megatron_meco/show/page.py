"""Write the facts of `meco show` into one HTML file."""

from __future__ import annotations

import html
import importlib.resources
import json
from pathlib import Path
from typing import Any

from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.whole_file import whole_file

_MARK = '<meta name="generator" content="meco show">'
_FIRST_BYTES = 4096


def check_page_file(path: Path) -> None:
    """Refuse a file that cannot be written, or that is not an earlier page of `meco show`.

    Raises:
        FlagError: Likewise.
    """
    where = f"--output {path}"
    try:
        if path.is_dir():
            raise FlagError("is a folder", where=where, remedy="Name a file in it.")
        if not path.absolute().parent.is_dir():
            raise FlagError("its folder does not exist", where=where, remedy="Make it first.")
        if path.exists() or path.is_symlink():
            is_page = path.is_file() and _MARK.encode() in path.open("rb").read(_FIRST_BYTES)
            if not is_page:
                raise FlagError(
                    "exists and is no page of `meco show`", where=where, remedy="Name a new file."
                )
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error


def write_page(path: Path, facts: dict[str, Any]) -> None:
    """Write the page; an earlier one is replaced.

    Args:
        path: The file.
        facts: What `command` gathered; `title` names the page.

    Raises:
        MeCoError: The file cannot be written, or plotly is not installed.
    """
    page = render_page(facts).encode()
    with whole_file(path, lambda reason: _unwritable(path, reason)) as file:
        file.write(page)


def render_page(facts: dict[str, Any]) -> str:
    """Return the page: styles, scripts, plotly.js and facts in one file."""
    # In a script element nothing ends the text but `</`; texts of documents may hold it.
    data = json.dumps(facts, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    parts = {
        "MARK": _MARK,
        "TITLE": html.escape(facts["title"]),
        "CSS": _own("page.css"),
        "PLOTLY": _plotly(),
        "DATA": data,
        "JS": _own("page.js"),
    }
    before, *pieces = _own("page.html").split("@@")
    text = [before]
    for name, after in zip(pieces[::2], pieces[1::2], strict=True):
        text += [parts[name], after]
    return "".join(text)


def _own(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MeCoError(
            "plotly is not installed",
            where="meco show",
            remedy="Install it: pip install 'megatron-meco[show]'.",
        ) from error
    return str(get_plotlyjs())


def _unwritable(path: Path, reason: str) -> FlagError:
    return FlagError(
        f"cannot be written ({reason})", where=f"--output {path}", remedy="Name another file."
    )
