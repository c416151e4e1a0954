"""`moesim validate`: predicted against measured."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli import output

if TYPE_CHECKING:
    from hwmodels.calibration import Score, Scores

OUT_OF_TOLERANCE = 1
COLUMNS = ("group", "rows", "median %", "mean %", "p90 %", "bias %", "within 10 %")

app = typer.Typer(no_args_is_help=True, help="Predicted against measured.")


@app.callback()
def validate() -> None:
    """Predicted against measured: median, 90th percentile, per group."""


@app.command()
def kernels(
    data: Annotated[
        list[Path], typer.Option("--data", help="Rows, a file or a folder; may be repeated.")
    ],
    calibration: Annotated[
        Path | None,
        typer.Option(help="Score the rows this file was not fitted to; else fit held-out parts."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Deals the shapes into parts.")] = 0,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Median error in per cent that still passes.")
    ] = 15.0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 1 when out of tolerance.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Score predictions against measured rows that no fit has seen.

    Without a calibration the shapes are dealt into five parts, and each part is predicted by a fit
    to the other four.
    """
    from hwmodels.calibration import cross_validate, load, score
    from hwmodels.calibration_rows import read_rows

    rows = read_rows(data)
    scores = score(load(calibration), rows) if calibration else cross_validate(rows, seed)
    held_out = "rows not fitted" if calibration else f"shapes in five parts, seed {seed}"
    passed = scores.overall.median_abs_pct_error <= tolerance
    if as_json:
        output.emit_json(document(scores) | {"held_out": held_out, "passed": passed})
    else:
        _show(scores, held_out, f"{'within' if passed else 'out of'} {tolerance:g} % (median)")
    if strict and not passed:
        raise typer.Exit(OUT_OF_TOLERANCE)


def document(scores: Scores) -> dict[str, Any]:
    """The keys that scripts rely on; `skipped` counts, `skipped_why` says for what reason."""
    return asdict(scores.overall) | {
        "skipped": sum(scores.skipped.values()),
        "skipped_why": dict(scores.skipped),
        "groups": {name: asdict(of_group) for name, of_group in scores.groups.items()},
    }


def _show(scores: Scores, held_out: str, verdict: str) -> None:
    lines = [_line(name, of_group) for name, of_group in scores.groups.items()]
    table = [*lines, _line("all", scores.overall)]
    output.table(f"Predicted against measured ({held_out})", COLUMNS, table)
    for reason, count in scores.skipped.items():
        output.say(f"skipped, {reason.replace('_', ' ')}: {count}")
    output.say(verdict)


def _line(name: str, of: Score) -> list[object]:
    return [
        name, of.rows, of.median_abs_pct_error, of.mean_abs_pct_error, of.p90_abs_pct_error,
        of.bias_pct, 100 * of.within_10_pct,
    ]  # fmt: skip
