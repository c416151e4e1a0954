"""From raw arrays to a RoutingTrace or ExpertCounts: the checks that all readers share.

A reader says what its file said (`RawTrace`), and `build_trace` holds that against the options
and the model. Every refusal names the file, the field, the value and what was expected.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.errors import TraceError
from traces.formats.load import one_line
from traces.formats.options import ImportOptions
from traces.model import ModelSpec
from traces.routing import MISSING, ExpertCounts, RoutingTrace
from traces.validate import first_bad_id

Array = npt.NDArray[Any]
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class RawTrace:
    """What a file says of a trace, unchecked; None where it says nothing.

    topk      integers [tokens, layers, top_k], -1 where missing
    request, position, phase, forward   integers [tokens]
    weights   numbers [tokens, layers, top_k];  scores  numbers [tokens, layers, experts]
    layers    absolute layer index of each column
    capture   how the trace was taken; what a reader dropped or assumed is said here
    """

    topk: Array
    n_experts: int | None = None
    layers: Sequence[int] | None = None
    request: Array | None = None
    position: Array | None = None
    phase: Array | None = None
    forward: Array | None = None
    weights: Array | None = None
    scores: Array | None = None
    model: str = ""
    capture: str = ""


@dataclass(frozen=True, slots=True)
class RawCounts:
    """What a file says of counts, unchecked: numbers [rows, experts], one row a layer."""

    counts: Array
    layers: Sequence[int] | None = None
    n_experts: int | None = None
    top_k: int = 0
    model: str = ""
    capture: str = ""


def build_trace(raw: RawTrace, path: Path, options: ImportOptions) -> RoutingTrace:
    """The trace a file holds, checked against itself, the options and the model.

    raises  TraceError naming file, field, value and expectation
    """
    topk = _integers(raw.topk, 3, f"{path}: topk")
    if not topk.size:
        raise TraceError(f"{path}: topk: shape {list(topk.shape)}, expected at least one of each")
    n_experts = _n_experts(raw.n_experts, path, options)
    layers = _layers(raw.layers, topk.shape[1], path, options)
    if options.model is not None:
        check_model(path, n_experts, layers, topk.shape[2], options.model)
    _check_ids(topk, n_experts, layers, path)
    return RoutingTrace(
        topk=np.ascontiguousarray(topk, dtype=np.int16),
        n_experts=n_experts,
        layers=layers,
        weights=_weights(raw.weights, topk, f"{path}: weights"),
        scores=_floats(raw.scores, (*topk.shape[:2], n_experts), f"{path}: scores"),
        model=options.model.name if options.model else raw.model,
        capture="; ".join([raw.capture, *_assumptions(raw, options)]),
        **_token_columns(raw, len(topk), path),
    )


def _token_columns(raw: RawTrace, tokens: int, path: Path) -> dict[str, Any]:
    """request, position, phase and forward of each token; zeros or running where not logged."""
    request = _column(raw.request, tokens, np.int32, f"{path}: request")
    position = raw.position if raw.position is not None else running_index(request)
    columns: dict[str, Any] = {
        "request": request,
        "position": _column(position, tokens, np.int32, f"{path}: position"),
        "phase": _column(raw.phase, tokens, np.int8, f"{path}: phase", largest=1),
    }
    if raw.forward is not None:
        where = f"{path}: forward"
        columns["forward"] = _column(raw.forward, tokens, np.int64, where, largest=2**63 - 1)
    return columns


def _assumptions(raw: RawTrace, options: ImportOptions) -> list[str]:
    """What the trace says that the file did not, for the reader of its capture."""
    notes = []
    if raw.layers is None and options.layers is None and options.model is None:
        notes.append("layer indices assumed to count from 0")
    if raw.request is None:
        notes.append("requests not logged, all in one")
    if raw.position is None:
        notes.append("positions are the running index within a request")
    if raw.phase is None:
        notes.append("phase not logged, all marked prefill")
    return notes


def build_counts(raw: RawCounts, path: Path, options: ImportOptions) -> ExpertCounts:
    """The counts a file holds, checked; rows that are all zero (dense layers) are dropped.

    raises  TraceError naming file, field, value and expectation
    """
    counts = raw.counts
    if counts.ndim != 2 or counts.dtype.kind not in "iuf" or not counts.size:
        raise TraceError(
            f"{path}: counts: {counts.dtype}{list(counts.shape)},"
            " expected numbers [layers, experts]"
        )
    layers, notes = _count_layers(raw.layers, counts.shape[0], path, options)
    values = _checked_counts(counts, layers, path)
    n_experts = _n_experts(counts.shape[1], path, options)
    if raw.n_experts not in (None, n_experts):
        raise TraceError(f"{path}: counts: {n_experts} experts wide, expected {raw.n_experts}")
    used = (values > 0).any(axis=1)
    if not used.any():
        raise TraceError(f"{path}: counts: all zero, expected at least one layer with choices")
    if not used.all():
        notes.append(f"{int((~used).sum())} all-zero rows dropped")
    kept = tuple(layers[row] for row in np.flatnonzero(used).tolist())
    if options.model is not None:
        check_model(path, n_experts, kept, raw.top_k, options.model)
    return ExpertCounts(
        counts=values[used],
        layers=kept,
        top_k=options.model.top_k if options.model else raw.top_k,
        model=options.model.name if options.model else raw.model,
        capture="; ".join([raw.capture, *notes]),
    )


def _checked_counts(counts: Array, layers: Sequence[int], path: Path) -> npt.NDArray[np.float64]:
    values = counts.astype(np.float64)
    bad = ~np.isfinite(values) | (values < 0)
    if bad.any():
        row, expert = divmod(int(np.argmax(bad)), values.shape[1])
        raise TraceError(
            f"{path}: counts: {values[row, expert]} at layer {layers[row]}, expert {expert},"
            " expected a finite number >= 0"
        )
    return values


def check_model(
    path: Path, n_experts: int, layers: Sequence[int], top_k: int, model: ModelSpec
) -> None:
    """TraceError when experts, top_k (0: unknown) or layers are not those of the model."""
    if n_experts != model.n_experts:
        raise TraceError(
            f"{path}: n_experts: {n_experts}, expected {model.n_experts} as in model {model.name}"
        )
    if top_k not in (0, model.top_k):
        raise TraceError(f"{path}: top_k: {top_k}, expected {model.top_k} as in model {model.name}")
    strangers = sorted(set(layers) - set(model.moe_layers))
    if strangers:
        from_one = {layer - 1 for layer in layers} <= set(model.moe_layers)
        raise TraceError(
            f"{path}: layers: {strangers[0]} is no MoE layer of model {model.name},"
            f" expected {len(model.moe_layers)} of {model.moe_layers[0]}..{model.moe_layers[-1]}"
            + (" (do they count from 1? then pass --layers)" if from_one else "")
        )


def running_index(request: Array) -> npt.NDArray[np.int32]:
    """Place of each row among the rows of its request, 0 first."""
    order = np.argsort(request, kind="stable")
    ordered = request[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    lengths = np.diff(np.concatenate((starts, [len(request)])))
    index = np.empty(len(request), dtype=np.int32)
    index[order] = np.arange(len(request)) - np.repeat(starts, lengths)
    return index


def name_from_file(path: Path, known: Iterable[str]) -> str:
    """The longest known name that the file's name starts with, "" when there is none.

    known  names in lower case with hyphens, as in the catalogue
    """
    stem = path.name.lower().replace("_", "-")
    fitting = [name for name in known if name and stem.startswith(name.lower())]
    return max(fitting, key=len, default="")


def with_model(trace: RoutingTrace, path: Path, model: ModelSpec | None) -> RoutingTrace:
    """A stored trace held against the model, which also names it where it had no name."""
    if model is None:
        return trace
    check_model(path, trace.n_experts, trace.layers, trace.top_k, model)
    return trace if trace.model else replace(trace, model=model.name)


def shape_of(options: ImportOptions, path: Path, purpose: str) -> ModelSpec:
    """The model of the options; TraceError saying what it is needed for when it is not given."""
    if options.model is None:
        raise TraceError(f"{path}: {purpose}; pass --model")
    return options.model


def _n_experts(found: int | None, path: Path, options: ImportOptions) -> int:
    said = [("the file", found), ("--experts", options.n_experts)]
    if options.model is not None:
        said.append((f"model {options.model.name}", options.model.n_experts))
    known = [(where, value) for where, value in said if value is not None]
    if not known:
        raise TraceError(f"{path}: n_experts is not in the file; pass --model or --experts")
    where, value = known[0]
    for other_where, other in known[1:]:
        if value != other:
            raise TraceError(
                f"{path}: n_experts: {value} in {where}, expected {other} as in {other_where}"
            )
    if not 0 < value < 2**15:
        raise TraceError(f"{path}: n_experts: {value}, expected 1..32767")
    return value


def _layers(
    found: Sequence[int] | None, n_columns: int, path: Path, options: ImportOptions
) -> tuple[int, ...]:
    if options.layers is not None:
        layers = options.layers
    elif found is not None:
        layers = tuple(int(layer) for layer in found)
    elif options.model is not None:
        layers = options.model.moe_layers
    else:
        layers = tuple(range(n_columns))
    if len(layers) != n_columns:
        raise TraceError(
            f"{path}: topk: {n_columns} layers, expected {len(layers)}"
            f" ({one_line(list(layers), 60)}); pass --layers if only some were captured"
        )
    if list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] > _INT32_MAX:
        raise TraceError(
            f"{path}: layers: {one_line(list(layers), 60)}, expected increasing indices"
        )
    return layers


def _count_layers(
    found: Sequence[int] | None, n_rows: int, path: Path, options: ImportOptions
) -> tuple[tuple[int, ...], list[str]]:
    """Layers of the rows of counts: a file with one row for every layer has the dense ones too."""
    model = options.model
    if found is None and options.layers is None:
        if model is None:
            return tuple(range(n_rows)), [f"layer indices assumed 0..{n_rows - 1}"]
        if n_rows == model.n_layers:
            return tuple(range(n_rows)), []
    return _layers(found, n_rows, path, options), []


def _check_ids(topk: Array, n_experts: int, layers: tuple[int, ...], path: Path) -> None:
    bad = first_bad_id(topk, n_experts)
    if bad is not None:
        token, column, value = bad
        raise TraceError(
            f"{path}: topk: expert id {value} at token {token}, layer {layers[column]},"
            f" expected 0..{n_experts - 1} (-1 where missing)"
        )


def _integers(array: Array, ndim: int, where: str) -> Array:
    if array.dtype.kind not in "iu" or array.ndim != ndim:
        raise TraceError(
            f"{where}: {array.dtype}{list(array.shape)}, expected integers of {ndim} dimensions"
        )
    return array


def _column(
    array: Array | None, n: int, dtype: npt.DTypeLike, where: str, largest: int = _INT32_MAX
) -> Array:
    """Integers 0..largest, one a token, in the given type; zeros for None."""
    if array is None:
        return np.zeros(n, dtype=dtype)
    array = _integers(array, 1, where)
    if array.shape != (n,):
        raise TraceError(f"{where}: {array.shape[0]} values, expected {n}, one a token")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > largest:
        raise TraceError(f"{where}: values {low}..{high}, expected 0..{largest}")
    return array.astype(dtype)


def _floats(array: Array | None, shape: tuple[int, ...], where: str) -> Array | None:
    if array is None:
        return None
    if array.dtype.kind not in "fiu" or array.shape != shape:
        raise TraceError(
            f"{where}: {array.dtype}{list(array.shape)}, expected numbers {list(shape)}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float16)


def _weights(array: Array | None, topk: Array, where: str) -> Array | None:
    weights = _floats(array, topk.shape, where)
    if weights is not None:
        bad = ~np.isfinite(weights) & (topk != MISSING)
        if bad.any():
            token, column, _ = np.unravel_index(int(np.argmax(bad)), bad.shape)
            raise TraceError(f"{where}: not finite at token {token}, column {column}")
    return weights
