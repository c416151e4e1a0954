"""Dumps of SGLang's expert distribution recorder, in all its modes.

stat       {logical_count [layers, experts] or [steps, layers, experts], ...}, .pt or .json
per_pass   {records: [{forward_pass_id, rank, global_physical_count [layers, slots]}],
           last_physical_to_logical_map [layers, slots]}, one .pt a rank
per_token  as per_pass, and a record also has positions, forward_mode, extend_seq_lens and
           topk_ids_of_layer [layers, tokens, 8] of physical slots, padded with -1

The layer axis counts all layers of the model; dense ones are empty and are dropped, so layer
indices stay absolute. A folder is read as the dumps of all ranks of one recording. Slots become
logical experts by the map, which holds only if no rebalance happened while recording.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.errors import TraceError
from traces.formats.common import RawCounts, RawTrace, build_counts, build_trace
from traces.formats.load import as_array, head, load_json, load_torch, one_line
from traces.formats.options import ImportOptions
from traces.formats.sglang_requests import RequestTracker
from traces.routing import DECODE, MISSING, PREFILL, ExpertCounts, RoutingTrace

_MAP = "last_physical_to_logical_map"
_EXTEND, _DECODE, _MIXED, _IDLE = 1, 2, 3, 4
Array = npt.NDArray[Any]
_Record = tuple[Path, dict[str, Any], Array]  # file, record, logical expert of each slot


@dataclass(frozen=True, slots=True)
class _Pass:
    """One forward pass of one rank, checked: ids are logical, -1 where missing."""

    number: int
    rank: int
    ids: Array  # [layers, tokens, 8]
    positions: Array
    mode: int
    lengths: Array | None  # tokens of each sequence in the pass

    def same_tokens(self, other: _Pass) -> bool:
        """Whether two ranks of a pass logged one and the same batch."""
        return np.array_equal(self.positions, other.positions) and np.array_equal(
            self.ids, other.ids
        )


def read(path: Path, options: ImportOptions) -> RoutingTrace | ExpertCounts:
    """The trace (per_token) or counts (stat, per_pass) of a dump file or a folder of them."""
    dumps = [(file, _load(file)) for file in _files(path)]
    if all("logical_count" in dump for _, dump in dumps):
        return _read_stat(dumps, path, options)
    if not all("records" in dump and _MAP in dump for _, dump in dumps):
        raise TraceError(
            f"{path}: keys {one_line(sorted(map(str, dumps[0][1])), 80)},"
            f" expected logical_count, or records and {_MAP}"
        )
    records: list[_Record] = []
    for file, dump in dumps:
        to_logical = _logical_map(dump[_MAP], file, options)
        records += [(file, record, to_logical) for record in _records(file, dump)]
    if any("topk_ids_of_layer" in record for _, record, _ in records):
        return _read_per_token(records, path, options)
    return _read_per_pass(records, path, options)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("expert_distribution_recorder_*.pt"))
    if not files:
        raise TraceError(f"{path}: no expert_distribution_recorder_*.pt in the folder")
    return files


def _load(file: Path) -> dict[str, Any]:
    content = load_json(file) if head(file, 64).lstrip()[:1] == b"{" else load_torch(file)
    if not isinstance(content, dict):
        raise TraceError(f"{file}: holds a {type(content).__name__}, expected a dict")
    return content


def _records(file: Path, dump: dict[str, Any]) -> Iterable[dict[str, Any]]:
    records = dump["records"]
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise TraceError(f"{file}: records: expected a list of dicts")
    return records


# --- stat ------------------------------------------------------------------------------------


def _read_stat(
    dumps: list[tuple[Path, dict[str, Any]]], path: Path, options: ImportOptions
) -> ExpertCounts:
    total: Array | None = None
    for file, dump in dumps:
        counts = as_array(dump["logical_count"], f"{file}: logical_count")
        if counts.ndim not in (2, 3) or not counts.size:
            raise TraceError(
                f"{file}: logical_count: {list(counts.shape)},"
                " expected [layers, experts] or [steps, layers, experts]"
            )
        _check_counts(counts, f"{file}: logical_count")
        counts = counts.astype(np.float64).reshape(-1, *counts.shape[-2:]).sum(axis=0)
        if total is not None and total.shape != counts.shape:
            raise TraceError(f"{file}: logical_count: shape differs from the file before")
        total = counts if total is None else total + counts
    if total is None:
        raise TraceError(f"{path}: logical_count is missing")
    raw = RawCounts(
        counts=total, layers=range(len(total)), capture=f"SGLang recorder stat, {path.name}"
    )
    return build_counts(raw, path, options)


# --- per_pass --------------------------------------------------------------------------------


def _read_per_pass(records: list[_Record], path: Path, options: ImportOptions) -> ExpertCounts:
    seen: set[tuple[int, int]] = set()
    total: Array | None = None
    for file, record, to_logical in records:
        key = _integer(record, "forward_pass_id", file), _integer(record, "rank", file)
        if key in seen:
            raise TraceError(f"{file}: forward_pass_id {key[0]} of rank {key[1]} comes twice")
        seen.add(key)
        slots = _field(record, "global_physical_count", file)
        if slots.shape != to_logical.shape:
            raise TraceError(
                f"{file}: global_physical_count: {list(slots.shape)},"
                f" expected {list(to_logical.shape)} as in {_MAP}"
            )
        _check_counts(slots, f"{file}: global_physical_count")
        counts = _sum_slots(slots, to_logical)
        if total is not None and total.shape != counts.shape:
            raise TraceError(f"{file}: {_MAP}: shape differs from the file before")
        total = counts if total is None else total + counts
    if total is None:
        raise TraceError(f"{path}: records: none, expected at least one forward pass")
    passes, ranks = len({number for number, _ in seen}), len({rank for _, rank in seen})
    raw = RawCounts(
        counts=total,
        layers=range(len(total)),
        capture=f"SGLang recorder per_pass, {path.name}, {passes} passes on {ranks} ranks",
    )
    return build_counts(raw, path, options)


def _sum_slots(slots: Array, to_logical: Array) -> npt.NDArray[np.float64]:
    """Counts [layers, experts] of the logical experts behind the slots."""
    n_experts = int(to_logical.max()) + 1
    counts = np.zeros((len(slots), n_experts))
    rows = np.arange(len(slots))[:, None]
    np.add.at(counts, (np.broadcast_to(rows, slots.shape), to_logical), slots)
    return counts


def _check_counts(counts: Array, where: str) -> None:
    if counts.dtype.kind == "f" and not np.isfinite(counts).all():
        raise TraceError(f"{where}: found a value that is not finite, expected counts >= 0")
    if counts.size and counts.min() < 0:
        raise TraceError(f"{where}: found {counts.min()}, expected counts >= 0")


# --- per_token -------------------------------------------------------------------------------


def _read_per_token(records: list[_Record], path: Path, options: ImportOptions) -> RoutingTrace:
    passes = [_pass(file, record, to_logical) for file, record, to_logical in records]
    passes.sort(key=lambda one: (one.number, one.rank))
    if len({len(one.ids) for one in passes}) > 1:
        raise TraceError(f"{path}: topk_ids_of_layer: number of layers differs between records")
    kept = _without_copies([one for one in passes if len(one.positions)])
    if not kept:
        raise TraceError(f"{path}: records: no tokens, expected at least one")
    ids = np.concatenate([one.ids for one in kept], axis=1).transpose(1, 0, 2)
    layers = np.flatnonzero((ids != MISSING).any(axis=(0, 2)))
    width = int((ids != MISSING).any(axis=(0, 1)).sum())
    if not width:
        raise TraceError(f"{path}: topk_ids_of_layer: all -1, expected expert ids")
    tracker = RequestTracker()
    tracked = [tracker.follow(one.rank, one.positions, one.lengths, one.mode) for one in kept]
    raw = RawTrace(
        topk=ids[:, layers, :width],
        n_experts=1 + max(int(to_logical.max()) for _, _, to_logical in records),
        layers=layers.tolist(),
        request=np.concatenate([request for request, _ in tracked]),
        position=np.concatenate([one.positions for one in kept]),
        phase=np.concatenate([np.where(decode, DECODE, PREFILL) for _, decode in tracked]),
        forward=np.concatenate([np.full(len(one.positions), one.number) for one in kept]),
        capture=f"SGLang recorder per_token, {path.name}; requests derived from positions;"
        f" {len(passes) - len(kept)} passes that were empty or copies of another rank's dropped",
    )
    return build_trace(raw, path, options)


def _pass(file: Path, record: dict[str, Any], to_logical: Array) -> _Pass:
    slots, positions = _field(record, "topk_ids_of_layer", file), _field(record, "positions", file)
    fits = slots.ndim == 3 and positions.shape == slots.shape[1:2] and slots.dtype.kind in "iu"
    if not fits or (positions.size and positions.dtype.kind not in "iu"):
        raise TraceError(
            f"{file}: topk_ids_of_layer: {slots.dtype}{list(slots.shape)} for positions"
            f" {list(positions.shape)}, expected integers [layers, tokens, top_k]"
        )
    mode = _integer(record, "forward_mode", file)
    if mode not in (_EXTEND, _DECODE, _MIXED, _IDLE):
        raise TraceError(f"{file}: forward_mode: {mode}, expected 1 (extend) to 4 (idle)")
    lengths = record.get("extend_seq_lens")
    return _Pass(
        number=_integer(record, "forward_pass_id", file),
        rank=_integer(record, "rank", file),
        ids=_logical_ids(slots, to_logical, file),
        positions=positions.astype(np.int64),
        mode=mode,
        lengths=None if lengths is None else _lengths(lengths, len(positions), file),
    )


def _lengths(value: Any, tokens: int, file: Path) -> Array | None:
    """Tokens of each sequence of a pass; None where they do not add up to its tokens."""
    lengths = as_array(value, f"{file}: extend_seq_lens")
    whole = not lengths.size or (lengths.dtype.kind in "iu" and lengths.min() >= 1)
    if lengths.ndim != 1 or not whole:
        raise TraceError(f"{file}: extend_seq_lens: expected a list of lengths >= 1")
    return lengths if lengths.size and int(lengths.sum()) == tokens else None


def _logical_ids(slots: Array, to_logical: Array, file: Path) -> Array:
    if slots.shape[0] != to_logical.shape[0]:
        raise TraceError(
            f"{file}: topk_ids_of_layer: {slots.shape[0]} layers,"
            f" expected {to_logical.shape[0]} as in {_MAP}"
        )
    if slots.size and (slots.min() < MISSING or slots.max() >= to_logical.shape[1]):
        raise TraceError(
            f"{file}: topk_ids_of_layer: slots {slots.min()}..{slots.max()},"
            f" expected -1..{to_logical.shape[1] - 1} as in {_MAP}"
        )
    padded = np.concatenate([to_logical, np.full((len(to_logical), 1), MISSING)], axis=1)
    flat = slots.reshape(len(slots), -1).astype(np.int64)
    ids: Array = np.take_along_axis(padded, np.where(flat < 0, to_logical.shape[1], flat), axis=1)
    return ids.reshape(slots.shape)


def _without_copies(passes: list[_Pass]) -> list[_Pass]:
    """Ranks of one tensor-parallel group log the same batch; the first of them stays."""
    kept: list[_Pass] = []
    for one in passes:
        same_pass = [other for other in kept[-64:] if other.number == one.number]
        if not any(one.same_tokens(other) for other in same_pass):
            kept.append(one)
    return kept


def _logical_map(value: Any, file: Path, options: ImportOptions) -> Array:
    to_logical = as_array(value, f"{file}: {_MAP}")
    if to_logical.ndim != 2 or to_logical.dtype.kind not in "iu" or not to_logical.size:
        raise TraceError(f"{file}: {_MAP}: {list(to_logical.shape)}, expected [layers, slots]")
    n_experts = options.model.n_experts if options.model else options.n_experts
    limit = min(n_experts or 2**15 - 1, to_logical.shape[1])
    if to_logical.min() < 0 or to_logical.max() >= limit:
        raise TraceError(
            f"{file}: {_MAP}: experts {to_logical.min()}..{to_logical.max()},"
            f" expected 0..{limit - 1}"
        )
    return to_logical.astype(np.int64)


def _field(record: dict[str, Any], name: str, file: Path) -> Array:
    if name not in record:
        raise TraceError(f"{file}: records: {name} is missing")
    return as_array(record[name], f"{file}: {name}")


def _integer(record: dict[str, Any], name: str, file: Path) -> int:
    value = record.get(name)
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise TraceError(f"{file}: {name}: {one_line(value, 40)}, expected an integer >= 0")
    return value
