"""A placement study: plan on one part of the evidence, judge on another, beside the incumbents.

`placement_study` is what `moesim plan placement` runs. Every placement is judged on the same
steps; what was planned on is judged too, to say how much of the gain survives.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from hwmodels.system import System
from moesim.errors import SimulationError
from moesim.lower.layer_costs import StepOptions
from moesim.simulate import Result, Setting, simulate_counts, simulate_steps
from planners.bounds import busiest_rank_bound, node_limited_bound
from planners.dispatch import Routing
from planners.drift import Drift
from planners.incumbents import (
    Shape,
    contiguous,
    eplb_global,
    eplb_hierarchical,
    round_robin,
)
from planners.judge import Gain, Verdict, paired_gain, verdict
from planners.layer import Search
from planners.migration import Migration, align, migration
from planners.placement import Evidence, PlacementOptions, plan_placement
from planners.plan import Placement, max_over_mean, rank_loads
from planners.step_time import default_precision, laws_for
from traces.batches import steps
from traces.model import ModelSpec
from traces.routing import ExpertCounts, RoutingTrace, expert_counts

FloatArray = npt.NDArray[np.float64]
Input = RoutingTrace | ExpertCounts

INCUMBENTS = ("contiguous", "round_robin", "eplb_hierarchical", "eplb_global")


@dataclass(frozen=True, slots=True)
class StudyOptions:
    """How to plan and judge.

    n_slots        physical slots of a layer over all ranks
    step           how a step runs (tokens per rank, phase, what travels)
    node_limited   keep every expert group inside one node
    keep_balance   see PlacementOptions
    drift          how far expert loads move until the plan is used
    current        what runs today: the name of an incumbent, or a placement
    least_gain     share of step time the plan must save, at the low end of the error bar
    most_steps     steps judged
    """

    n_slots: int
    step: StepOptions
    node_limited: bool = False
    keep_balance: bool | None = None
    drift: Drift = Drift()
    current: str | Placement = "contiguous"
    least_gain: float = 0.01
    most_steps: int = 32
    search: Search = field(default_factory=Search)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Balance:
    """Max over mean load per layer, float64[moe_layers] each, and the bound.

    by_placement  of every placement, on the judged part
    planned       of the plan on what it was planned on
    bound         least possible on what was planned on, any placement of the plan's form
    """

    by_placement: Mapping[str, FloatArray]
    planned: FloatArray
    bound: FloatArray

    @property
    def gap(self) -> float:
        """How far the plan is above the bound, mean over layers, as a share of the bound."""
        return float(self.planned.mean() / self.bound.mean() - 1)


@dataclass(frozen=True, slots=True)
class Study:
    """What a placement study found.

    placements, results  by name: the incumbents, "current" when it is a file, "plan"
    balance, node_limited  of the plan, and of the best plan that keeps groups inside nodes
    gains          of the plan over every other placement, judged
    planned_gain   of the plan over what runs today, on what it was planned on
    judged_on      what the judged part is
    not_priced     what the evidence could not say
    migration      from what runs today; migration_s if the busiest rank fetches its experts over
                   the link between nodes, or inside the only node
    solve_s        seconds spent planning, compilation not counted
    """

    placements: Mapping[str, Placement]
    results: Mapping[str, Result]
    balance: Balance
    node_limited: Balance | None
    gains: Mapping[str, Gain]
    planned_gain: Gain
    current: str
    verdict: Verdict
    migration: Migration
    migration_s: float
    judged_on: str
    not_priced: tuple[str, ...]
    solve_s: float

    @property
    def steps_to_pay_back(self) -> float | None:
        """Steps after which the migration has paid for itself; None when it never does."""
        today, plan = self.results[self.current], self.results["plan"]
        saved_s = float(today.seconds.mean() - plan.seconds.mean())
        return self.migration_s / saved_s if saved_s > 0 else None


def placement_study(
    model: ModelSpec, system: System, planned: Input, judged: Input | None, options: StudyOptions
) -> Study:
    """Plan on `planned`, judge on `judged` (None: counts judged on themselves).

    raises  SimulationError or PlanError when trace, model, system and slots do not fit
    """
    shape = Shape(
        system.n_devices,
        options.n_slots,
        min(system.devices_per_node, system.n_devices),
        model.n_groups,
    )
    setting = Setting(model, system, options.step)
    load = _counts(planned).counts
    placements, current = _incumbents(load, shape, options)
    _plan(model, system, _small(planned), shape, options)  # compile before the clock starts
    started = time.perf_counter()
    plan = align(_plan(model, system, planned, shape, options), placements[current])
    solve_s = time.perf_counter() - started
    placements["plan"] = plan
    evidence = planned if judged is None else judged
    moved = migration(plan, placements[current], expert_bytes(setting))
    link = system.scale_up if system.n_nodes == 1 else system.scale_out
    results = {name: _judge(evidence, p, setting, options) for name, p in placements.items()}
    gains = {
        name: paired_gain(result.seconds, results["plan"].seconds, options.seed)
        for name, result in results.items()
        if name != "plan"
    }
    return Study(
        placements=placements,
        results=results,
        balance=_balance(placements, load, _counts(evidence).counts, shape, options.node_limited),
        node_limited=_node_limited(model, system, planned, evidence, shape, options),
        gains=gains,
        planned_gain=_planned_gain(planned, placements, current, setting, options),
        current=current,
        verdict=verdict(gains[current], options.least_gain),
        migration=moved,
        migration_s=moved.busiest_rank_bytes / link.bytes_per_s,
        judged_on=_judged_on(planned, judged, setting, options),
        not_priced=_not_priced(planned, evidence),
        solve_s=solve_s,
    )


def _plan(
    model: ModelSpec, system: System, planned: Input, shape: Shape, options: StudyOptions
) -> Placement:
    step = options.step
    laws = laws_for(model, system, step.precision, step.kernel)
    tokens = planned.topk if isinstance(planned, RoutingTrace) else None
    evidence = Evidence(_counts(planned).counts, tokens, routing_of(model))
    wanted = PlacementOptions(
        tokens_per_step=step.tokens_per_rank * system.n_devices,
        mode=step.mode,
        node_limited=options.node_limited,
        keep_balance=options.keep_balance,
        search=replace(options.search, seed=options.seed),
        drift=options.drift,
    )
    return plan_placement(evidence, shape, laws, wanted)


def routing_of(model: ModelSpec) -> Routing:
    """How the model's router chooses."""
    return Routing(model.top_k, model.n_groups, model.topk_groups)


def expert_bytes(setting: Setting) -> float:
    """Bytes of one expert's weights in a setting."""
    precision = setting.options.precision or default_precision(setting.system.device)
    return setting.model.expert_params * precision.weight_bits / 8


def _incumbents(
    load: FloatArray, shape: Shape, options: StudyOptions
) -> tuple[dict[str, Placement], str]:
    """The incumbents on what was planned on, and the name of the one that runs today."""
    n_layers, n_experts = load.shape
    placements = {
        "contiguous": contiguous(n_layers, n_experts, shape),
        "round_robin": round_robin(n_layers, n_experts, shape),
        "eplb_hierarchical": eplb_hierarchical(load, shape),
        "eplb_global": eplb_global(load, shape),
    }
    if isinstance(options.current, Placement):
        placements["current"] = options.current
        return placements, "current"
    if options.current not in placements:
        raise SimulationError(
            f"current={options.current!r} is unknown, known: {', '.join(placements)} or a plan file"
        )
    return placements, options.current


def _judge(
    evidence: Input, placement: Placement, setting: Setting, options: StudyOptions
) -> Result:
    if isinstance(evidence, ExpertCounts):
        return simulate_counts(evidence, placement, setting, options.most_steps, options.seed)
    rows = steps(evidence, setting.tokens_per_step, options.step.phase, options.seed).rows
    return simulate_steps(evidence, placement, setting, rows[: options.most_steps])


def _planned_gain(
    planned: Input,
    placements: Mapping[str, Placement],
    current: str,
    setting: Setting,
    options: StudyOptions,
) -> Gain:
    today = _judge(planned, placements[current], setting, options)
    plan = _judge(planned, placements["plan"], setting, options)
    return paired_gain(today.seconds, plan.seconds, options.seed)


def _balance(
    placements: Mapping[str, Placement],
    planned: FloatArray,
    judged: FloatArray,
    shape: Shape,
    node_limited: bool,
) -> Balance:
    bound = node_limited_bound if node_limited else busiest_rank_bound
    return Balance(
        {name: max_over_mean(rank_loads(p, judged)) for name, p in placements.items()},
        max_over_mean(rank_loads(placements["plan"], planned)),
        bound(planned, shape) * shape.n_ranks / planned.sum(axis=1),
    )


def _node_limited(
    model: ModelSpec,
    system: System,
    planned: Input,
    judged: Input,
    shape: Shape,
    options: StudyOptions,
) -> Balance | None:
    """The node-limited form, levelled only: what its bound is a bound of."""
    if shape.n_nodes == 1 or shape.n_groups % shape.n_nodes or shape.n_slots % shape.n_nodes:
        return None
    balanced = replace(options, node_limited=True, keep_balance=True, search=Search(0))
    load = _counts(planned)
    plan = _plan(model, system, load, shape, balanced)
    return _balance({"plan": plan}, load.counts, _counts(judged).counts, shape, node_limited=True)


def _counts(evidence: Input) -> ExpertCounts:
    return evidence if isinstance(evidence, ExpertCounts) else expert_counts(evidence)


def _small(evidence: Input) -> Input:
    """A little of the evidence, enough to compile every loop that the whole will run."""
    if isinstance(evidence, RoutingTrace):
        return evidence.rows(slice(0, 512))
    return replace(evidence, counts=evidence.counts[:1], layers=evidence.layers[:1])


def _judged_on(
    planned: Input, judged: Input | None, setting: Setting, options: StudyOptions
) -> str:
    if judged is None and isinstance(planned, ExpertCounts):
        return "the same counts it was planned on: no part was held out, expect less elsewhere"
    evidence = planned if judged is None else judged
    if isinstance(evidence, ExpertCounts):
        return "expert counts it was not planned on"
    again = steps(evidence, setting.tokens_per_step, options.step.phase, options.seed).resampled
    more = ", run again to fill a batch larger than its requests" if again else ""
    return f"{evidence.n_tokens} tokens it was not planned on{more}"


def _not_priced(planned: Input, judged: Input) -> tuple[str, ...]:
    if isinstance(planned, RoutingTrace) and isinstance(judged, RoutingTrace):
        return ()
    return (
        "which experts a token chooses together: the all-to-all is an expectation under"
        " independent choices and the router's group limit",
        "bursts: every judged step draws its tokens from the same popularity",
    )
