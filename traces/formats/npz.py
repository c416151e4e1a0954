"""Our plain npz form: one routing trace, or the popularity of experts.

A trace holds `topk` [tokens, layers, k] and may hold `seq phase pos fwd weights layers n_experts`.
An `index.json` beside the file (a list of entries with `file model num_experts top_k layers`)
says what the arrays cannot. Counts hold `counts` or `expected_selections` [layers, experts], and
may hold `layers`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from traces.errors import TraceError
from traces.formats.common import RawCounts, RawTrace, build_counts, build_trace
from traces.formats.load import load_json, npz_array, npz_headers, one_line
from traces.formats.options import ImportOptions
from traces.routing import ExpertCounts, RoutingTrace

_FIELDS = {
    "request": ("seq", "request"),
    "position": ("pos", "position"),
    "phase": ("phase",),
    "forward": ("fwd", "forward"),
    "weights": ("weights",),
    "scores": ("scores",),
}
_COUNTS = ("counts", "expected_selections")


class _Entry(BaseModel):
    """What index.json says of one file; it may say more, for people."""

    model_config = ConfigDict(extra="ignore", strict=True)

    file: str
    model: str = ""
    num_experts: int = Field(gt=0)
    top_k: int = Field(gt=0)
    layers: list[int]
    source: str = ""
    note: str = ""


def read(path: Path, options: ImportOptions) -> RoutingTrace | ExpertCounts:
    """The trace or counts of an npz file; TraceError when it holds neither."""
    names = set(npz_headers(path))
    if "topk" in names:
        return _read_trace(path, names, options)
    for name in _COUNTS:
        if name in names:
            return _read_counts(path, name, names, options)
    if "tokens" in names:
        raise TraceError(
            f"{path}: array tokens holds loads per rank, which depend on a placement;"
            " expected expert counts (`counts`) or choices (`topk`)"
        )
    raise TraceError(
        f"{path}: arrays {one_line(sorted(names), 80)},"
        " expected topk, counts or expected_selections"
    )


def _read_trace(path: Path, names: set[str], options: ImportOptions) -> RoutingTrace:
    topk = npz_array(path, "topk")
    fields: dict[str, npt.NDArray[Any]] = {}
    for field, keys in _FIELDS.items():
        for key in keys:
            if key in names:
                fields[field] = npz_array(path, key)
    entry = _index_entry(path)
    if entry is not None and topk.ndim == 3 and entry.top_k != topk.shape[2]:
        raise TraceError(
            f"{path}: top_k: {topk.shape[2]}, expected {entry.top_k} as in index.json beside it"
        )
    known = {"topk", "layers", "n_experts", *(key for keys in _FIELDS.values() for key in keys)}
    raw = RawTrace(
        topk=topk,
        n_experts=entry.num_experts if entry else _scalar(path, "n_experts", names),
        layers=entry.layers if entry else _layers(path, names),
        model=entry.model.lower() if entry else "",
        capture=_capture(path, entry, names - known),
        **fields,
    )
    return build_trace(raw, path, options)


def _read_counts(path: Path, name: str, names: set[str], options: ImportOptions) -> ExpertCounts:
    raw = RawCounts(
        counts=npz_array(path, name),
        layers=_layers(path, names),
        capture=_capture(path, None, names - {name, "layers"}, name),
    )
    return build_counts(raw, path, options)


def _index_entry(path: Path) -> _Entry | None:
    """The entry of index.json that names this file; None without one."""
    index = path.with_name("index.json")
    if not index.is_file():
        return None
    listed = load_json(index)
    if not isinstance(listed, list):
        return None
    for entry in listed:
        if isinstance(entry, dict) and entry.get("file") == path.name:
            try:
                return _Entry.model_validate(entry)
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(str(part) for part in first["loc"])
                raise TraceError(
                    f"{index}: entry {path.name}: field {field}: {first['msg']}"
                ) from error
    return None


def _layers(path: Path, names: set[str]) -> list[int] | None:
    if "layers" not in names:
        return None
    layers = npz_array(path, "layers")
    if layers.ndim != 1 or layers.dtype.kind not in "iu":
        raise TraceError(
            f"{path}: layers: {layers.dtype}{list(layers.shape)}, expected integers [layers]"
        )
    return [int(layer) for layer in layers]


def _scalar(path: Path, name: str, names: set[str]) -> int | None:
    if name not in names:
        return None
    value = npz_array(path, name)
    if value.size != 1 or value.dtype.kind not in "iu":
        raise TraceError(f"{path}: {name}: {value.dtype}{list(value.shape)}, expected one integer")
    return int(np.ravel(value)[0])


def _capture(path: Path, entry: _Entry | None, unused: set[str], field: str = "") -> str:
    parts = [f"npz {path.name}" + (f" ({field})" if field else "")]
    if entry is not None:
        parts += [text for text in (entry.source, entry.note) if text]
    if unused:
        parts.append(f"arrays not imported: {one_line(', '.join(sorted(unused)), 80)}")
    return "; ".join(parts)
