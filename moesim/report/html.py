"""One page that shows a result to a person: its figures, its pictures, what to do with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
img { max-width: 100% }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto }
"""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with what stands under it, in this order; empty parts are left out.

    text      paragraphs
    columns, rows  a table of texts
    pictures  PNG files in the page's folder
    code      a block of commands
    """

    heading: str
    text: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    pictures: Sequence[Path] = ()
    code: str = ""


def page(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML; pictures are linked by name, so they must lie beside it."""
    body = "\n".join(_section(section) for section in sections)
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}"
        f"</title><style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n{body}\n"
        "</body></html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.heading)}</h2>"]
    parts += [f"<p>{escape(text)}</p>" for text in section.text]
    if section.rows:
        parts.append(_table(section.columns, section.rows))
    parts += [
        f"<img src='{escape(p.name)}' alt='{escape(p.stem.replace('_', ' '))}'>"
        for p in section.pictures
    ]
    if section.code:
        parts.append(f"<pre>{escape(section.code)}</pre>")
    return "\n".join(parts)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>\n{body}</table>"
