"""A residency study: plan on one part of a trace, judge on another, beside the incumbents.

`residency_study` is what `moesim plan residency` runs. The knapsack decides which experts stay in
which memory at every share of device memory given to pinned experts, the rest being an LRU cache;
the share is chosen on planned tokens that the pins were not counted on. All candidates are then
simulated on the same unseen tokens with the same rule for misses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hwmodels.box import Box
from moesim.errors import SimulationError
from moesim.offload.built_in import decide_built_in
from moesim.offload.drive import cold_reads
from moesim.offload.energy import Joules, joules_of
from moesim.offload.memory import (
    Footprint,
    check_below,
    expert_room_bytes,
    footprint,
)
from moesim.offload.policy import OffloadPolicy
from moesim.offload.prices import Prices
from moesim.offload.simulate import OffloadResult, run
from moesim.policies.prefetch import Predictions
from moesim.residency_candidates import (
    PlannedResidency,
    ResidencyOptions,
    Setting,
    candidates,
    planned_residency,
    prices_of,
)
from planners.judge import Gain, Verdict, paired_gain, verdict
from planners.residency import Residency, Tier, knee
from traces.edit import split
from traces.layer_steps import LayerSteps, forward_passes, layer_steps, part_of
from traces.model import ModelSpec
from traces.replay import CONVENTIONS, replay_trace
from traces.reuse_distance import lru_hits
from traces.routing import RoutingTrace

Flags = npt.NDArray[np.bool_]
Longs = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

PIN_SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
INCUMBENTS = ("lru_uniform", "lru_prefetch", "frequency_pinning", "whole_layers")
ORACLES = ("belady", "hindsight_pinning")
_RANDOM_MARGIN = 0.03


@dataclass(frozen=True, slots=True)
class Outcome:
    """One candidate on the unseen tokens."""

    result: OffloadResult
    joules: Joules
    device_bytes: int

    @property
    def figures(self) -> dict[str, float]:
        """What is reported of it, together."""
        found = self.result
        return {
            "tokens_per_s": found.tokens_per_s,
            "hit_rate": found.hit_rate,
            "bytes_per_token": found.bytes_per_token,
            "stall_s_per_token": found.stall_s_per_token,
            "joules_per_token": self.joules.total_j_per_token,
            "cpu_share": found.cpu_share,
            "device_bytes": float(self.device_bytes),
        }


@dataclass(frozen=True, slots=True)
class ResidencyStudy:
    """The plan and what it is worth.

    residency      where everything lives; pin_share: of the expert room, the rest are slots
    slots          int64[moe_layers] of the LRU cache beside the pins
    outcomes       every candidate on the unseen tokens, "plan" among them
    left_out       candidates that could not be tried, and why
    regret         time of the plan over that of the best pinning in hindsight, minus 1
    to_belady      the same against the clairvoyant cache
    hit_curve      float64[experts + 1], LRU hit rate with c slots in every layer; knee: its c
    lru_hits       hit rate of the uniform LRU cache by lookup convention (traces/replay.py)
    random_floor   hit rate under uniformly random routing: the share of all experts that fits
    reason         why no plan helps, "" when one does
    """

    residency: Residency
    tiers: tuple[Tier, ...]
    footprint: Footprint
    pin_share: float
    slots: Longs
    pinned: Flags
    on_miss: str
    outcomes: Mapping[str, Outcome]
    left_out: Mapping[str, str]
    current: str
    gain: Gain
    verdict: Verdict
    reason: str
    regret: float
    to_belady: float
    hit_curve: Doubles
    lru_hits: Mapping[str, float]
    knee: int
    random_floor: float
    slots_per_layer: int
    activations: Doubles
    planned_tokens: int
    judged_tokens: int
    solve_seconds: float


def residency_study(
    trace: RoutingTrace,
    model: ModelSpec,
    box: Box,
    options: ResidencyOptions,
    judge: RoutingTrace | None = None,
    progress: Callable[[str], None] | None = None,
) -> ResidencyStudy:
    """Plan on one part of the trace, judge on the rest, or on another trace.

    raises  SimulationError when the trace lacks MoE layers of the model or the rest does not fit;
            PlanError when no placement fits
    """
    tell = progress or (lambda _: None)
    if trace.n_layers != model.n_moe_layers:
        raise SimulationError(
            f"the trace holds {trace.n_layers} of {model.n_moe_layers} MoE layers of {model.name};"
            " a residency plan needs all of them"
        )
    parts = (trace, judge) if judge is not None else _halves(trace, options)
    planned, judged = (_work(part, options) for part in parts)
    foot = footprint(model, box, options.weights, options.kv_tokens, options.workspace_bytes)
    setting = Setting(model, box, options, foot, expert_room_bytes(box, foot, options.device_bytes))
    tell("planning")
    started = time.perf_counter()
    share = _best_share(setting, planned)
    plan = planned_residency(setting, planned, share)
    solve_seconds = time.perf_counter() - started
    outcomes, left_out = _simulate_all(setting, planned, judged, plan, tell)
    found = _study(setting, (planned, judged), plan, (outcomes, left_out), solve_seconds)
    return replace(found, lru_hits=_by_convention(parts[1], setting, options))


def _halves(trace: RoutingTrace, options: ResidencyOptions) -> tuple[RoutingTrace, RoutingTrace]:
    parts = split(trace, options.share, "request", options.seed)
    return parts.plan, parts.judge


def _work(trace: RoutingTrace, options: ResidencyOptions) -> LayerSteps:
    part = trace.rows(slice(0, options.most_tokens))
    passes = forward_passes(part, options.batch_size, options.phase, seed=options.seed)
    return layer_steps(part, passes)


def _best_share(setting: Setting, planned: LayerSteps) -> float:
    """The share of the expert room for pins that is fastest on tokens it was not planned on."""
    cut = planned.passes.n_passes // 2
    if cut < 1:
        return 1.0
    first, second = part_of(planned, 0, cut), part_of(planned, cut, planned.passes.n_passes)
    priced = prices_of(setting, second)
    speed: dict[float, float] = {}
    for share in PIN_SHARES:
        try:
            plan = planned_residency(setting, first, share)
            speed[share] = _run(setting, second, priced, plan.policy, None)[0].tokens_per_s
        except SimulationError:
            continue
    if not speed:
        raise SimulationError(
            f"device memory holds {setting.room // setting.foot.expert_bytes} experts, fewer than"
            f" top_k={planned.top_k} in each of {planned.n_layers} layers and none could be pinned"
        )
    return max(speed, key=lambda share: (speed[share], share))


def _run(
    setting: Setting,
    work: LayerSteps,
    priced: Prices,
    policy: OffloadPolicy,
    predicted: Predictions | None,
) -> tuple[OffloadResult, Joules]:
    decided = decide_built_in(work, policy, priced.unit_times(), predicted)
    resident = int(policy.capacity(work.n_layers).sum()) * setting.foot.expert_bytes
    if policy.pinned is not None:
        resident += int(policy.pinned.sum()) * setting.foot.expert_bytes
    held = check_below(setting.box, setting.foot, resident)
    extras = cold_reads(work, decided, held) if held < work.n_objects else None
    result = run(work, decided, priced, extras)
    return result, joules_of(setting.model, priced, work, decided, result)


def _simulate_all(
    setting: Setting,
    planned: LayerSteps,
    judged: LayerSteps,
    plan: PlannedResidency,
    tell: Callable[[str], None],
) -> tuple[dict[str, Outcome], dict[str, str]]:
    """Every candidate on the unseen tokens."""
    priced = prices_of(setting, judged)
    outcomes: dict[str, Outcome] = {}
    left_out: dict[str, str] = {}
    for name, make in candidates(setting, planned, judged, plan).items():
        tell(name)
        try:
            policy, predicted = make()
            result, joules = _run(setting, judged, priced, policy, predicted)
        except SimulationError as error:
            if name == "plan":
                raise
            left_out[name] = str(error)
            continue
        outcomes[name] = Outcome(result, joules, _device_bytes(setting, policy))
    return outcomes, left_out


def _device_bytes(setting: Setting, policy: OffloadPolicy) -> int:
    """Peak of device memory: dense weights, KV cache, slots and pins."""
    pinned = 0 if policy.pinned is None else int(policy.pinned.sum())
    experts = pinned + int(policy.capacity(setting.model.n_moe_layers).sum())
    foot = setting.foot
    return foot.dense_bytes + foot.all_kv_bytes + experts * foot.expert_bytes


def _study(
    setting: Setting,
    parts: tuple[LayerSteps, LayerSteps],
    plan: PlannedResidency,
    tried: tuple[dict[str, Outcome], dict[str, str]],
    solve_seconds: float,
) -> ResidencyStudy:
    planned, judged = parts
    outcomes, left_out = tried
    options = setting.options
    current = _current(options.current, outcomes)
    mine, theirs = outcomes["plan"].result, outcomes[current].result
    gain = paired_gain(*_by_request(judged, theirs, mine), options.seed)
    curve = lru_hits(judged).sum(axis=0) / max(1, len(judged.expert))
    floor = min(1.0, setting.room // setting.foot.expert_bytes / setting.foot.n_experts)
    reason = _why_not(setting, outcomes, floor)
    decided = "not_worth_it" if reason else verdict(gain, options.least_gain)
    return ResidencyStudy(
        residency=plan.residency,
        tiers=plan.tiers,
        footprint=setting.foot,
        pin_share=plan.share,
        slots=plan.slots,
        pinned=plan.pinned,
        on_miss=options.on_miss,
        outcomes=outcomes,
        left_out=left_out,
        current=current,
        gain=gain,
        verdict=decided,
        reason=reason,
        regret=_over(mine, outcomes.get("hindsight_pinning")),
        to_belady=_over(mine, outcomes.get("belady")),
        hit_curve=curve,
        lru_hits={},
        knee=knee(curve),
        random_floor=floor,
        slots_per_layer=setting.uniform_slots,
        activations=plan.activations,
        planned_tokens=int(planned.passes.tokens.sum()),
        judged_tokens=int(judged.passes.tokens.sum()),
        solve_seconds=solve_seconds,
    )


def _by_convention(
    judged: RoutingTrace, setting: Setting, options: ResidencyOptions
) -> dict[str, float]:
    """Hit rates of one LRU cache a layer, one token after the other, as each convention counts."""
    if not setting.uniform_slots:
        return {}
    part, slots = judged.rows(slice(0, options.most_tokens)), setting.uniform_slots
    return {
        convention: replay_trace(part, slots, "lru", convention, "per_layer").hit_rate
        for convention in CONVENTIONS
    }


def _current(name: str, outcomes: Mapping[str, Outcome]) -> str:
    known = [incumbent for incumbent in INCUMBENTS if incumbent in outcomes]
    if name == "best":
        if not known:
            raise SimulationError("no incumbent fits the device; give it more memory")
        return max(known, key=lambda incumbent: outcomes[incumbent].result.tokens_per_s)
    if name not in known:
        raise SimulationError(f"--current {name}: expected best or one of {', '.join(known)}")
    return name


def _by_request(
    work: LayerSteps, theirs: OffloadResult, mine: OffloadResult
) -> tuple[Doubles, Doubles]:
    """Seconds of runs of passes that may count as independent: requests, or stretches of 64."""
    context = work.passes.context
    begins = np.concatenate(([True], np.diff(context) < 0))
    if begins.sum() < 4:
        begins = np.arange(len(context)) % 64 == 0
    starts = np.flatnonzero(begins)
    return np.add.reduceat(theirs.pass_s, starts), np.add.reduceat(mine.pass_s, starts)


def _why_not(setting: Setting, outcomes: Mapping[str, Outcome], floor: float) -> str:
    """Why no plan can help, from the working set; "" when one may."""
    if setting.uniform_slots >= setting.model.n_experts:
        return "all experts fit the device: there is nothing to plan"
    held = [outcomes[name].result.hit_rate for name in ("plan", "lru_uniform") if name in outcomes]
    if held and max(held) < floor + _RANDOM_MARGIN:
        return (
            f"routing is as good as random at this size: the best hit rate is {max(held):.3f}, and"
            f" {floor:.3f} of the experts fit"
        )
    return ""


def _over(mine: OffloadResult, other: Outcome | None) -> float:
    return float("nan") if other is None else mine.seconds / other.result.seconds - 1.0
