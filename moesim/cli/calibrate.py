"""`moesim calibrate`: measured rows or tables into what is fitted of a device."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesim.cli import output
from moesim.errors import SimulationError

if TYPE_CHECKING:
    from hwmodels.calibration import Calibration

COLUMNS = (
    "operator", "weights", "threads", "variant", "rows", "fixed us", "GB/s", "of stream", "GFLOP/s",
)  # fmt: skip
MEMORY_OPS = ("cpu_", "stream")  # operators whose bytes come from main memory


ROWS_FILE = Path("calibration.json")


def calibrate(
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            help="Rows in JSON lines or Parquet tables, a file or a folder, or"
            " aiconfigurator:SYSTEM; may be repeated.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Of rows, a JSON file (calibration.json); of tables, a .npz file, or a folder"
            " when they are of several devices.",
        ),
    ] = None,
    hold_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Of rows: share of the shapes kept as a check.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Decides which shapes of rows are kept.")] = 0,
    no_check: Annotated[
        bool,
        typer.Option("--no-check", help="Of tables: no fit without a part, which takes longest."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Fit measured operators.

    Rows of `moesim bench` give fixed seconds, bandwidth and compute rate of every operator. Public
    Parquet tables give a formula and trees for every kernel, one file a device, with the error on
    shapes that were kept apart.
    """
    from moesim.cli.table_inputs import are_tables

    if are_tables(data):
        from moesim.cli import calibrate_tables

        done = calibrate_tables.calibrate_tables(data, out, not no_check)
        if as_json:
            output.emit_json(calibrate_tables.document(done))
        else:
            calibrate_tables.show(done)
        return
    if no_check:
        raise SimulationError("--no-check is for Parquet tables; rows take --hold-out 0")
    _of_rows(data, out or ROWS_FILE, (hold_out, seed), as_json)


def _of_rows(data: list[Path], out: Path, apart: tuple[float, int], as_json: bool) -> None:
    """Fit rows in JSON lines; apart, the share of the shapes kept as a check and their seed."""
    from hwmodels.calibration import calibrate as fit
    from hwmodels.calibration import save
    from hwmodels.calibration_rows import read_rows

    output.check_target(out)
    fitted = fit(read_rows(data), *apart)
    save(fitted, out)
    if not as_json:
        _show(fitted, out)
        return
    output.emit_json(
        {
            "file": out,
            "device": fitted.device,
            "groups": len(fitted.groups),
            "fitted_rows": len(fitted.fitted),
            "held_out": asdict(fitted.held_out) if fitted.held_out else None,
        }
    )


def _show(fitted: Calibration, out: Path) -> None:
    output.table(f"{fitted.device}, in {out}", COLUMNS, _table(fitted), left=4)
    if check := fitted.held_out:
        output.say(
            f"{check.rows} rows of shapes that were kept apart: median error"
            f" {check.median_abs_pct_error:.1f} %, 90th percentile {check.p90_abs_pct_error:.1f} %"
        )


def _table(fitted: Calibration) -> list[list[object]]:
    stream = fitted.stream_bytes_per_s()
    rows: list[list[object]] = []
    for (_, op, _, weights, _, threads, variant), group in sorted(fitted.groups.items()):
        constants = group.constants
        memory = constants.get("bytes_per_s", constants.get("one_row_bytes_per_s", 0.0))
        compute = constants.get("flop_per_s", constants.get("one_row_flop_per_s"))
        rows.append(
            [
                op, weights, threads, variant, group.n_rows, constants["fixed_s"] * 1e6,
                memory / 1e9, memory / stream if stream and op.startswith(MEMORY_OPS) else None,
                compute / 1e9 if compute else None,
            ]
        )  # fmt: skip
    return rows
