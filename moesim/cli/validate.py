"""`moesim validate`: predicted against measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli import output
from moesim.cli.validate_end_to_end import end_to_end
from moesim.cli.validate_offload import offload
from moesim.cli.validate_offload_rows import offload_rows
from moesim.errors import SimulationError

if TYPE_CHECKING:
    from hwmodels.calibration import Score, Scores
    from moesim.cli.validate_tables import Wish

OUT_OF_TOLERANCE = 1
COLUMNS = ("group", "rows", "median %", "mean %", "p90 %", "bias %", "within 10 %")

app = typer.Typer(no_args_is_help=True, help="Predicted against measured.")
app.command("end-to-end")(end_to_end)
app.command("offload")(offload)
app.command("offload-rows")(offload_rows)


@app.callback()
def validate() -> None:
    """Predicted against measured: median, 90th percentile, per group."""


@app.command()
def kernels(
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            help="Rows in JSON lines or Parquet tables, a file or a folder, or"
            " aiconfigurator:SYSTEM; may be repeated.",
        ),
    ],
    calibration: Annotated[
        Path | None,
        typer.Option(help="Score what this file has not seen; else fit held-out parts."),
    ] = None,
    fit: Annotated[
        list[Path] | None,
        typer.Option("--fit", help="Parquet tables to fit instead; none of --data among them."),
    ] = None,
    shipped: Annotated[
        bool, typer.Option("--shipped", help="Predict tables by the fits that moesim comes with.")
    ] = False,
    apart: Annotated[
        str, typer.Option(help="Of tables: fit here, never to the shape, or model, it predicts.")
    ] = "",
    kernels: Annotated[
        str, typer.Option(help="Of tables: all, or the clean ones that ran tuned and undisturbed.")
    ] = "all",
    seed: Annotated[int, typer.Option(min=0, help="Deals the shapes of rows into parts.")] = 0,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Median error in per cent that still passes.")
    ] = 15.0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 1 when out of tolerance.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option("--output", help="Folder for the result and pictures of tables."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Score predictions against measured rows that no fit has seen.

    Rows of `moesim bench` without a calibration: the shapes are dealt into five parts, and each
    part is predicted by a fit to the other four. Tables alone: by the fits that moesim comes with,
    unless these saw the table; then, or with --apart, in five parts likewise, a kernel and device
    at a time. Fits of tables that are held back (validation-*) never score unasked. Tables with
    --fit, --shipped or --calibration: by the nearest kernel of the nearest device there; the
    answer says when that had seen the rows.
    """
    from moesim.cli.table_inputs import are_tables

    if are_tables([*data, *(fit or [])]):
        from moesim.cli.validate_tables import Wish

        wish = Wish(data, fit or (), calibration, shipped, apart, kernels)
        passed = _of_tables(wish, tolerance, folder, as_json)
    else:
        given = {"--fit": fit, "--shipped": shipped, "--output": folder}
        given |= {"--apart": bool(apart), "--kernels": kernels != "all"}
        _refuse_given(given)
        passed = _of_rows(data, (calibration, seed), tolerance, as_json)
    if strict and not passed:
        raise typer.Exit(OUT_OF_TOLERANCE)


def _of_rows(
    data: list[Path], by: tuple[Path | None, int], tolerance: float, as_json: bool
) -> bool:
    """Score rows in JSON lines by a calibration or, by a seed, against each other; passed."""
    from hwmodels.calibration import cross_validate, load, score
    from hwmodels.calibration_rows import read_rows

    calibration, seed = by
    rows = read_rows(data)
    scores = score(load(calibration), rows) if calibration else cross_validate(rows, seed)
    held_out = "rows not fitted" if calibration else f"shapes in five parts, seed {seed}"
    passed = scores.overall.median_abs_pct_error <= tolerance
    if as_json:
        output.emit_json(document(scores) | {"held_out": held_out, "passed": passed})
    else:
        _show(scores, held_out, _verdict(passed, tolerance))
    return passed


def _of_tables(wish: Wish, tolerance: float, folder: Path | None, as_json: bool) -> bool:
    """Score Parquet tables; passed."""
    from moesim.cli import validate_tables, validate_tables_report

    if folder is not None:
        output.result_folder(folder)
    outcome = validate_tables.run(wish)
    found = validate_tables_report.document(outcome)
    passed = bool(found["median_abs_pct_error"] <= tolerance)
    found |= {"passed": passed, "tolerance_pct": tolerance}
    if as_json:
        output.emit_json(found)
    else:
        validate_tables_report.show(outcome, _verdict(passed, tolerance))
    if folder is not None:
        from moesim.report.fit_pictures import fit_pictures

        validate_tables_report.write(found, folder)
        pictures = fit_pictures(outcome.predicted, folder)
        output.note(f"wrote result.json, table.csv and {len(pictures)} pictures into {folder}")
    return passed


def _refuse_given(given: Mapping[str, object]) -> None:
    for flag, value in given.items():
        if value:
            raise SimulationError(f"{flag} is for Parquet tables; --data holds rows in JSON lines")


def _verdict(passed: bool, tolerance: float) -> str:
    return f"{'within' if passed else 'out of'} {tolerance:g} % (median)"


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
