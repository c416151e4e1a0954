"""What `moesim bench` says of its rows: kernels against each other, the roofline, formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli import output

if TYPE_CHECKING:
    from moesim.report.kernel_comparison import Comparison, KernelScore, Reach
    from moesim.report.kernel_formats import FormatScore

TABLE_FILE, PICTURE_FILE = "kernels.csv", "kernels.png"
_COLUMNS = (
    "device", "software", "revision", "operator", "axis", "load", "shape", "routing", "weights",
    "activations", "group", "threads", "kernel", "us", "bytes", "flops", "share of roofline",
    "speed over others",
)  # fmt: skip


def compare_rows(out: Path) -> tuple[list[Comparison], Mapping[str, int]]:
    """A comparison for each run whose rows are in a folder; rows left out, by reason.

    raises  HardwareError for a row that is none
    """
    from hwmodels.calibration_rows import read_models
    from moesim.report.kernel_comparison import compare
    from moesim.report.kernel_samples import samples_of

    found = samples_of(read_models([out]))
    return compare(found.samples), found.left_out


def write_files(compared: list[Comparison], out: Path) -> None:
    """All compared rows as a table, and the picture of them."""
    from moesim.report.kernel_pictures import kernel_pictures

    rows = [row for one in compared for row in _csv_rows(one)]
    output.write_csv(out / TABLE_FILE, _COLUMNS, rows)
    kernel_pictures(compared, out / PICTURE_FILE)


def document(compared: list[Comparison], left_out: Mapping[str, int]) -> dict[str, Any]:
    """The keys that scripts rely on; `runs` has one entry for each device and its software."""
    return {"runs": [_run_document(one) for one in compared], "left_out": dict(left_out)}


def show(compared: list[Comparison], left_out: Mapping[str, int]) -> None:
    """Three tables a run, and what was left out."""
    for one in compared:
        output.say(one.run.name + _details(one))
        _show_kernels(one)
        _show_roofline(one)
        _show_formats(one)
    for reason, count in sorted(left_out.items(), key=lambda item: -item[1]):
        output.say(f"rows left out, {reason}: {count}")


def _run_document(one: Comparison) -> dict[str, Any]:
    from moesim.report.kernel_comparison import kernel_scores, reaches
    from moesim.report.kernel_formats import format_scores
    from moesim.report.kernel_samples import RANGES

    formats = [asdict(score) for score in format_scores(one.curves)]
    return {
        "device": one.run.device,
        "software": dict(one.run.software),
        "revisions": one.revisions,
        "rows": len(one.rows),
        "throttled": one.throttled,
        "roofs": [asdict(roof) for roof in one.roofs],
        "kernels": [asdict(score) for score in kernel_scores(one.peers)],
        "roofline": [asdict(reach) for reach in reaches(one.rows, one.fractions)],
        "formats": [
            of | {"speedup": dict(zip(RANGES, of["speedup"], strict=True))} for of in formats
        ],
        "crossovers": [
            {
                "operator": curve.op, "weights": curve.weights, "kernel": curve.kernel,
                "base_kernel": curve.base_kernel, "axis": curve.axis, "shape": curve.fixed,
                "routing": curve.dist, "loads": curve.loads, "speedups": curve.speedups,
                **asdict(curve.crossover),
            }
            for curve in one.curves
        ],
    }  # fmt: skip


def _csv_rows(one: Comparison) -> list[list[object]]:
    against = {id(peer.sample): peer.over_others for peer in one.peers}
    software = ", ".join(f"{name} {version}" for name, version in one.run.software)
    return [
        [
            one.run.device, software, s.revision, s.op, s.axis, s.load, s.fixed, s.dist, s.weights,
            s.activations, s.group, s.threads or None, s.kernel, s.seconds * 1e6, s.n_bytes,
            s.flops, share, against.get(id(s)),
        ]
        for s, share in zip(one.rows, one.fractions, strict=True)
    ]  # fmt: skip


def _details(one: Comparison) -> str:
    revisions = f"; revisions {', '.join(one.revisions)}" if len(one.revisions) > 1 else ""
    throttled = f"; {one.throttled} rows while throttled" if one.throttled else ""
    return f": {len(one.rows)} rows compared{revisions}{throttled}"


def _show_kernels(one: Comparison) -> None:
    from moesim.report.kernel_comparison import CLOSE, kernel_scores

    if not one.peers:
        output.say("kernels against each other: no point was measured with two")
        return
    output.table(
        "Kernels against each other (speed; geometric mean over points with more than one)",
        ("operator", "weights", "kernel", "points", "of the best", "over best other",
         f"points at {CLOSE:g}x of it", "worst", "at load"),
        [_kernel_line(score) for score in kernel_scores(one.peers)],
        left=3,
    )  # fmt: skip


def _kernel_line(score: KernelScore) -> list[object]:
    return [
        score.op, score.weights, score.kernel, score.points, score.of_best, score.over_others,
        f"{score.close_share:.0%}", score.worst, score.worst_load,
    ]  # fmt: skip


def _show_roofline(one: Comparison) -> None:
    from moesim.report.kernel_comparison import reaches
    from moesim.report.kernel_samples import RANGES, grouped

    found = reaches(one.rows, one.fractions)
    by_kernel = grouped(found, lambda reach: (reach.op, reach.weights, reach.kernel))
    output.table(
        f"Share of the measured roofline, median (best), by load; {_roof_text(one)}",
        ("operator", "weights", "kernel", *RANGES),
        [[*key, *_reach_cells(of)] for key, of in by_kernel.items()],
        left=3,
    )


def _reach_cells(of: list[Reach]) -> list[object]:
    from moesim.report.kernel_samples import RANGES

    by_range = {reach.load: f"{reach.median:.2f} ({reach.best:.2f})" for reach in of}
    return [by_range.get(name) for name in RANGES]


def _roof_text(one: Comparison) -> str:
    """The peaks of all threads, or of the device; "*" where only the rows themselves tell."""
    from hwmodels.units import format_quantity

    top = max(one.roofs, key=lambda roof: roof.bytes_per_s)
    figures = [("memory", format_quantity(top.bytes_per_s, "B/s"))]
    figures += [(d, format_quantity(top.flop_per_s[d], "FLOP/s")) for d in sorted(top.flop_per_s)]
    shown = [f"{name} {text}{'*' * (name in top.best_seen)}" for name, text in figures]
    return ", ".join(shown) + (" (* best of these rows)" if top.best_seen else "")


def _show_formats(one: Comparison) -> None:
    from moesim.report.kernel_formats import format_scores
    from moesim.report.kernel_samples import RANGES

    if not one.curves:
        output.say("weight formats: none was measured beside bf16")
        return
    output.table(
        "Weight formats over bf16 (speed, by load), and the load up to which they are faster",
        ("operator", "weights", "kernel", "curves", *RANGES, "faster up to", "least", "most",
         "never", "to the end"),
        [_format_line(score) for score in format_scores(one.curves)],
        left=3,
    )  # fmt: skip


def _format_line(score: FormatScore) -> list[object]:
    return [
        score.op, score.weights, score.kernel, score.curves, *score.speedup, _until_text(score),
        score.least, score.most, score.never, score.open_ended,
    ]  # fmt: skip


def _until_text(score: FormatScore) -> str:
    """The middle curve's crossover: never, past the largest load, or where."""
    from moesim.report.kernel_formats import NEVER

    if score.verdict == NEVER:
        return NEVER
    until = f"> {score.most_load:g}" if score.until is None else f"{score.until:.3g}"
    return until if score.since is None else f"{until}, from {score.since:.3g}"
