"""`moesim validate offload-rows`: published runs of offloading engines, predicted and measured."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli import output

if TYPE_CHECKING:
    from moesim.published.scores import OffloadScores, Predicted

COLUMNS = ("group", "rows", "median %", "mean %", "p90 %", "bias %", "within 10 %")
SWEEP_COLUMNS = ("sweep", "rows", "Kendall tau")


def offload_rows(
    data: Annotated[Path, typer.Option("--data", help="CSV table of published runs, in words.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Score rates of KTransformers, llama.cpp and ik_llama.cpp against a model of their layers.

    Each engine has a few constants for all its rows, fitted on some blocks of the table; blocks
    that no fit has seen are a group of their own. A sweep is three rows or more that differ in one
    thing, with Kendall's tau of the predicted order.
    """
    from moesim.published.rows import read_offload_rows
    from moesim.published.scores import predict_rows, score_rows

    found = predict_rows(read_offload_rows(data))
    scores = score_rows(found)
    if as_json:
        output.emit_json(document(found, scores))
    else:
        _show(found, scores)


def document(found: Predicted, scores: OffloadScores) -> dict[str, Any]:
    """The keys that scripts rely on; `skipped` counts, `skipped_why` names the rows by reason."""
    return asdict(scores.overall) | {
        "skipped": sum(len(names) for names in found.skipped.values()),
        "skipped_why": {reason: list(names) for reason, names in found.skipped.items()},
        "flagged": dict(scores.flagged),
        "groups": {name: asdict(of_group) for name, of_group in scores.groups.items()},
        "sweeps": [
            {"sweep": sweep.name, "rows": list(sweep.rows), "kendall_tau": sweep.kendall_tau}
            for sweep in scores.sweeps
        ],
        "predictions": [
            {
                "id": row.name,
                "block": row.block,
                "metric": row.metric,
                "measured": row.measured,
                "predicted": float(value),
            }
            for row, value in zip(found.rows, found.values, strict=True)
        ],
    }


def _show(found: Predicted, scores: OffloadScores) -> None:
    groups = [_line(name, of) for name, of in scores.groups.items()]
    table = [*groups, _line("all", scores.overall)]
    output.table("Rates of offloading engines against measured", COLUMNS, table)
    lines = [[sweep.name, len(sweep.rows), f"{sweep.kendall_tau:.3f}"] for sweep in scores.sweeps]
    output.table("Order within sweeps", SWEEP_COLUMNS, lines)
    for name, why in scores.flagged.items():
        output.say(f"doubted by the table, scored all the same: {name}, {why}")
    for reason, names in found.skipped.items():
        output.say(f"skipped, {reason}: {len(names)} ({', '.join(names[:6])})")


def _line(name: str, of: Any) -> list[object]:
    return [
        name, of.rows, of.median_abs_pct_error, of.mean_abs_pct_error, of.p90_abs_pct_error,
        of.bias_pct, 100 * of.within_10_pct,
    ]  # fmt: skip
