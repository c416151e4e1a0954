"""What every command says and writes: one JSON document, tables, a progress bar, notes, files."""

from __future__ import annotations

import csv
import dataclasses
import errno
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from traces.files import write_bytes

PIPE_WIDTH = 200  # columns of a table when stdout is not a terminal

show_progress: ContextVar[bool] = ContextVar("show_progress", default=True)


def emit_json(document: object) -> None:
    """Write one JSON document to stdout: keys sorted, numpy values as plain numbers."""
    sys.stdout.write(json_text(document))


def json_text(document: object) -> str:
    """The document as JSON with a line break at its end; equal documents give equal text."""
    return json.dumps(plain(document), indent=1, sort_keys=True, allow_nan=False) + "\n"


def plain(value: object) -> Any:
    """The value as dicts, lists, numbers and text; a number that is not finite becomes None.

    Takes dataclasses, mappings, sequences, numpy arrays and numbers, and paths.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(as_list := getattr(value, "tolist", None)):  # numpy, without importing it
        return plain(as_list())
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def note(text: str) -> None:
    """One line to stderr."""
    sys.stderr.write(text + "\n")


def say(text: str = "") -> None:
    """One line to stdout, as part of the answer."""
    sys.stdout.write(text + "\n")


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1
) -> None:
    """A table to stdout; the first `left` columns are text, the others are set to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        grid.add_column(Text(column), justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(shown(cell)) for cell in row))
    console = Console(width=width, highlight=False)
    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(grid)


def facts(title: str, pairs: Mapping[str, object]) -> None:
    """Names and values to stdout, one pair a line."""
    if title:
        say(title)
    width = max((len(name) for name in pairs), default=0)
    for name, value in pairs.items():
        say(f"  {name:<{width}}  {shown(value)}")


def shown(value: object) -> str:
    """A value for people: numbers to four significant digits, "-" for None or not a number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:#.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@contextmanager
def progress(total: int | None, label: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while the block runs; yields a function that adds finished steps.

    total  steps in all, None when it is not known (the bar then only moves)

    Nothing is drawn when stderr is not a terminal or with --no-progress.
    """
    if not (show_progress.get() and sys.stderr.isatty()):
        yield lambda steps: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda steps: bar.advance(task, steps)


def write_json(path: Path, document: object) -> None:
    """Write a document as `emit_json` would, whole or not at all."""
    write_bytes(path, json_text(document).encode())


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table as CSV, whole or not at all; numbers in full, None as an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([plain(cell) for cell in row] for row in rows)
    write_bytes(path, text.getvalue().encode())


def check_target(path: Path) -> None:
    """Refuse a file that cannot be written before the work for it begins; OSError says why."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist", str(path))
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def result_folder(path: Path) -> Path:
    """The folder, made when it is missing."""
    path.mkdir(parents=True, exist_ok=True)
    return path
