"""What an engine can hold of a residency plan, and what its coarser granularity costs.

Engines that place whole layers, or the same number of experts in every layer, cannot hold a plan
of single experts. Here a plan is projected onto either form within the room of its tiers, and the
loss is said: activations served by the device and bytes, as planned and as the engine will do it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planners.errors import PlanError
from planners.residency_file import CacheEntry, ResidencyFile

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a plan, MoE layers in order.

    tier       int64[moe_layers, n_experts], index into the plan's tiers
    share      float64[moe_layers, n_experts], share of the layer's activations; rows sum to 1
    n_bytes    int64[moe_layers, n_experts]
    on_device  bool[moe_layers, n_experts], pinned in a tier of the kind "device"
    unknown    layers without a load; every expert of them is taken to be equally likely
    """

    tier: IntArray
    share: FloatArray
    n_bytes: IntArray
    on_device: BoolArray
    unknown: int


@dataclass(frozen=True, slots=True)
class Loss:
    """A plan beside what the engine makes of it; shares are means over the MoE layers.

    plan_device_share      activations whose expert the plan pins on the device, 0..1
    device_share           the same under the engine; None when only its own cache decides
    device_share_kind      how device_share is known
    device_share_at_most   no choice of experts in the engine's room serves more
    plan_device_bytes      experts pinned on the device by the plan; device_bytes: by the engine
    plan_cache_bytes       slots of the plan's cache, for which the engine may have no form
    layers_without_load    layers whose load is not in the plan, counted as uniform
    """

    plan_device_share: float
    device_share: float | None
    device_share_kind: str
    device_share_at_most: float
    plan_device_bytes: int
    device_bytes: int
    plan_cache_bytes: int = 0
    layers_without_load: int = 0

    @property
    def lost_share(self) -> float | None:
        """Activations that the device no longer serves; negative where it now serves more."""
        return None if self.device_share is None else self.plan_device_share - self.device_share


def experts(plan: ResidencyFile) -> Experts:
    """The plan's experts as arrays.

    An expert takes expert_bytes at the most bits of the plan, and in proportion at fewer.
    """
    tier, load = plan.expert_tiers(), plan.loads()
    total = load.sum(axis=1, keepdims=True)
    share = np.where(total > 0, load / np.where(total > 0, total, 1.0), 1.0 / plan.n_experts)
    bits = np.array([row.expert_bits for row in plan.layers if row.kind == "moe"])
    kinds = np.array([entry.kind == "device" for entry in plan.tiers])
    return Experts(
        tier=tier,
        share=share,
        n_bytes=np.ceil(plan.expert_bytes * (bits / bits.max())).astype(np.int64),
        on_device=kinds[tier],
        unknown=int((total <= 0).sum()),
    )


def with_slots_filled(plan: ResidencyFile) -> ResidencyFile:
    """The plan for an engine without a cache: free slots hold the most used experts for good.

    Slots of a layer (or of all, in a global cache) take the experts outside the first tier with the
    largest loads; of equals the earlier ones. The tier's bytes stay as planned.
    """
    slots = plan.cache.slots
    if not sum(slots):
        return plan
    held = experts(plan)
    free = np.where(held.tier == 0, -1.0, held.share)
    chosen = np.zeros(free.shape, dtype=np.bool_)
    if plan.cache.scope == "global":
        chosen.reshape(-1)[np.argsort(-free, axis=None, kind="stable")[: sum(slots)]] = True
    else:
        for row, count in enumerate(slots):
            chosen[row, np.argsort(-free[row], kind="stable")[:count]] = True
    tier = np.where(chosen, 0, held.tier)
    rows = {layer: row for row, layer in enumerate(plan.moe_layers)}
    layers = [
        layer.model_copy(update={"expert_tier": tier[rows[layer.layer]].tolist()})
        if layer.layer in rows
        else layer
        for layer in plan.layers
    ]
    return plan.model_copy(update={"layers": layers, "cache": CacheEntry()})


def cache_bytes(plan: ResidencyFile, held: Experts) -> int:
    """Bytes of the cache's free slots; a slot takes the largest expert it may have to hold."""
    largest = held.n_bytes.max(axis=1)
    if plan.cache.scope == "global":
        return int(sum(plan.cache.slots) * largest.max())
    slots = np.array(plan.cache.slots or [0] * len(largest), dtype=np.int64)
    return int((slots * largest).sum())


def rooms(plan: ResidencyFile, held: Experts) -> IntArray:
    """int64[tiers]: bytes each tier has for experts, beside all else that the plan keeps there.

    A tier whose used_bytes is less than its experts has not been accounted: nothing else is in it.
    raises  PlanError naming the tier whose experts do not fit, and by how many bytes
    """
    room = np.zeros(len(plan.tiers), dtype=np.int64)
    slots = cache_bytes(plan, held)
    for index, entry in enumerate(plan.tiers):
        pinned = int(held.n_bytes[held.tier == index].sum())
        movable = pinned + (slots if index == 0 else 0)
        others = max(0, entry.used_bytes - movable)
        room[index] = entry.capacity_bytes - others
        if pinned > room[index]:
            raise PlanError(
                f"tier {entry.name}: {pinned} bytes of experts and {others} of other things,"
                f" capacity_bytes={entry.capacity_bytes}: short by {pinned - room[index]}"
            )
    return room


def only_device(plan: ResidencyFile, engine: str) -> int:
    """Index of the one tier of the kind "device".

    raises  PlanError when there is none or several, which this engine's file cannot tell apart
    """
    found = [index for index, entry in enumerate(plan.tiers) if entry.kind == "device"]
    if len(found) != 1:
        names = ", ".join(plan.tiers[index].name for index in found) or "none"
        raise PlanError(f"tiers of kind device: {names}; {engine} takes a plan with exactly one")
    return found[0]


def refuse_kinds(plan: ResidencyFile, held: Experts, engine: str, *kinds: str) -> None:
    """PlanError when experts are in a tier of a kind that the engine cannot serve from."""
    for index, entry in enumerate(plan.tiers):
        count = int((held.tier == index).sum())
        if entry.kind in kinds and count:
            raise PlanError(
                f"tier {entry.name}: {count} experts are in a tier of kind {entry.kind}, which"
                f" {engine} has no form for"
            )


def need_attention_on_device(plan: ResidencyFile, engine: str) -> None:
    """PlanError when a layer's attention is elsewhere, for engines that keep it on the device."""
    for layer in plan.layers:
        tier = plan.tiers[layer.attention_tier]
        if tier.kind != "device":
            raise PlanError(
                f"layers[{layer.layer}].attention_tier is {tier.name}; {engine} keeps all but the"
                " experts on the device"
            )


def need_host_room(plan: ResidencyFile, held: Experts, n_bytes: int, why: str) -> None:
    """PlanError when tiers of the kind "host" have no room for n_bytes of experts."""
    host = [index for index, entry in enumerate(plan.tiers) if entry.kind == "host"]
    room = int(rooms(plan, held)[host].sum())
    if n_bytes > room:
        raise PlanError(
            f"host memory: {why} takes {n_bytes} bytes, the plan's host tiers have {room}: short"
            f" by {n_bytes - room}"
        )


def whole_layers(plan: ResidencyFile, held: Experts) -> IntArray:
    """int64[moe_layers]: one tier for all experts of each layer, fastest tiers filled first.

    Every layer gets the same number of activations, so each tier takes as many layers as fit
    (the smallest first: with one capacity, no other choice takes more). Among layers of one size
    go first those whose activations the plan serves most from that tier or faster ones, then
    later ones.

    raises  PlanError when the last tier has no room for what is left, and by how many bytes
    """
    n_bytes, room = held.n_bytes.sum(axis=1), rooms(plan, held)
    tier = np.full(len(n_bytes), -1, dtype=np.int64)
    for index in range(len(room)):
        left = np.flatnonzero(tier < 0)
        wanted = np.where(held.tier[left] <= index, held.share[left], 0.0).sum(axis=1).round(12)
        order = left[np.lexsort((-left, -wanted, n_bytes[left]))]
        tier[order[np.cumsum(n_bytes[order]) <= room[index]]] = index
    rest = int(n_bytes[tier < 0].sum())
    if rest:
        raise PlanError(
            f"tier {plan.tiers[-1].name}: whole layers leave {int((tier < 0).sum())} layers"
            f" ({rest} bytes) that fit no tier"
        )
    return tier


def layer_loss(plan: ResidencyFile, held: Experts, tier: IntArray) -> Loss:
    """The loss of `whole_layers`."""
    device = np.array([entry.kind == "device" for entry in plan.tiers])[tier]
    return loss_of(plan, held, np.broadcast_to(device[:, None], held.on_device.shape))


def loss_of(plan: ResidencyFile, held: Experts, on_device: BoolArray) -> Loss:
    """The loss when the engine pins exactly these experts (bool[moe_layers, n_experts])."""
    share = _mean_share(held, on_device)
    return Loss(
        plan_device_share=_mean_share(held, held.on_device),
        device_share=share,
        device_share_kind="exact on the plan's loads",
        device_share_at_most=share,
        plan_device_bytes=int(held.n_bytes[held.on_device].sum()),
        device_bytes=int(held.n_bytes[on_device].sum()),
        plan_cache_bytes=cache_bytes(plan, held),
        layers_without_load=held.unknown,
    )


def equal_slots(plan: ResidencyFile, held: Experts, device: int) -> int:
    """The most slots K, the same in every MoE layer, that the device tier has room for.

    raises  PlanError when K is under top_k, and by how many bytes
    """
    one_slot = int(held.n_bytes.max(axis=1).sum())
    room = int(rooms(plan, held)[device])
    slots = min(room // one_slot, plan.n_experts)
    if slots < plan.top_k:
        raise PlanError(
            f"tier {plan.tiers[device].name}: room for {slots} experts in every MoE layer, expected"
            f" at least top_k={plan.top_k}: short by {plan.top_k * one_slot - room} bytes"
        )
    return slots


def slots_loss(plan: ResidencyFile, held: Experts, slots: int) -> Loss:
    """The loss of `equal_slots` under LRU: an estimate, and what the K best experts would serve."""
    best = np.sort(held.share, axis=1)[:, plan.n_experts - slots :].sum(axis=1)
    return Loss(
        plan_device_share=_mean_share(held, held.on_device),
        device_share=float(lru_share(held.share, slots).mean()),
        device_share_kind="estimate: LRU, choices drawn independently from the plan's loads",
        device_share_at_most=float(best.mean()),
        plan_device_bytes=int(held.n_bytes[held.on_device].sum()),
        device_bytes=slots * int(held.n_bytes.max(axis=1).sum()),
        plan_cache_bytes=cache_bytes(plan, held),
        layers_without_load=held.unknown,
    )


def lru_share(share: FloatArray, slots: int) -> FloatArray:
    """float64[rows]: hits of an LRU cache of `slots` under independent draws from each row.

    share   float64[rows, n], rows sum to 1
    source  Che, Tung and Wang 2002: sum over i of 1 - exp(-p_i T) = slots gives the time T an
            entry stays, and entry i is found with probability 1 - exp(-p_i T)
    """
    low, high = np.zeros(len(share)), np.full(len(share), 700.0)  # of ln(1 + T)
    for _ in range(100):
        middle = (low + high) / 2
        held = -np.expm1(-share * np.expm1(middle)[:, None])
        enough = held.sum(axis=1) >= slots
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    held = -np.expm1(-share * np.expm1(high)[:, None])
    return np.asarray((held * share).sum(axis=1))


def _mean_share(held: Experts, on_device: BoolArray) -> float:
    return float(np.where(on_device, held.share, 0.0).sum(axis=1).mean())
