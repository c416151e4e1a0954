"""Megatron-LM router traces (`--moe-routing-trace-path`): `router_trace_rank{r}.jsonl`.

One line per (step, block, layer) and rank: `step stage block layer rank num_tokens topk
top_indices`. Layers are numbered as the rank names its modules. Several lines of one step, layer
and rank are microbatches. Ranks with the same layers ran in parallel on different tokens; ranks
with different layers are pipeline stages of the same tokens, paired in rank order. Sequences are
not told apart: each (step, rank, microbatch) becomes one request.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from traces.errors import TraceError
from traces.formats.common import RawTrace, build_trace
from traces.formats.load import as_array, iter_jsonl, one_line
from traces.formats.options import ImportOptions
from traces.routing import RoutingTrace

_Batch = tuple[int, int]  # step, microbatch


class _Line(BaseModel):
    """One line; sidecar fields (hs_*, logit_*) are not needed."""

    model_config = ConfigDict(extra="ignore", strict=True)

    step: int = Field(ge=0, lt=2**31)
    stage: str = "pre_dispatch"
    block: str = "decoder"
    layer: int = Field(ge=0, lt=2**31)
    rank: int = Field(ge=0, lt=2**31)
    num_tokens: int = Field(ge=0)
    topk: int = Field(gt=0)
    top_indices: list[Any]


@dataclass(slots=True)
class _Rank:
    """What one rank wrote: ids [tokens, topk] by (step, microbatch) and layer."""

    batches: dict[_Batch, dict[int, npt.NDArray[Any]]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def layers(self, path: Path) -> tuple[int, ...]:
        """The rank's layers; TraceError when a batch lacks one that another has."""
        known = {tuple(sorted(ids)) for ids in self.batches.values()}
        if len(known) != 1:
            short = min(self.batches, key=lambda batch: len(self.batches[batch]))
            raise TraceError(
                f"{path}: step {short[0]}: {len(self.batches[short])} layers,"
                f" expected {max(map(len, known))} as in other steps; cut short?"
            )
        return next(iter(known))


def read(path: Path, options: ImportOptions) -> RoutingTrace:
    """The trace of one rank's file, or of all ranks in a folder; decoder blocks only."""
    ranks: dict[int, _Rank] = defaultdict(_Rank)
    skipped: Counter[str] = Counter()
    for where, line in _lines(path):
        if line.block != "decoder" or line.stage != "pre_dispatch":
            skipped[f"{line.block}/{line.stage}"] += 1
            continue
        _add(ranks[line.rank], line, where)
    if not ranks:
        raise TraceError(f"{path}: no lines of block decoder, expected some")
    stages = _stages(ranks, path)
    return build_trace(_join(stages, skipped, path), path, options)


def _lines(path: Path) -> Iterator[tuple[str, _Line]]:
    files = sorted(path.glob("router_trace_rank*.jsonl")) if path.is_dir() else [path]
    for file in files:
        for number, record in iter_jsonl(file):
            where = f"{file}: line {number}"
            try:
                yield where, _Line.model_validate(record)
            except ValidationError as error:
                first = error.errors()[0]
                name = ".".join(str(part) for part in first["loc"])
                raise TraceError(f"{where}: field {one_line(name, 40)}: {first['msg']}") from error


def _add(rank: _Rank, line: _Line, where: str) -> None:
    ids = as_array(line.top_indices, f"{where}: top_indices")
    if ids.shape != (line.num_tokens, line.topk) and line.num_tokens:
        raise TraceError(
            f"{where}: top_indices {list(ids.shape)},"
            f" expected [num_tokens={line.num_tokens}, topk={line.topk}]"
        )
    if not line.num_tokens:
        ids = np.zeros((0, line.topk), dtype=np.int64)
    microbatch = 0
    while line.layer in rank.batches[line.step, microbatch]:
        microbatch += 1
    rank.batches[line.step, microbatch][line.layer] = ids


def _stages(ranks: dict[int, _Rank], path: Path) -> list[list[_Rank]]:
    """Ranks that saw the same tokens, one list a data-parallel place, stages in layer order."""
    by_layers: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number in sorted(ranks):
        by_layers[ranks[number].layers(path)].append(number)
    groups = [by_layers[layers] for layers in sorted(by_layers)]
    flat = [layer for layers in by_layers for layer in layers]
    if len(flat) != len(set(flat)) or len({len(group) for group in groups}) != 1:
        raise TraceError(
            f"{path}: ranks hold layers {one_line(sorted(by_layers), 80)},"
            " expected the same layers everywhere or disjoint stages of equally many ranks"
        )
    return [[ranks[number] for number in column] for column in zip(*groups, strict=True)]


def _join(stages: list[list[_Rank]], skipped: Counter[str], path: Path) -> RawTrace:
    keys = sorted({batch for ranks in stages for rank in ranks for batch in rank.batches})
    pieces: list[npt.NDArray[Any]] = []
    requests: list[npt.NDArray[np.int64]] = []
    steps: list[npt.NDArray[np.int64]] = []
    for batch in keys:
        for ranks in stages:
            piece = _batch_ids(ranks, batch, path)
            if piece is not None and len(piece):
                requests.append(np.full(len(piece), len(pieces)))
                steps.append(np.full(len(piece), batch[0]))
                pieces.append(piece)
    if len({piece.shape[1:] for piece in pieces}) != 1:
        raise TraceError(f"{path}: {len(pieces)} batches with tokens, expected one layers x topk")
    layers = sorted(layer for rank in stages[0] for layer in rank.layers(path))
    notes = [f"Megatron router trace {path.name}", "sequences not logged, one request a batch"]
    notes += [f"{count} lines of {one_line(name, 40)} skipped" for name, count in skipped.items()]
    return RawTrace(
        topk=np.concatenate(pieces),
        layers=layers,
        request=np.concatenate(requests),
        forward=np.concatenate(steps),
        capture="; ".join(notes),
    )


def _batch_ids(ranks: list[_Rank], batch: _Batch, path: Path) -> npt.NDArray[Any] | None:
    """Ids [tokens, layers, topk] of one batch over its pipeline stages; None if none ran it."""
    ids = {layer: a for rank in ranks for layer, a in rank.batches.get(batch, {}).items()}
    if not ids:
        return None
    if len(ids) != sum(len(rank.layers(path)) for rank in ranks):
        raise TraceError(f"{path}: step {batch[0]}: {len(ids)} layers, expected all stages to run")
    if len({array.shape for array in ids.values()}) != 1:
        shapes = sorted({array.shape for array in ids.values()})
        raise TraceError(f"{path}: step {batch[0]}: layers of shapes {shapes}, expected one")
    return np.stack([ids[layer] for layer in sorted(ids)], axis=1)
