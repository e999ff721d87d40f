"""Parts of pages of HTML that need nothing else, light or dark as the reader prefers."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from eplb_rs.draw.look import DARK, LIGHT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from eplb_rs.draw.look import Palette

__all__ = ["definitions", "document", "table"]


def document(title: str, style: str, body: str) -> str:
    """A page; its rules of style may use the colours of :class:`Palette`, and add to those below."""
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>
:root {{ {_colours(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_colours(DARK)} }} }}
{_STYLE}{style}</style>
</head>
<body>
{body}</body>
</html>
"""


def definitions(facts: Iterable[tuple[str, str]]) -> str:
    """Names and values, for a list of definitions."""
    return "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts
    )


def table(names: tuple[str, ...], rows: list[Any]) -> str:
    """A table: the names of its columns, and its rows of what is shown as text."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _colours(palette: Palette) -> str:
    names = ("background", "text", "quiet", "grid", "before", "after")
    return " ".join(f"--{name}: {getattr(palette, name)};" for name in names)


_STYLE = """\
body { margin: 0 auto; background: var(--background); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
img { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { color: var(--quiet); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
summary { cursor: pointer; font-weight: 600; }
"""
