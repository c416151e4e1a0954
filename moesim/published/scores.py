"""Predicted against measured for published runs of offloading engines: errors and orders.

A sweep is three rows or more of one block and metric that differ in one thing; a model that is off
by a constant factor still serves a planner when it puts them in the right order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hwmodels.calibration import Score, score_of
from hwmodels.errors import HardwareError
from moesim.errors import SimulationError
from moesim.published.engines import engine
from moesim.published.fit import in_fit
from moesim.published.predict import predicted
from moesim.published.rows import OffloadRow, OffloadRows

Floats = npt.NDArray[np.float64]
LEAST_IN_SWEEP = 3


@dataclass(frozen=True, slots=True)
class Predicted:
    """Rows with their predictions, float64[rows] in the rows' units, and what was left out, why."""

    rows: tuple[OffloadRow, ...]
    values: Floats
    skipped: Mapping[str, tuple[str, ...]]

    @property
    def errors(self) -> Floats:
        """(predicted - measured) / measured, float64[rows]."""
        return np.asarray(self.values / np.array([row.measured for row in self.rows]) - 1)


@dataclass(frozen=True, slots=True)
class Sweep:
    """Rows that differ in one thing, and Kendall's tau-b of predicted against measured."""

    name: str
    rows: tuple[str, ...]
    kendall_tau: float


@dataclass(frozen=True, slots=True)
class OffloadScores:
    """Scores of all rows and of groups of them, the sweeps, and rows that the table doubts."""

    overall: Score
    groups: Mapping[str, Score]
    sweeps: tuple[Sweep, ...]
    flagged: Mapping[str, str]


def predict_rows(read: OffloadRows) -> Predicted:
    """Every row that its machine can run.

    raises  SimulationError when none can be priced
    """
    kept, values = list[OffloadRow](), list[float]()
    skipped = {reason: list(names) for reason, names in read.skipped.items()}
    for row in read.rows:
        try:
            value = predicted(row)
        except (HardwareError, SimulationError) as error:
            skipped.setdefault(str(error), []).append(row.name)
            continue
        kept.append(row)
        values.append(value)
    if not kept:
        why = "; ".join(skipped) or "the file has no row of an offloading engine"
        raise SimulationError(f"no run could be priced: {why[:300]}")
    counted = MappingProxyType({reason: tuple(names) for reason, names in skipped.items()})
    return Predicted(tuple(kept), np.array(values), counted)


def score_rows(found: Predicted) -> OffloadScores:
    """Scores over all rows, by what a row has, and the sweeps among them."""
    groups = {}
    for label, of in LABELS.items():
        values = [of(row) for row in found.rows]
        for value in dict.fromkeys(values):
            if value:
                chosen = np.array([v == value for v in values])
                groups[f"{label} {value}".strip()] = score_of(found.errors[chosen])
    flagged = {row.name: row.flag for row in found.rows if row.flag}
    return OffloadScores(score_of(found.errors), groups, sweeps(found), flagged)


def in_required_part(row: OffloadRow) -> bool:
    """Rows of KT/sched, and those of llama.cpp and its fork that use the host."""
    of_llama = row.engine in ("llama.cpp", "ik_llama.cpp")
    return row.block.startswith("KT/sched") or (of_llama and row.offloaded)


def _part(row: OffloadRow) -> str:
    if not in_required_part(row):
        return ""
    return "KT/sched and llama.cpp's offloaded"


def _unseen_part(row: OffloadRow) -> str:
    return f"{_part(row)}, not fitted on" if _part(row) and not in_fit(row) else ""


LABELS: Mapping[str, Callable[[OffloadRow], str]] = MappingProxyType(
    {
        "part": _part,
        "part, unseen": _unseen_part,
        "fit": lambda row: "blocks fitted on" if in_fit(row) else "blocks not fitted on",
        "weights": lambda row: "offloaded" if row.offloaded else "all on the device",
        "unseen": lambda row: "offloaded" if row.offloaded and not in_fit(row) else "",
        "engine": lambda row: row.engine,
        "metric": lambda row: row.metric,
        "block": lambda row: row.block,
    }
)


def sweeps(found: Predicted) -> tuple[Sweep, ...]:
    """Every sweep among the rows, in the order of the table."""
    by_block: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(found.rows):
        by_block.setdefault((row.block, row.metric), []).append(i)
    each = []
    for (block, metric), places in by_block.items():
        for thing in _THINGS:
            for alike in _alike(found.rows, places, thing):
                each.append(_sweep(found, alike, f"{block} {metric} by {thing}"))
    return tuple(each)


def _alike(rows: Sequence[OffloadRow], places: Sequence[int], thing: str) -> list[list[int]]:
    """Rows that differ in a thing and in nothing else, three or more."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i in places:
        rest = tuple(of(rows[i]) for name, of in _THINGS.items() if name != thing)
        groups.setdefault(rest, []).append(i)
    of_thing = _THINGS[thing]
    return [g for g in groups.values() if len({of_thing(rows[i]) for i in g}) >= LEAST_IN_SWEEP]


def _sweep(found: Predicted, places: Sequence[int], name: str) -> Sweep:
    from scipy.stats import kendalltau

    measured = [found.rows[i].measured for i in places]
    tau = float(kendalltau(measured, found.values[list(places)]).statistic)
    return Sweep(name, tuple(found.rows[i].name for i in places), tau)


def _passes(row: OffloadRow) -> int:
    """The micro-batch, where it cuts the prompt."""
    in_all = row.work.tokens * row.work.sequences
    cuts = not engine(row.engine).whole_prompts and in_all > row.work.micro_batch
    return row.work.micro_batch if cuts else 0


def _machine(row: OffloadRow) -> tuple[str, int, str]:
    machine = row.machine
    device, host = machine.device, machine.host
    return (device.name if device else "", machine.n_devices, host.name if host else "")


_THINGS: Mapping[str, Callable[[OffloadRow], object]] = MappingProxyType(
    {
        "tokens": lambda row: row.work.tokens,
        "depth": lambda row: row.work.depth,
        "requests": lambda row: row.work.sequences,
        "micro-batch": _passes,
        "share on the device": lambda row: row.residency.share,
        "graph": lambda row: row.residency.graph,
        "model": lambda row: row.model.name,
        "machine": _machine,
    }
)
