"""Kernels of one run against each other, against the measured roofline, and format by format.

All figures are of rows that share a device and its software (`kernel_samples.Run`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median

from moesim.report.kernel_formats import Curve, format_curves
from moesim.report.kernel_samples import RANGES, Run, Sample, grouped, load_range

CLOSE = 0.9  # of the best of the others: as good
# Operators whose bytes do not pass between the device's memory and its arithmetic, or that are
# themselves what the roof is measured with.
NO_ROOF = frozenset(
    {"all_to_all", "copy", "launch", "nvme_read", "overlap", "peak", "stream"}
)  # fmt: skip
_MEMORY_PEAKS = ("copy", "set", "read")


@dataclass(frozen=True, slots=True)
class Peer:
    """One kernel at a point that several were measured at.

    of_best      seconds of the fastest over its own, 1 for the fastest itself
    over_others  seconds of the fastest other over its own, above 1 for the fastest
    """

    sample: Sample
    of_best: float
    over_others: float


@dataclass(frozen=True, slots=True)
class KernelScore:
    """A kernel against the others, over all points that it shares with one.

    of_best, over_others  geometric means of what Peer has
    close_share           of the points, at least CLOSE of the best of the others
    worst, worst_load     the smallest over_others, and at which load
    """

    op: str
    weights: str
    kernel: str
    points: int
    of_best: float
    over_others: float
    close_share: float
    worst: float
    worst_load: float


@dataclass(frozen=True, slots=True)
class Roof:
    """What a device was measured to do at best with so many threads (0: not said).

    flop_per_s  by dtype of the activations
    best_seen   "memory" and dtypes for which nothing but the compared rows themselves was measured
    """

    threads: int
    bytes_per_s: float
    flop_per_s: Mapping[str, float]
    best_seen: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reach:
    """Share of the roofline that a kernel reaches within one range of loads."""

    op: str
    weights: str
    kernel: str
    load: str
    rows: int
    median: float
    best: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that one run says.

    fractions  share of the roofline, one for each of `rows` (samples that have a roof)
    """

    run: Run
    revisions: tuple[str, ...]
    throttled: int
    roofs: tuple[Roof, ...]
    rows: tuple[Sample, ...]
    fractions: tuple[float, ...]
    peers: tuple[Peer, ...]
    curves: tuple[Curve, ...]


def compare(samples: Iterable[Sample]) -> list[Comparison]:
    """One comparison a run, by name of the run; runs without anything to compare are left out."""
    by_run = grouped(samples, lambda sample: sample.run)
    compared = [_compared(run, by_run[run]) for run in sorted(by_run)]
    return [one for one in compared if one.rows]


def _compared(run: Run, samples: Sequence[Sample]) -> Comparison:
    found = {threads: roof(samples, threads) for threads in sorted({s.threads for s in samples})}
    rows = tuple(s for s in samples if s.op not in NO_ROOF and s.n_bytes > 0)
    return Comparison(
        run,
        tuple(sorted({s.revision for s in samples if s.revision})),
        sum(s.throttled for s in samples),
        tuple(found[threads] for threads in sorted({s.threads for s in rows})),
        rows,
        tuple(fraction(s, found[s.threads]) for s in rows),
        tuple(peers(samples)),
        tuple(format_curves(samples)),
    )


def peers(samples: Iterable[Sample]) -> list[Peer]:
    """Every kernel at every point that more than one was measured at."""
    found = []
    for at_point in grouped(samples, lambda sample: sample.point).values():
        for sample in at_point:
            others = [s.seconds for s in at_point if s.kernel != sample.kernel]
            if others:
                best = min(*others, sample.seconds)
                found.append(Peer(sample, best / sample.seconds, min(others) / sample.seconds))
    return found


def kernel_scores(found: Iterable[Peer]) -> list[KernelScore]:
    """A score for each operator, weight format and kernel."""
    groups = grouped(found, lambda p: (p.sample.op, p.sample.weights, p.sample.kernel))
    return [_kernel_score(key, groups[key]) for key in sorted(groups)]


def _kernel_score(key: tuple[str, str, str], found: Sequence[Peer]) -> KernelScore:
    worst = min(found, key=lambda peer: peer.over_others)
    return KernelScore(
        *key,
        points=len(found),
        of_best=geometric_mean(peer.of_best for peer in found),
        over_others=geometric_mean(peer.over_others for peer in found),
        close_share=sum(peer.over_others >= CLOSE for peer in found) / len(found),
        worst=worst.over_others,
        worst_load=worst.sample.load,
    )


def roof(samples: Sequence[Sample], threads: int) -> Roof:
    """The measured peaks of one run with so many threads.

    Memory: the best of `stream`, or of copying, setting and reading (`peak`). Arithmetic: the best
    of `cpu_gemm`, or of the large products (`peak`), by dtype of the activations, in which narrow
    weights are multiplied. What was not measured so is the best of the rows that are compared.
    """
    alike = [s for s in samples if s.threads == threads]
    rows = [s for s in alike if s.op not in NO_ROOF]
    memory = [s.n_bytes / s.seconds for s in alike if s.n_bytes and _measures_memory(s)]
    seen = [s.n_bytes / s.seconds for s in rows]
    measured = _best_by(
        (name, s.flops / s.seconds) for s in alike if (name := _measured_arithmetic(s)) and s.flops
    )
    arithmetic = _best_by((s.activations, s.flops / s.seconds) for s in rows if s.flops)
    guessed = sorted(set(arithmetic) - set(measured))
    return Roof(
        threads,
        max(memory or seen, default=0.0),
        arithmetic | measured,
        (*([] if memory else ["memory"]), *guessed),
    )


def _measures_memory(sample: Sample) -> bool:
    return sample.op == "stream" or (
        sample.op == "peak" and sample.shape.get("kind") in _MEMORY_PEAKS
    )


def _measured_arithmetic(sample: Sample) -> str:
    """The dtype whose peak a row measures, "" for none."""
    if sample.op == "cpu_gemm":
        return sample.activations
    kind = str(sample.shape.get("kind", "")) if sample.op == "peak" else ""
    return kind.removeprefix("gemm_") if kind.startswith("gemm_") else ""


def _best_by(rates: Iterable[tuple[str, float]]) -> dict[str, float]:
    best: dict[str, float] = {}
    for name, rate in rates:
        best[name] = max(rate, best.get(name, 0.0))
    return best


def fraction(sample: Sample, of: Roof) -> float:
    """Least seconds that the roof allows over the measured ones.

    Above 1 where a row is faster than what the roof was measured with: its data were in a cache.
    """
    memory_s = sample.n_bytes / of.bytes_per_s if of.bytes_per_s else 0.0
    peak = of.flop_per_s.get(sample.activations, 0.0)
    arithmetic_s = sample.flops / peak if peak else 0.0
    return max(memory_s, arithmetic_s) / sample.seconds


def reaches(rows: Sequence[Sample], fractions: Sequence[float]) -> list[Reach]:
    """Share of the roofline by operator, format, kernel and range of loads."""
    pairs = grouped(
        zip(rows, fractions, strict=True),
        lambda pair: (pair[0].op, pair[0].weights, pair[0].kernel, load_range(pair[0].load)),
    )
    ordered = sorted(pairs, key=lambda key: (*key[:3], RANGES.index(key[3])))
    return [_reach(key, [share for _, share in pairs[key]]) for key in ordered]


def _reach(key: tuple[str, str, str, str], shares: Sequence[float]) -> Reach:
    return Reach(*key, rows=len(shares), median=median(shares), best=max(shares))
