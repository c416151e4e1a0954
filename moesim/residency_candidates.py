"""What a residency study compares: the knapsack's plan, what engines do without one, and oracles.

`planned_residency` makes a plan for one share of the device's room given to pinned experts;
`candidates` lists everything that is then simulated on the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from hwmodels.box import Box
from moesim.errors import SimulationError
from moesim.offload.memory import DEFAULT_WORKSPACE_BYTES, Footprint
from moesim.offload.policy import OffloadPolicy
from moesim.offload.prices import Prices, Weights, prices
from moesim.policies.prefetch import Predictions, next_gate_recall, oracle
from planners.residency import Needs, Residency, Tier, Uses, plan_residency, split_slots
from traces.layer_steps import LayerSteps, PassPhase, without
from traces.model import ModelSpec
from traces.reuse_distance import lru_hits

Flags = npt.NDArray[np.bool_]
Longs = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


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
class Setting:
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


@dataclass(frozen=True, slots=True)
class PlannedResidency:
    """The knapsack's placement with a cache in the rest of the room.

    share        of the expert room that pins may take
    slots        int64[layers] of the cache; pinned: bool[n_objects]
    activations  float64[layers, experts], share of the planned passes that use each expert
    """

    residency: Residency
    tiers: tuple[Tier, ...]
    share: float
    slots: Longs
    pinned: Flags
    activations: Doubles
    policy: OffloadPolicy


def activations_of(work: LayerSteps) -> Doubles:
    """float64[layers, experts]: share of passes that use each expert."""
    used = np.bincount(work.objects(), minlength=work.n_objects).astype(np.float64)
    return (used / max(1, work.passes.n_passes)).reshape(work.n_layers, -1)


def planned_residency(setting: Setting, work: LayerSteps, share: float) -> PlannedResidency:
    """Pins by the knapsack in a share of the expert room, an LRU cache in the rest."""
    activations = activations_of(work)
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
    return PlannedResidency(found, tiers, share, slots, pinned, activations, policy)


def _tiers(setting: Setting, share: float) -> tuple[Tier, ...]:
    box, foot = setting.box, setting.foot
    device = foot.dense_bytes + foot.all_kv_bytes + int(share * setting.room)
    tiers = [Tier("device memory", "device", device)]
    tiers.append(Tier("host memory", "host", box.host_bytes))
    if box.drive is not None:
        tiers.append(Tier(box.drive.name, "disk", 1 << 50))
    return tuple(tiers)


def _needs(setting: Setting, activations: Doubles) -> Needs:
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


def _uses(setting: Setting, work: LayerSteps) -> Uses:
    """Seconds of one use in every tier, by the prices of the box and the rule for misses."""
    box, foot, on_miss = setting.box, setting.foot, setting.options.on_miss
    priced = prices_of(setting, work)
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


def _policy(setting: Setting, slots: Longs, pinned: Flags, activations: Doubles) -> OffloadPolicy:
    """Pins and an LRU cache that starts with the most used of what is not pinned."""
    rest = np.where(pinned.reshape(activations.shape), -1.0, activations)
    order = np.argsort(-rest, axis=1, kind="stable")
    warm = np.zeros(activations.shape, np.bool_)
    for layer, count in enumerate(slots.tolist()):
        chosen = order[layer, :count]
        warm[layer, chosen[rest[layer, chosen] >= 0]] = True
    on_miss = setting.options.on_miss
    return OffloadPolicy("lru", slots, pinned, warm.reshape(-1), on_miss)


def prices_of(setting: Setting, work: LayerSteps) -> Prices:
    """Prices of the setting's box and number formats."""
    return prices(setting.model, setting.box, work, setting.options.weights)


def candidates(
    setting: Setting, planned: LayerSteps, judged: LayerSteps, plan: PlannedResidency
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
        "hindsight_pinning": lambda: (static(planned_residency(setting, judged, 1.0).pinned), None),
    }


def _top(activations: Doubles, n: int) -> Flags:
    """bool[layers, experts]: the n most used experts of every layer."""
    order = np.argsort(-activations, axis=1, kind="stable")[:, :n]
    marked = np.zeros(activations.shape, np.bool_)
    np.put_along_axis(marked, order, True, axis=1)
    return marked


def _whole_layers(setting: Setting, n_layers: int) -> Flags:
    """bool[layers, experts]: all experts of the last layers that fit (llama.cpp's --n-cpu-moe)."""
    layer_bytes = setting.foot.expert_bytes * setting.model.n_experts
    n = min(n_layers, int(setting.room // layer_bytes))
    marked = np.zeros((n_layers, setting.model.n_experts), np.bool_)
    marked[n_layers - n :] = True
    return marked
