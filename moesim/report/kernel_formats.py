"""Weight formats over bf16: how much faster, and up to which load."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from moesim.report.kernel_samples import RANGES, Sample, grouped, load_range

BASE_FORMAT = "bf16"
NEVER, ALWAYS, PARTLY = "never", "always", "partly"


@dataclass(frozen=True, slots=True)
class Crossover:
    """Where one format is faster than the other, along growing load.

    verdict  "never", "always" or "partly"
    since    load from which it is faster, None when it is so at the first
    until    load up to which it is faster, None when it is so at the last
    gaps     slower points between its first and its last faster one
    """

    verdict: str
    since: float | None
    until: float | None
    gaps: int = 0


@dataclass(frozen=True, slots=True)
class Curve:
    """Speed of a weight format over bf16, for one layer or matrix, as the batch grows.

    base_kernel    the bf16 kernel: the same, else the fastest of the same library
    loads, speedups  as many, loads increasing; speedups are bf16 seconds over the format's
    """

    op: str
    weights: str
    kernel: str
    base_kernel: str
    axis: str
    fixed: str
    dist: str
    loads: tuple[float, ...]
    speedups: tuple[float, ...]
    crossover: Crossover


@dataclass(frozen=True, slots=True)
class FormatScore:
    """A weight format over bf16, over all curves of a kernel.

    speedup       geometric mean by range of loads (RANGES), None where nothing was measured
    verdict, since, until   of the middle curve, by the load up to which the format is faster
                  (never counts as 0, to the last load as endless)
    least, most   of the curves that have an `until`
    never, open_ended  curves on which it is faster nowhere, and at the last load
    most_load     the largest load measured
    """

    op: str
    weights: str
    kernel: str
    base_kernel: str
    curves: int
    speedup: tuple[float | None, ...]
    verdict: str
    since: float | None
    until: float | None
    least: float | None
    most: float | None
    never: int
    open_ended: int
    most_load: float


def format_curves(samples: Iterable[Sample]) -> list[Curve]:
    """Every other weight format over bf16, where both were measured at equal work."""
    points: dict[tuple[str, ...], list[tuple[Sample, Sample]]] = defaultdict(list)
    for alike in grouped(samples, lambda sample: sample.work).values():
        bases = [s for s in alike if s.weights == BASE_FORMAT]
        for sample in alike:
            base = _base(sample, bases)
            if base is not None and sample.weights not in ("", BASE_FORMAT):
                key = (str(sample.work[1]), sample.weights, sample.kernel, base.kernel,
                       sample.axis, sample.fixed, sample.dist)  # fmt: skip
                points[key].append((sample, base))
    return [_curve(key, points[key]) for key in sorted(points)]


def _base(sample: Sample, bases: Sequence[Sample]) -> Sample | None:
    library = sample.kernel.split(".")[0]
    same = [s for s in bases if s.kernel == sample.kernel]
    related = same or [s for s in bases if s.kernel.split(".")[0] == library]
    return min(related, key=lambda s: s.seconds, default=None)


def _curve(key: Sequence[str], pairs: Sequence[tuple[Sample, Sample]]) -> Curve:
    ordered = sorted((s.load, base.seconds / s.seconds) for s, base in pairs)
    loads, speedups = (tuple(values) for values in zip(*ordered, strict=True))
    op, weights, kernel, base_kernel, axis, fixed, dist = key
    found = crossover(loads, speedups)
    return Curve(
        op, weights, kernel, base_kernel, axis, fixed, dist, loads, speedups, found
    )  # fmt: skip


def crossover(loads: Sequence[float], speedups: Sequence[float]) -> Crossover:
    """Where a speed-up crosses 1, between measured loads on a straight line of both logarithms.

    loads  > 0, increasing; speedups > 0, as many
    """
    faster = [i for i, speedup in enumerate(speedups) if speedup > 1]
    if not faster:
        return Crossover(NEVER, None, None)
    first, last = faster[0], faster[-1]
    since = _between(loads, speedups, first - 1) if first else None
    until = _between(loads, speedups, last) if last + 1 < len(loads) else None
    everywhere = len(faster) == len(loads)
    gaps = last - first + 1 - len(faster)
    return Crossover(ALWAYS if everywhere else PARTLY, since, until, gaps)


def _between(loads: Sequence[float], speedups: Sequence[float], at: int) -> float:
    """The load at which the speed-up is 1, between the points `at` and `at + 1`."""
    here, there = math.log(speedups[at]), math.log(speedups[at + 1])
    way = here / (here - there)
    return math.exp((1 - way) * math.log(loads[at]) + way * math.log(loads[at + 1]))


def format_scores(curves: Iterable[Curve]) -> list[FormatScore]:
    """A score for each operator, format and pair of kernels."""
    groups = grouped(curves, lambda c: (c.op, c.weights, c.kernel, c.base_kernel))
    return [_format_score(key, groups[key]) for key in sorted(groups)]


def _format_score(key: tuple[str, str, str, str], curves: Sequence[Curve]) -> FormatScore:
    ends = [_end(curve) for curve in curves]
    known = [end for end in ends if 0 < end < math.inf]
    middle = sorted(curves, key=_end)[(len(curves) - 1) // 2].crossover
    return FormatScore(
        *key,
        curves=len(curves),
        speedup=tuple(_mean_speedup(curves, name) for name in RANGES),
        verdict=middle.verdict,
        since=middle.since,
        until=middle.until,
        least=min(known, default=None),
        most=max(known, default=None),
        never=ends.count(0.0),
        open_ended=ends.count(math.inf),
        most_load=max(curve.loads[-1] for curve in curves),
    )


def _end(curve: Curve) -> float:
    """Load up to which the format is faster: 0 for never, endless when it is so at the last."""
    if curve.crossover.verdict == NEVER:
        return 0.0
    return math.inf if curve.crossover.until is None else curve.crossover.until


def _mean_speedup(curves: Sequence[Curve], name: str) -> float | None:
    within = [
        speedup
        for curve in curves
        for load, speedup in zip(curve.loads, curve.speedups, strict=True)
        if load_range(load) == name
    ]
    return geometric_mean(within) if within else None
