"""Kernels in one picture: against each other, against the roofline, and format by format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median_low
from types import MappingProxyType
from typing import Any

from moesim.errors import SimulationError
from moesim.report.figure import PALETTE, drawing
from moesim.report.kernel_comparison import CLOSE, Comparison
from moesim.report.kernel_formats import Curve
from moesim.report.kernel_samples import EXPERT_AXIS, grouped

MOST_RUNS = 4  # pictures of more are too tall to read; those with most rows are drawn
_COLOURS: Mapping[str, str] = MappingProxyType(
    {"bf16": PALETTE[0], "int8": PALETTE[1], "fp8": PALETTE[2], "int4": PALETTE[5],
     "fp32": PALETTE[3]}
)  # fmt: skip
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_GRID: Mapping[str, Any] = MappingProxyType({"color": "#dddddd", "linewidth": 0.6})
Dots = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class _Panel:
    """What one panel shows: dots by name of series, and the words around them."""

    series: Mapping[str, Dots]
    title: str
    y_label: str
    axis: str
    colours: Mapping[str, str]
    lines: Mapping[str, str]
    levels: Sequence[tuple[float, str]]
    log: bool = True


def kernel_pictures(compared: Sequence[Comparison], path: Path) -> None:
    """A line of panels for each run, over the load; lines are geometric means by power of two.

    Left, speed over the fastest other kernel; middle, share of the measured roofline; right, speed
    of weight formats over bf16 with the middle crossovers. Each of the operator of which most is
    known; dots are single rows.

    raises  SimulationError when there is no run
    """
    if not compared:
        raise SimulationError("no run to draw: no rows to compare")
    drawn = sorted(compared, key=lambda one: -len(one.rows))[:MOST_RUNS]
    with drawing(path, (15.0, 6.0 * len(drawn)), (len(drawn), 3)) as (_, panels):
        for row, one in enumerate(drawn):
            against, share, formats = panels[3 * row : 3 * row + 3]
            _draw(against, _against_others(one), "only one kernel at every point")
            _draw(share, _roof_share(one), "no rows")
            curves = _main_curves(one)
            _draw(formats, _format_speed(curves), "no format beside bf16")
            _mark_crossovers(formats, curves)
            against.annotate(
                one.run.name, (0, 1), xytext=(0, 30), xycoords="axes fraction",
                textcoords="offset points", fontsize=13, fontweight="bold",
            )  # fmt: skip


def _against_others(one: Comparison) -> _Panel | None:
    groups = grouped(one.peers, lambda peer: (peer.sample.op, peer.sample.weights))
    if not groups:
        return None
    (op, weights), found = max(
        groups.items(), key=lambda item: (item[1][0].sample.axis == EXPERT_AXIS, len(item[1]))
    )
    series = {
        kernel: [(peer.sample.load, peer.over_others) for peer in of_kernel]
        for kernel, of_kernel in grouped(found, lambda peer: peer.sample.kernel).items()
    }
    return _Panel(
        series,
        f"{op}, {weights}: kernels against each other",
        "speed over the fastest other kernel",
        found[0].sample.axis,
        {kernel: PALETTE[i % len(PALETTE)] for i, kernel in enumerate(series)},
        {},
        [(1.0, "-"), (CLOSE, ":")],
    )


def _roof_share(one: Comparison) -> _Panel | None:
    pairs = list(zip(one.rows, one.fractions, strict=True))
    by_op = grouped(pairs, lambda pair: str(pair[0].work[1]))
    if not by_op:
        return None
    op, found = max(by_op.items(), key=lambda item: (_n_kinds(item[1]), len(item[1])))
    kinds = grouped(found, lambda pair: (pair[0].kernel, pair[0].weights))
    kernels = list(dict.fromkeys(kernel for kernel, _ in kinds))
    names = {kind: f"{kind[0]} {kind[1]}" for kind in kinds}
    return _Panel(
        {names[kind]: [(s.load, share) for s, share in of] for kind, of in kinds.items()},
        f"{op}: share of the measured roofline",
        "share of the roofline",
        found[0][0].axis,
        {names[kind]: _COLOURS.get(kind[1], PALETTE[7]) for kind in kinds},
        {names[kind]: _LINES[kernels.index(kind[0]) % len(_LINES)] for kind in kinds},
        [(1.0, "-")],
        log=False,
    )


def _n_kinds(pairs: Sequence[tuple[Any, float]]) -> int:
    return len({(sample.kernel, sample.weights) for sample, _ in pairs})


def _main_curves(one: Comparison) -> list[Curve]:
    """The curves of the operator with most formats."""
    by_op = grouped(one.curves, lambda curve: curve.op)
    return max(
        by_op.values(), key=lambda of: (len({c.weights for c in of}), len(of)), default=[]
    )  # fmt: skip


def _format_speed(curves: Sequence[Curve]) -> _Panel | None:
    if not curves:
        return None
    found = grouped(curves, lambda curve: (curve.weights, curve.kernel))
    by_kind = {_format_name(of): of for of in found.values()}
    series = {
        name: [dot for curve in of for dot in zip(curve.loads, curve.speedups, strict=True)]
        for name, of in by_kind.items()
    }
    return _Panel(
        series,
        f"{curves[0].op}: weight formats over bf16",
        "speed over bf16",
        curves[0].axis,
        {name: _COLOURS.get(of[0].weights, PALETTE[7]) for name, of in by_kind.items()},
        {},
        [(1.0, "-")],
    )


def _format_name(of: Sequence[Curve]) -> str:
    at = _middle_until(of)
    until = "" if at is None else f", faster to {at:.3g}"
    return f"{of[0].weights} ({of[0].kernel}){until}"


def _mark_crossovers(panel: Any, curves: Sequence[Curve]) -> None:
    """A line at the middle crossover of each format."""
    for of in grouped(curves, lambda curve: (curve.weights, curve.kernel)).values():
        at = _middle_until(of)
        if at is not None:
            colour = _COLOURS.get(of[0].weights, PALETTE[7])
            panel.axvline(at, color=colour, linestyle="--", linewidth=1.2)


def _middle_until(of: Sequence[Curve]) -> float | None:
    """None when most curves end faster, or never are."""
    known = [c.crossover.until for c in of if c.crossover.until is not None]
    return median_low(known) if 2 * len(known) > len(of) else None


def _draw(axes: Any, panel: _Panel | None, otherwise: str) -> None:
    if panel is None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, otherwise, ha="center", va="center", transform=axes.transAxes)
        return
    for level, line in panel.levels:
        axes.axhline(level, color="black", linestyle=line, linewidth=1)
    for index, (name, dots) in enumerate(panel.series.items()):
        style = {"color": panel.colours[name], "marker": _MARKERS[index % len(_MARKERS)]}
        axes.scatter(*zip(*dots, strict=True), s=7, alpha=0.25, linewidths=0, **style)
        line = panel.lines.get(name, "-")
        axes.plot(*_means(dots), linestyle=line, markersize=5, label=name, **style)
    axes.set(xscale="log", title=panel.title, xlabel=panel.axis, ylabel=panel.y_label)
    every = [dot for dots in panel.series.values() for dot in dots]
    _load_ticks(axes, [x for x, _ in every])
    if panel.log:
        _log_side(axes, [y for _, y in every])
    else:
        axes.set_ylim(0.0, max(1.0, *(y for _, y in every)) * 1.05)
    axes.grid(visible=True, which="major", **_GRID)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.13))


def _means(dots: Dots) -> tuple[list[float], list[float]]:
    """Geometric mean of all within half a power of two, at the mean of their loads."""
    near = grouped(dots, lambda dot: round(math.log2(dot[0])))
    means = [
        (geometric_mean(x for x, _ in near[at]), geometric_mean(y for _, y in near[at]))
        for at in sorted(near)
    ]
    return [x for x, _ in means], [y for _, y in means]


def _load_ticks(axes: Any, loads: Sequence[float]) -> None:
    """Powers of two, in plain figures."""
    low, high = (round(math.log2(end)) for end in (min(loads), max(loads)))
    step = max(1, -(-(high - low) // 8))
    ticks = [2.0**power for power in range(low, high + 1, step)]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
    axes.minorticks_off()


def _log_side(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic side with ticks at 1, 2 and 5 of each power of ten, in plain figures."""
    least, most = min(*values, CLOSE), max(*values, 1.0)
    axes.set_yscale("log")
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    ticks = [digit * 10.0**power for power in decades for digit in (1, 2, 5)]
    shown = [y for y in ticks if least / 1.2 <= y <= most * 1.2]
    axes.set_yticks(shown, [f"{y:g}" for y in shown], minor=False)
    axes.set_ylim(least / 1.1, most * 1.1)
    axes.minorticks_off()
