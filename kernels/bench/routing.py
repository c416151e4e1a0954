"""Which experts each token takes: drawn from a law, or sampled from a captured trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from moesim_kernels.bench.measured import CannotMeasurePoint
from moesim_kernels.bench.points import Point

CAPTURED = "captured"
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CapturedRouting:
    """Routing of a real model: topk int[tokens, layers, k], -1 missing; its file's name."""

    name: str
    topk: npt.NDArray[np.integer]

    @property
    def n_experts(self) -> int:
        """Experts of a layer, as far as the trace shows."""
        return int(self.topk.max()) + 1


def read_captured(path: Path) -> CapturedRouting:
    """The array `topk` of an .npz file; ValueError names what is wrong."""
    with np.load(path, allow_pickle=False) as held:
        if "topk" not in held:
            raise ValueError(f"{path}: no array `topk`, found {', '.join(held)}")
        topk = held["topk"]
    if topk.ndim != 3 or not np.issubdtype(topk.dtype, np.integer) or not topk.size:
        raise ValueError(
            f"{path}: topk is {topk.dtype}{list(topk.shape)}, expected integers [tokens, layers, k]"
        )
    return CapturedRouting(path.name, topk)


def routed_ids(n_tokens: int, n_experts: int, topk: int, load: str, seed: int) -> Ids:
    """Experts of each token, int64[n_tokens, topk], all of a token different.

    load  "balanced", or "power_law_A": expert r is wanted in proportion to (r + 1) ** -A
    """
    power = 0.0 if load == "balanced" else float(load.removeprefix("power_law_"))
    wanted = -power * np.log(np.arange(1, n_experts + 1))
    drawn = np.random.default_rng(seed).gumbel(size=(n_tokens, n_experts)) + wanted
    return np.argsort(-drawn, axis=1)[:, :topk]


def with_traces(points: Sequence[Point], traces: Sequence[CapturedRouting]) -> list[Point]:
    """The points, each captured routing named after the first trace that fits; others are left out.

    So a point of another trace is another point, and one without a trace is not tried in vain.
    """
    kept = []
    for point in points:
        if point.routing.get("dist") != CAPTURED:
            kept.append(point)
        elif fitting := [trace.name for trace in traces if fits(trace, point)]:
            kept.append(replace(point, routing={**point.routing, "trace": fitting[0]}))
    return kept


def fits(trace: CapturedRouting, point: Point) -> bool:
    """Whether a trace has the point's top-k and no more than its experts, and at least half."""
    n_experts, topk = int(point.shape["experts"]), int(point.shape["topk"])
    return trace.topk.shape[2] == topk and n_experts / 2 < trace.n_experts <= n_experts


def drawn_ids(point: Point, traces: Sequence[CapturedRouting]) -> Ids:
    """Experts of each token of a point, by its `routing` and the sizes of its `shape`.

    raises  CannotMeasurePoint for a captured routing whose trace is not among those given
    """
    n_tokens, n_experts, topk = (int(point.shape[name]) for name in ("tokens", "experts", "topk"))
    load, seed = str(point.routing["dist"]), int(point.routing["seed"])
    if load != CAPTURED:
        return routed_ids(n_tokens, n_experts, topk, load, seed)
    for trace in traces:
        if trace.name == point.routing.get("trace"):
            return captured_ids(trace, n_tokens, seed)
    raise CannotMeasurePoint("no captured routing was given (--routing FILE)")


def captured_ids(trace: CapturedRouting, n_tokens: int, seed: int) -> Ids:
    """Experts of tokens drawn from one layer of a trace, both chosen by the seed."""
    rng = np.random.default_rng(seed)
    layer = trace.topk[:, rng.integers(trace.topk.shape[1])]
    whole = layer[(layer >= 0).all(axis=1)]
    if not len(whole):
        raise CannotMeasurePoint(f"{trace.name} has a layer without a whole token")
    return whole[rng.choice(len(whole), n_tokens, replace=n_tokens > len(whole))].astype(np.int64)


def routing_of(ids: Ids, n_experts: int) -> dict[str, Any]:
    """`routing` of a row: tokens of each busy expert, falling; busy experts; the largest load."""
    counts = np.bincount(ids.ravel(), minlength=n_experts)
    busy = sorted((int(count) for count in counts if count), reverse=True)
    return {"counts": busy, "distinct": len(busy), "max_load": busy[0] if busy else 0}
