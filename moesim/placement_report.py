"""What a placement study says: the JSON document, the plan file and the pictures."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hwmodels.system import System
from moesim import __version__
from moesim.placement_study import INCUMBENTS, Balance, Study, StudyOptions
from planners.judge import Gain
from planners.plan import rank_loads
from planners.planfile import PlanFile, layers_of
from traces.model import ModelSpec
from traces.routing import ExpertCounts, RoutingTrace, expert_counts

Document = dict[str, Any]
Input = RoutingTrace | ExpertCounts


def study_document(study: Study, inputs: Mapping[str, Any]) -> Document:
    """The record of a study; figures are means over layers, on the judged part.

    Every key that scripts rely on is at the top level: max_over_mean, step_time_s, lower_bound,
    gap, verdict, solve_seconds.
    """
    names = [*INCUMBENTS, *(("current",) if "current" in study.placements else ()), "plan"]
    balance = study.balance
    document: Document = {
        "max_over_mean": {n: float(balance.by_placement[n].mean()) for n in names},
        "step_time_s": {n: float(study.results[n].seconds.mean()) for n in names},
        "lower_bound": float(balance.bound.mean()),
        "gap": balance.gap,
        "verdict": study.verdict,
        "solve_seconds": study.solve_s,
        "compared_with": study.current,
        "gain": {name: _gain(gain) for name, gain in study.gains.items()},
        "gain_on_planned_part": _gain(study.planned_gain),
        "gain_surviving_share": surviving_share(study),
        "judged_on": study.judged_on,
        "not_priced": list(study.not_priced),
        "node_limited": _balance(study.node_limited),
        "migration": _migration(study),
        "tokens_per_s": {n: study.results[n].tokens_per_s for n in names},
        "step_max_over_mean": {n: float(study.results[n].max_over_mean.mean()) for n in names},
        "breakdown_s": {n: dict(study.results[n].breakdown_s) for n in names},
        "bytes_per_token": {n: dict(study.results[n].bytes_per_token) for n in names},
        "usd_per_million_tokens": {n: study.results[n].usd_per_million_tokens for n in names},
        "joules_per_token": {n: study.results[n].joules_per_token for n in names},
        "per_layer": {
            "max_over_mean": {n: balance.by_placement[n].tolist() for n in names},
            "max_over_mean_planned_part": balance.planned.tolist(),
            "lower_bound": balance.bound.tolist(),
        },
        "kinds": dict(study.results["plan"].kinds),
        "inputs": dict(inputs),
        "versions": versions(),
    }
    return document


def surviving_share(study: Study) -> float | None:
    """Judged gain over planned gain against what runs today; None when there was none."""
    planned = study.planned_gain.mean
    return None if planned <= 0 else study.gains[study.current].mean / planned


def versions() -> dict[str, str]:
    """What made the figures."""
    return {"moesim": __version__, "python": platform.python_version(), "numpy": np.__version__}


def plan_file(
    study: Study, model: ModelSpec, system: System, options: StudyOptions, document: Document
) -> PlanFile:
    """The neutral plan of a study, with the figures it promises."""
    plan = study.placements["plan"]
    promised = ("max_over_mean", "step_time_s", "lower_bound", "gap", "gain", "judged_on")
    return PlanFile(
        model=model.name,
        n_experts=model.n_experts,
        top_k=model.top_k,
        expert_parallel_size=plan.n_ranks,
        ranks_per_node=plan.ranks_per_node,
        n_slots=plan.n_slots,
        layers=layers_of(plan, model.moe_layers, model.n_layers),
        inputs={**document["inputs"], "system": system.name},
        figures={key: document[key] for key in promised},
        verdict=study.verdict,
        versions=document["versions"],
        seed=options.seed,
    )


def write_pictures(study: Study, judged: Input, folder: Path) -> list[Path]:
    """Load heat maps before and after, and where the step's time goes, as PNG files."""
    from moesim.report.breakdown import step_breakdown
    from moesim.report.heatmap import rank_load_heatmaps

    counts = judged if isinstance(judged, ExpertCounts) else expert_counts(judged)
    shown = [study.current, *(n for n in ("eplb_global", "plan") if n != study.current)]
    loads = {name: rank_loads(study.placements[name], counts.counts) for name in shown}
    heat, bars = folder / "rank_load.png", folder / "step_time.png"
    rank_load_heatmaps(loads, heat, judged.layers)
    step_breakdown({n: dict(r.breakdown_s) for n, r in study.results.items()}, bars)
    return [heat, bars]


def _gain(gain: Gain) -> Document:
    return {"mean": gain.mean, "low": gain.low, "high": gain.high, "steps": gain.n_steps}


def _balance(balance: Balance | None) -> Document | None:
    if balance is None:
        return None
    return {
        "max_over_mean": float(balance.by_placement["plan"].mean()),
        "max_over_mean_planned_part": float(balance.planned.mean()),
        "lower_bound": float(balance.bound.mean()),
        "gap": balance.gap,
    }


def _migration(study: Study) -> Document:
    return {
        "from": study.current,
        "moved_slots": study.migration.moved_slots,
        "bytes": study.migration.n_bytes,
        "seconds": study.migration_s,
        "steps_to_pay_back": study.steps_to_pay_back,
    }
