"""`moesim calibrate`: measured rows into the constants of a device."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesim.cli import output

if TYPE_CHECKING:
    from hwmodels.calibration import Calibration

COLUMNS = (
    "operator", "weights", "threads", "variant", "rows", "fixed us", "GB/s", "of stream", "GFLOP/s",
)  # fmt: skip
MEMORY_OPS = ("cpu_", "stream")  # operators whose bytes come from main memory


def calibrate(
    data: Annotated[
        list[Path], typer.Option("--data", help="Rows, a file or a folder; may be repeated.")
    ],
    out: Annotated[Path, typer.Option("--output", "-o", help="The calibration, JSON.")] = Path(
        "calibration.json"
    ),
    hold_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the shapes kept apart as a check.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Decides which shapes are kept apart.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Fit fixed seconds, bandwidth and compute rate of every operator that was measured."""
    from hwmodels.calibration import calibrate as fit
    from hwmodels.calibration import save
    from hwmodels.calibration_rows import read_rows

    output.check_target(out)
    fitted = fit(read_rows(data), hold_out, seed)
    save(fitted, out)
    if as_json:
        output.emit_json(
            {
                "file": out,
                "device": fitted.device,
                "groups": len(fitted.groups),
                "fitted_rows": len(fitted.fitted),
                "held_out": asdict(fitted.held_out) if fitted.held_out else None,
            }
        )
        return
    _show(fitted, out)


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
