"""What `moesim simulate` says: tables for the terminal and rows for a file."""

from __future__ import annotations

from typing import Any

from moesim.cli import output

CSV_COLUMNS = ("placement", "component", "seconds", "share")

_FIGURES = (  # what it is called, its key, the key of its kind, factor
    ("tokens/s", "tokens_per_s", "tokens_per_s", 1.0),
    ("slowest step, ms", "slowest_step_s", "seconds", 1e3),
    ("USD per million tokens", "usd_per_million_tokens", "usd_per_million_tokens", 1.0),
    ("joules per token", "joules_per_token", "joules_per_token", 1.0),
    ("busiest rank over mean", "max_over_mean", "max_over_mean", 1.0),
)


def csv_rows(document: dict[str, Any]) -> list[tuple[object, ...]]:
    """A row per placement and component: seconds per step, and its share of the step."""
    return [
        (name, component, seconds, seconds / document["step_time_s"][name])
        for name, parts in document["breakdown_s"].items()
        for component, seconds in parts.items()
    ]


def show(document: dict[str, Any]) -> None:
    """The record for people: time by component, then figures with how each is known."""
    inputs, names = document["inputs"], list(document["step_time_s"])
    output.table(
        f"{inputs['model']} on {inputs['system']}, {inputs['slots']} slots, {inputs['phase']} of"
        f" {inputs['tokens_per_rank']} tokens per rank, {document['steps']} steps",
        ["ms per step", *(column for name in names for column in (name, "%"))],
        _time_rows(document, names),
    )
    output.table(
        "figures, means over steps", ["figure", *names, "known"], _figure_rows(document, names)
    )


def _time_rows(document: dict[str, Any], names: list[str]) -> list[tuple[object, ...]]:
    """A row per component that takes time and one for the step: ms and percent of it."""
    parts, totals = document["breakdown_s"], document["step_time_s"]
    components = [c for c in parts[names[0]] if any(parts[name][c] for name in names)]
    rows = [(c, {name: parts[name][c] for name in names}) for c in components]
    return [
        (
            title,
            *(
                cell
                for name in names
                for cell in (seconds[name] * 1e3, f"{seconds[name] / totals[name]:.1%}")
            ),
        )
        for title, seconds in [*rows, ("step", totals)]
    ]


def _figure_rows(document: dict[str, Any], names: list[str]) -> list[tuple[object, ...]]:
    """A row per figure: its value under each placement, and how it is known."""
    kinds = document["kinds"]
    rows = [
        (title, *(_times(document[key][name], factor) for name in names), kinds[kind])
        for title, key, kind, factor in _FIGURES
    ]
    moved = document["bytes_per_token"]
    for title, side in (("kB/token in nodes", "up"), ("kB/token between nodes", "out")):
        sent = (moved[name][side] / 1e3 for name in names)
        rows.append((title, *sent, kinds["bytes_per_token"]))
    return rows


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
