"""A residency study: plan on one part of a trace, judge on another, beside the incumbents.

`residency_study` is what `moesim plan residency` runs. The knapsack decides which experts stay in
which memory at every share of device memory given to pinned experts, the rest being an LRU cache;
the share is chosen on planned tokens that the pins were not counted on. All candidates are then
simulated on the same unseen tokens with the same rule for misses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from hwmodels.box import Box
from moesim.errors import SimulationError
from moesim.offload.built_in import decide_built_in
from moesim.offload.drive import cold_reads
from moesim.offload.energy import Joules, joules_of
from moesim.offload.memory import (
    DEFAULT_WORKSPACE_BYTES,
    Footprint,
    check_below,
    expert_room_bytes,
    footprint,
)
from moesim.offload.policy import OffloadPolicy
from moesim.offload.prices import Prices, Weights, prices
from moesim.offload.simulate import OffloadResult, run
from moesim.policies.prefetch import Predictions, next_gate_recall, oracle
from planners.judge import Gain, Verdict, paired_gain, verdict
from planners.residency import Needs, Residency, Tier, Uses, knee, plan_residency, split_slots
from traces.edit import split
from traces.layer_steps import ForwardPasses, LayerSteps, PassPhase, forward_passes, layer_steps
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
class ResidencyOptions:
    """How to plan and judge.

    kv_tokens        tokens held in the KV cache, over all requests that run
    device_bytes     of device memory that may be used, 0 for all of it
    workspace_bytes  of each device for activations and the runtime
    on_miss          what happens to an expert that is not on the device (policy.ON_MISS)
    current          what runs today: an incumbent's name, or "best" of them
    least_gain       share of time a plan must save, at the low end of the error bar
    recall           next-gate recall of the prefetching incumbent, None for what is published
    most_tokens      of each part of the trace that are simulated
    """

    weights: Weights = field(default_factory=Weights)
    batch_size: int = 1
    phase: PassPhase = "decode"
    kv_tokens: int = 4096
    device_bytes: int = 0
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES
    on_miss: str = "load"
    low_share: float = 0.0
    pinned: Flags | None = None
    current: str = "best"
    least_gain: float = 0.01
    recall: float | None = None
    most_tokens: int = 20_000
    share: float = 0.5
    seed: int = 0


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


@dataclass(frozen=True, slots=True)
class _Setting:
    """What every candidate shares."""

    model: ModelSpec
    box: Box
    options: ResidencyOptions
    foot: Footprint
    room: int

    @property
    def uniform_slots(self) -> int:
        """Experts of every layer that fit the device when all layers get equally many."""
        in_all = self.room // self.foot.expert_bytes
        return int(min(in_all // self.model.n_moe_layers, self.model.n_experts))


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
    setting = _Setting(
        model, box, options, foot, expert_room_bytes(box, foot, options.device_bytes)
    )
    tell("planning")
    started = time.perf_counter()
    share = _best_share(setting, planned)
    plan = _planned(setting, planned, share)
    solve_seconds = time.perf_counter() - started
    outcomes, left_out = _simulate_all(setting, planned, judged, plan, tell)
    found = _study(setting, (planned, judged), plan, (outcomes, left_out), solve_seconds)
    return replace(found, lru_hits=_by_convention(parts[1], setting, options))


@dataclass(frozen=True, slots=True)
class _Plan:
    residency: Residency
    tiers: tuple[Tier, ...]
    share: float
    slots: Longs
    pinned: Flags
    activations: Doubles
    policy: OffloadPolicy


def _halves(trace: RoutingTrace, options: ResidencyOptions) -> tuple[RoutingTrace, RoutingTrace]:
    parts = split(trace, options.share, "request", options.seed)
    return parts.plan, parts.judge


def _work(trace: RoutingTrace, options: ResidencyOptions) -> LayerSteps:
    part = trace.rows(slice(0, options.most_tokens))
    passes = forward_passes(part, options.batch_size, options.phase, seed=options.seed)
    return layer_steps(part, passes)


def _activations(work: LayerSteps) -> Doubles:
    """float64[layers, experts]: share of passes that use each expert."""
    used = np.bincount(work.objects(), minlength=work.n_objects).astype(np.float64)
    return (used / max(1, work.passes.n_passes)).reshape(work.n_layers, -1)


def _best_share(setting: _Setting, planned: LayerSteps) -> float:
    """The share of the expert room for pins that is fastest on tokens it was not planned on."""
    cut = planned.passes.n_passes // 2
    if cut < 1:
        return 1.0
    first, second = part_of(planned, 0, cut), part_of(planned, cut, planned.passes.n_passes)
    priced = _prices(setting, second)
    speed: dict[float, float] = {}
    for share in PIN_SHARES:
        try:
            plan = _planned(setting, first, share)
            speed[share] = _run(setting, second, priced, plan.policy, None)[0].tokens_per_s
        except SimulationError:
            continue
    if not speed:
        raise SimulationError(
            f"device memory holds {setting.room // setting.foot.expert_bytes} experts, fewer than"
            f" top_k={planned.top_k} in each of {planned.n_layers} layers and none could be pinned"
        )
    return max(speed, key=lambda share: (speed[share], share))


def _planned(setting: _Setting, work: LayerSteps, share: float) -> _Plan:
    """Pins by the knapsack in a share of the expert room, an LRU cache in the rest."""
    activations = _activations(work)
    tiers = _tiers(setting, share)
    found = plan_residency(_needs(setting, activations), tiers, _uses(setting, work))
    pinned = (found.expert_tier == 0).reshape(-1)
    n_slots = int((setting.room - int(share * setting.room)) // setting.foot.expert_bytes)
    slots = np.zeros(work.n_layers, np.int64)
    if share < 1:
        if n_slots < work.top_k * work.n_layers and setting.options.on_miss == "load":
            raise SimulationError(f"{n_slots} slots are fewer than one token's experts")
        least = work.top_k if n_slots >= work.top_k * work.n_layers else 0
        slots = split_slots(lru_hits(without(work, pinned)), n_slots, least)
    policy = _policy(setting, slots, pinned, activations)
    return _Plan(found, tiers, share, slots, pinned, activations, policy)


def _tiers(setting: _Setting, share: float) -> tuple[Tier, ...]:
    box, foot = setting.box, setting.foot
    device = foot.dense_bytes + foot.all_kv_bytes + int(share * setting.room)
    tiers = [Tier("device memory", "device", device)]
    tiers.append(Tier("host memory", "host", box.host_bytes))
    if box.drive is not None:
        tiers.append(Tier(box.drive.name, "disk", 1 << 50))
    return tuple(tiers)


def _needs(setting: _Setting, activations: Doubles) -> Needs:
    foot, options = setting.foot, setting.options
    form = options.weights
    bits: tuple[float, ...] = (form.expert_bits,)
    if form.low_bits and options.low_share:
        bits = (form.expert_bits, form.low_bits)
    sizes = tuple(int(foot.expert_bytes * width / form.expert_bits) for width in bits)
    return Needs(
        activations=activations,
        expert_bits=bits,
        expert_bytes=sizes,
        attention_bytes=foot.attention_bytes,
        kv_bytes=foot.kv_bytes,
        n_layers=foot.n_layers,
        n_kv_layers=foot.n_kv_layers,
        fixed_bytes=foot.fixed_bytes,
        low_share=options.low_share,
        pinned=options.pinned,
    )


def _uses(setting: _Setting, work: LayerSteps) -> Uses:
    """Seconds of one use in every tier, by the prices of the box and the rule for misses."""
    box, foot, on_miss = setting.box, setting.foot, setting.options.on_miss
    priced = _prices(setting, work)
    times = priced.unit_times()
    tokens = int(round(float(work.tokens.mean()))) if len(work.tokens) else 1
    on_device, on_cpu = times.gpu_s[tokens], times.cpu_s[tokens] + times.cpu_start_s
    loaded = times.load_s + on_device
    below = {"load": loaded, "load_low": loaded, "cpu": on_cpu}.get(on_miss, min(loaded, on_cpu))
    copy_rate = box.copy_bytes_per_s * priced.links
    seconds = [on_device, below]
    if box.drive is not None:
        rate = box.drive.bytes_per_s * box.efficiency.drive_share
        seconds.append(below + box.drive.latency_s + foot.expert_bytes / rate)
    n_tiers = len(seconds)
    n_bits = 2 if setting.options.weights.low_bits and setting.options.low_share else 1
    moved = np.full(n_tiers, np.inf)
    moved[:2] = 0.0, foot.attention_bytes / copy_rate
    kv = np.full(n_tiers, np.inf)
    kv[:2] = 0.0, foot.kv_bytes / copy_rate
    return Uses(np.tile(np.array(seconds), (n_bits, 1)), moved, kv)


def _policy(setting: _Setting, slots: Longs, pinned: Flags, activations: Doubles) -> OffloadPolicy:
    """Pins and an LRU cache that starts with the most used of what is not pinned."""
    rest = np.where(pinned.reshape(activations.shape), -1.0, activations)
    order = np.argsort(-rest, axis=1, kind="stable")
    warm = np.zeros(activations.shape, np.bool_)
    for layer, count in enumerate(slots.tolist()):
        chosen = order[layer, :count]
        warm[layer, chosen[rest[layer, chosen] >= 0]] = True
    on_miss = setting.options.on_miss
    return OffloadPolicy("lru", slots, pinned, warm.reshape(-1), on_miss)


def without(work: LayerSteps, pinned: Flags) -> LayerSteps:
    """The layer-steps without requests for pinned experts."""
    kept = ~pinned[work.objects()]
    per_step = np.add.reduceat(kept, work.start[:-1]) if len(kept) else np.zeros(0, np.int64)
    per_step = np.where(np.diff(work.start) > 0, per_step, 0)
    start = np.concatenate([[0], np.cumsum(per_step)]).astype(np.int64)
    return replace(work, start=start, expert=work.expert[kept], tokens=work.tokens[kept], gate=None)


def part_of(work: LayerSteps, first: int, end: int) -> LayerSteps:
    """Forward passes first..end, exclusive."""
    steps = slice(first * work.n_layers, end * work.n_layers + 1)
    start = work.start[steps]
    cells = slice(int(start[0]), int(start[-1]))
    passes = work.passes
    rows = slice(int(passes.start[first]), int(passes.start[end]))
    return replace(
        work,
        start=start - start[0],
        expert=work.expert[cells],
        tokens=work.tokens[cells],
        gate=None if work.gate is None else work.gate[cells],
        passes=ForwardPasses(
            passes.rows[rows],
            passes.start[first : end + 1] - passes.start[first],
            passes.phase[first:end],
            passes.context[first:end],
            passes.requests[first:end],
        ),
    )


def _prices(setting: _Setting, work: LayerSteps) -> Prices:
    return prices(setting.model, setting.box, work, setting.options.weights)


def _run(
    setting: _Setting,
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
    setting: _Setting,
    planned: LayerSteps,
    judged: LayerSteps,
    plan: _Plan,
    tell: Callable[[str], None],
) -> tuple[dict[str, Outcome], dict[str, str]]:
    """Every candidate on the unseen tokens."""
    priced = _prices(setting, judged)
    outcomes: dict[str, Outcome] = {}
    left_out: dict[str, str] = {}
    for name, make in _candidates(setting, planned, judged, plan).items():
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


def _candidates(
    setting: _Setting, planned: LayerSteps, judged: LayerSteps, plan: _Plan
) -> dict[str, Callable[[], tuple[OffloadPolicy, Predictions | None]]]:
    """What is compared: the plan, what engines do without one, and oracles that none can run."""
    options, n_layers = setting.options, judged.n_layers
    per_layer = np.full(n_layers, setting.uniform_slots, np.int64)
    nothing = np.zeros(judged.n_objects, np.bool_)
    recall: float | Doubles = next_gate_recall(setting.model.name, n_layers)
    if options.recall is not None:
        recall = options.recall
    uniform = _policy(setting, per_layer, nothing, np.zeros(plan.activations.shape))
    no_slots = np.zeros(n_layers, np.int64)

    def static(pinned: Flags) -> OffloadPolicy:
        return _policy(setting, no_slots, pinned.reshape(-1), plan.activations)

    return {
        "plan": lambda: (plan.policy, None),
        "lru_uniform": lambda: (uniform, None),
        "lru_prefetch": lambda: (
            replace(uniform, budget=1),
            oracle(judged, recall, seed=options.seed),
        ),
        "frequency_pinning": lambda: (static(_top(plan.activations, setting.uniform_slots)), None),
        "whole_layers": lambda: (static(_whole_layers(setting, n_layers)), None),
        "belady": lambda: (replace(uniform, cache="belady"), None),
        "hindsight_pinning": lambda: (static(_planned(setting, judged, 1.0).pinned), None),
    }


def _top(activations: Doubles, n: int) -> Flags:
    """bool[layers, experts]: the n most used experts of every layer."""
    order = np.argsort(-activations, axis=1, kind="stable")[:, :n]
    marked = np.zeros(activations.shape, np.bool_)
    np.put_along_axis(marked, order, True, axis=1)
    return marked


def _whole_layers(setting: _Setting, n_layers: int) -> Flags:
    """bool[layers, experts]: all experts of the last layers that fit (llama.cpp's --n-cpu-moe)."""
    layer_bytes = setting.foot.expert_bytes * setting.model.n_experts
    n = min(n_layers, int(setting.room // layer_bytes))
    marked = np.zeros((n_layers, setting.model.n_experts), np.bool_)
    marked[n_layers - n :] = True
    return marked


def _device_bytes(setting: _Setting, policy: OffloadPolicy) -> int:
    """Peak of device memory: dense weights, KV cache, slots and pins."""
    pinned = 0 if policy.pinned is None else int(policy.pinned.sum())
    experts = pinned + int(policy.capacity(setting.model.n_moe_layers).sum())
    foot = setting.foot
    return foot.dense_bytes + foot.all_kv_bytes + experts * foot.expert_bytes


def _study(
    setting: _Setting,
    parts: tuple[LayerSteps, LayerSteps],
    plan: _Plan,
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
    judged: RoutingTrace, setting: _Setting, options: ResidencyOptions
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


def _why_not(setting: _Setting, outcomes: Mapping[str, Outcome], floor: float) -> str:
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
