"""Popularity counts as CSV: columns `layer,expert,count`, or a matrix.

The matrix form has a header of expert ids behind a first cell `layer`, then one row a layer:
`layer,0,1,2` / `3,10,0,7`. Pairs that the long form leaves out count zero.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.errors import TraceError
from traces.formats.common import RawCounts, build_counts
from traces.formats.load import MAX_JSON_BYTES, decoding, one_line
from traces.formats.options import ImportOptions
from traces.routing import ExpertCounts

_MAX_CELLS = 10**8


def read(path: Path, options: ImportOptions) -> ExpertCounts:
    """The counts of a CSV file; TraceError names the line and the cell that does not fit."""
    rows = _rows(path)
    header = [cell.strip().lower() for cell in rows[0]]
    if header == ["layer", "expert", "count"]:
        layers, counts = _long_form(rows, path, options)
    elif len(header) > 1 and header[0] == "layer":
        layers, counts = _matrix_form(rows, path)
    else:
        raise TraceError(
            f"{path}: header {one_line(','.join(header), 60)},"
            " expected layer,expert,count or layer,0,1,2,..."
        )
    raw = RawCounts(counts=counts, layers=layers, capture=f"csv {path.name}")
    return build_counts(raw, path, options)


def _rows(path: Path) -> list[list[str]]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise TraceError(f"{path}: larger than {MAX_JSON_BYTES} bytes, expected a table of counts")
    with decoding(path, "CSV"), path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    if len(rows) < 2:
        raise TraceError(f"{path}: {len(rows)} lines, expected a header and counts")
    return rows


def _long_form(
    rows: list[list[str]], path: Path, options: ImportOptions
) -> tuple[list[int], npt.NDArray[np.float64]]:
    cells: dict[tuple[int, int], float] = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != 3:
            raise TraceError(f"{path}: row {number}: {len(row)} cells, expected 3")
        layer = _index(row[0], path, f"row {number}: layer")
        expert = _index(row[1], path, f"row {number}: expert")
        if (layer, expert) in cells:
            raise TraceError(f"{path}: row {number}: layer {layer}, expert {expert} comes twice")
        cells[layer, expert] = _count(row[2], path, f"row {number}: count")
    layers = sorted({layer for layer, _ in cells})
    given = options.model.n_experts if options.model else options.n_experts
    n_experts = max(given or 0, 1 + max(expert for _, expert in cells))
    _check_size(len(layers), n_experts, path)
    counts = np.zeros((len(layers), n_experts))
    row_of = {layer: row for row, layer in enumerate(layers)}
    for (layer, expert), count in cells.items():
        counts[row_of[layer], expert] = count
    return layers, counts


def _matrix_form(rows: list[list[str]], path: Path) -> tuple[list[int], npt.NDArray[np.float64]]:
    width = len(rows[0])
    experts = [_index(cell, path, "header: expert") for cell in rows[0][1:]]
    if experts != list(range(width - 1)):
        raise TraceError(f"{path}: header: experts {one_line(experts, 60)}, expected 0,1,2,...")
    _check_size(len(rows) - 1, width, path)
    table: dict[int, list[float]] = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != width:
            raise TraceError(f"{path}: row {number}: {len(row)} cells, expected {width}")
        layer = _index(row[0], path, f"row {number}: layer")
        if layer in table:
            raise TraceError(f"{path}: row {number}: layer {layer} comes twice")
        table[layer] = [_count(cell, path, f"row {number}: count") for cell in row[1:]]
    layers = sorted(table)
    return layers, np.array([table[layer] for layer in layers], dtype=np.float64)


def _check_size(n_rows: int, n_experts: int, path: Path) -> None:
    if n_experts >= 2**15 or n_rows * n_experts > _MAX_CELLS:
        raise TraceError(f"{path}: expert ids to {n_experts - 1}, expected at most 32766")


def _index(cell: str, path: Path, where: str) -> int:
    text = cell.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise TraceError(f"{path}: {where}: {one_line(cell, 40)!r}, expected an integer >= 0")
    return int(text)


def _count(cell: Any, path: Path, where: str) -> float:
    try:
        return float(cell)
    except ValueError as error:
        raise TraceError(f"{path}: {where}: {one_line(cell, 40)!r}, expected a number") from error
