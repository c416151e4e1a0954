"""`moesim validate end-to-end`: time per output token of measured serving runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli import output
from moesim.errors import SimulationError

if TYPE_CHECKING:
    from hwmodels.fitted.store import FittedDevice
    from moesim.validate import EndToEnd, EndToEndScore

COLUMNS = ("group", "rows", "median %", "mean %", "p90 %", "bias %", "within 10 %")


def end_to_end(
    data: Annotated[Path, typer.Option("--data", help="CSV table of measured serving runs.")],
    fitted: Annotated[
        str,
        typer.Option(help="Operators that price the runs: a device whose fit ships, or a file."),
    ] = "h100",
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for a picture and the record.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Score the time per output token of serving runs that nothing was fitted to.

    A run is priced as a decode pass of its operators plus the prompts that are computed beside it,
    all by the fit of one device on the datasheet of the run's. A table of published runs in words
    is scored as `validate offload-rows` does.
    """
    if _in_words(data):
        from moesim.cli.validate_offload_rows import offload_rows

        offload_rows(data, as_json)
        return
    from moesim.serving_rows import read_serving
    from moesim.validate import predict_serving, score_serving

    folder = output.result_folder(out) if out else None
    found = predict_serving(read_serving(data), _fitted(fitted))
    score = score_serving(found)
    record = document(found, score)
    if folder:
        from moesim.report.serving_picture import serving_picture

        output.write_json(folder / "result.json", record)
        serving_picture(found, folder / "predicted_over_measured.png")
    if as_json:
        output.emit_json(record)
    else:
        _show(found, score)


def _in_words(data: Path) -> bool:
    """Whether a table describes hardware and policy in text columns."""
    with data.open(encoding="utf-8", errors="replace") as file:
        columns = file.readline(1 << 16).split(",")
    return {"hardware", "policy", "metric", "value"} <= {name.strip() for name in columns}


def document(found: EndToEnd, score: EndToEndScore) -> dict[str, Any]:
    """The keys that scripts rely on; `skipped` counts, `skipped_why` says for what reason."""
    return asdict(score.overall) | {
        "rank_correlation": score.rank_correlation,
        "steady_rank_correlation": score.steady_rank_correlation,
        "skipped": sum(found.skipped.values()),
        "skipped_why": dict(found.skipped),
        "fitted_on": found.fitted_on,
        "extrapolated": found.extrapolated,
        "groups": {name: asdict(of_group) for name, of_group in score.groups.items()},
    }


def _fitted(name: str) -> FittedDevice:
    from hwmodels.fitted.store import load, shipped, shipped_names

    if name.endswith(".npz"):
        return load(Path(name))
    found = shipped(name)
    if found is None:
        known = ", ".join(shipped_names()) or "none"
        raise SimulationError(f"--fitted {name}: no fit ships of this device, known: {known}")
    return found


def _show(found: EndToEnd, score: EndToEndScore) -> None:
    table = [_line(name, of) for name, of in score.groups.items()] + [_line("all", score.overall)]
    title = f"Time per output token against measured (operators fitted on {found.fitted_on})"
    output.table(title, COLUMNS, table)
    output.say(f"rank correlation: {score.rank_correlation:.3f}")
    steady = score.steady_rank_correlation
    output.say(f"the same of runs that decoded longer than they waited: {steady:.3f}")
    output.say(f"extrapolated, on another device than {found.fitted_on}: {found.extrapolated}")
    for reason, count in found.skipped.items():
        output.say(f"skipped, {reason}: {count}")


def _line(name: str, of: Any) -> list[object]:
    return [
        name, of.rows, of.median_abs_pct_error, of.mean_abs_pct_error, of.p90_abs_pct_error,
        of.bias_pct, 100 * of.within_10_pct,
    ]  # fmt: skip
