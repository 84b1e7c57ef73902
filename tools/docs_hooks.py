"""What mkdocs needs to know about pages that are written for GitHub first."""

from __future__ import annotations

import re
from typing import Any

# A place for the documentation of one object, which GitHub does not show.
_API = re.compile(r"^<!-- api: ([\w.]+) -->$", re.MULTILINE)
# A link to a file of the repository that is no page of the site.
_OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#\s]+)[^)]*\)")
_CODE = re.compile(r"`[^`]*`")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the text of a page as Python-Markdown reads it."""
    markdown = _API.sub(r"::: \1", markdown)
    markdown = _OUTSIDE.sub(_named, markdown)
    lines = (_table_row(line) if line.startswith("|") else line for line in markdown.split("\n"))
    return "\n".join(lines)


def _named(link: re.Match[str]) -> str:
    text, path = link.groups()
    return f"`{path}`" if path.endswith(text) else f"{text} (`{path}`)"


def _table_row(line: str) -> str:
    # GitHub wants a bar escaped in the code of a table, and Python-Markdown would show the escape.
    return _CODE.sub(lambda code: code[0].replace(r"\|", "|"), line)
