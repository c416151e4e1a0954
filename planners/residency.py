"""Which memory holds what: experts, attention weights and KV cache over tiers, as a knapsack.

Everything that must live somewhere is an item; its options are tiers and, for experts, bit widths.
An option costs expected seconds a pass (how often the item is used times what a use costs there)
and takes bytes of its tier. `knapsack.py` finds the choice and a bound. What is not decided here is
what moves at run time: the cache that serves the rest is split over layers by `split_slots`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from planners.errors import PlanError
from planners.knapsack import Choices, Chosen, choose

Doubles = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class Tier:
    """One memory, fastest first: what the plan may use of it."""

    name: str
    kind: str
    capacity_bytes: int


@dataclass(frozen=True, slots=True)
class Uses:
    """Seconds of one use in every tier; inf where a tier cannot serve it.

    expert_s     float64[bit widths, tiers], one activation of a routed expert
    attention_s  float64[tiers], attention of one layer in one pass, weights only
    kv_s         float64[tiers], KV cache of one layer read in one pass
    """

    expert_s: Doubles
    attention_s: Doubles
    kv_s: Doubles


@dataclass(frozen=True, slots=True)
class Needs:
    """What must live somewhere.

    activations      float64[moe_layers, n_experts], expected activations of each expert a pass
    expert_bits      bit widths an expert can have, the best first; expert_bytes: int each
    attention_bytes  int of each decoder layer; kv_bytes: int of each layer that keeps a cache
    fixed_bytes      must be in the fastest tier: embeddings, shared and dense layers, work space
    low_share        most of the activations that may fall on experts below the best bit width
    pinned           bool[moe_layers, n_experts], fastest tier at the best bit width, None for none
    """

    activations: Doubles
    expert_bits: tuple[float, ...]
    expert_bytes: tuple[int, ...]
    attention_bytes: int
    kv_bytes: int
    n_layers: int
    n_kv_layers: int
    fixed_bytes: int
    low_share: float = 0.0
    pinned: Flags | None = None

    def __post_init__(self) -> None:
        if len(self.expert_bits) != len(self.expert_bytes) or not self.expert_bits:
            raise PlanError(
                f"expert_bits={self.expert_bits} and expert_bytes={self.expert_bytes} must have"
                " one entry each for every bit width"
            )
        if not 0 <= self.low_share <= 1:
            raise PlanError(f"low_share={self.low_share} must be in 0..1")


@dataclass(frozen=True, slots=True)
class Residency:
    """Where everything lives.

    expert_tier     int64[moe_layers, n_experts], index of the tier
    expert_bits     float64[moe_layers, n_experts]
    attention_tier  int64[n_layers]; kv_tier: int64[n_kv_layers]
    used_bytes      int64[tiers], the fixed part included
    seconds, bound  expected seconds a pass of what is placed, and what no placement can beat
    """

    expert_tier: Longs
    expert_bits: Doubles
    attention_tier: Longs
    kv_tier: Longs
    used_bytes: Longs
    seconds: float
    bound: float
    prices: Doubles = field(default_factory=lambda: np.zeros(0))

    @property
    def gap(self) -> float:
        """(seconds - bound) / bound."""
        return (self.seconds - self.bound) / self.bound if self.bound > 0 else 0.0


def plan_residency(needs: Needs, tiers: tuple[Tier, ...], uses: Uses) -> Residency:
    """The cheapest placement that fits.

    raises  PlanError naming the tightest tier and by how much it is short
    """
    room = np.array([tier.capacity_bytes for tier in tiers], np.float64)
    room[0] -= needs.fixed_bytes
    if room[0] < 0:
        raise PlanError(
            f"nothing fits: {tiers[0].name} is short by {-room[0] / GIB:.2f} GiB of"
            f" {tiers[0].capacity_bytes / GIB:.2f} GiB for what must be there"
            f" ({needs.fixed_bytes / GIB:.2f} GiB without experts)"
        )
    _check_total(needs, tiers)
    found = choose(_choices(needs, tiers, uses, room))
    return _residency(needs, tiers, found)


def _check_total(needs: Needs, tiers: tuple[Tier, ...]) -> None:
    """PlanError when all tiers together cannot hold the model, naming the last as the one short."""
    wanted = needs.fixed_bytes + needs.activations.size * min(needs.expert_bytes)
    wanted += needs.n_layers * needs.attention_bytes + needs.n_kv_layers * needs.kv_bytes
    short = wanted - sum(tier.capacity_bytes for tier in tiers)
    if short > 0:
        raise PlanError(
            f"nothing fits: {tiers[-1].name} is short by {short / GIB:.2f} GiB of"
            f" {tiers[-1].capacity_bytes / GIB:.2f} GiB once faster memory is full"
            f" ({wanted / GIB:.2f} GiB to place)"
        )


def split_slots(hits: Longs, n_slots: int, least: int) -> Longs:
    """Slots of each layer's cache: the next one where it serves most more requests.

    hits     int64[moe_layers, experts + 1], requests that c slots would serve, column c
    least    slots every layer gets (top_k, so that one token fits)
    returns  int64[moe_layers], at most n_slots in all; best when more slots never gain more than
             the ones before them, which the concave hull of `hits` sees to
    raises   PlanError when n_slots cannot give every layer the least
    """
    n_layers, width = hits.shape
    if n_slots < least * n_layers:
        raise PlanError(
            f"{n_slots} slots cannot give {n_layers} layers {least} each; {least * n_layers} would"
        )
    gains = np.diff(_hulls(hits[:, least:].astype(np.float64)), axis=1)
    layer = np.repeat(np.arange(n_layers), gains.shape[1])
    best = np.argsort(-gains.ravel(), kind="stable")[: n_slots - least * n_layers]
    best = best[gains.ravel()[best] > 0]
    slots = np.full(n_layers, least, np.int64) + np.bincount(layer[best], minlength=n_layers)
    return np.asarray(np.minimum(slots, width - 1), np.int64)


def knee(hit_rate: Doubles) -> int:
    """Slots at the knee of a hit-rate curve: farthest above the line between its ends, 0 if none.

    hit_rate  float64[sizes], rising; column c is the rate with c slots
    source    Satopaa and others, "Finding a kneedle in a haystack", 2011
    """
    n = len(hit_rate)
    if n < 3:
        return n - 1
    line = hit_rate[0] + (hit_rate[-1] - hit_rate[0]) * np.arange(n) / (n - 1)
    return int((hit_rate - line).argmax())


def _choices(needs: Needs, tiers: tuple[Tier, ...], uses: Uses, room: Doubles) -> Choices:
    """Experts, then attention of every layer, then KV caches; options are (bits, tier)."""
    n_tiers, n_bits = len(tiers), len(needs.expert_bits)
    often = needs.activations.ravel()
    n_experts, n_items = len(often), len(often) + needs.n_layers + needs.n_kv_layers
    cost = np.full((n_items, n_bits * n_tiers), np.inf)
    size = np.zeros((n_items, n_bits * n_tiers, n_tiers + 1))
    tier = np.tile(np.arange(n_tiers), n_bits)
    bits = np.repeat(np.arange(n_bits), n_tiers)
    options = np.arange(n_bits * n_tiers)
    cost[:n_experts] = often[:, None] * uses.expert_s.ravel()[None, :]
    size[:n_experts, options, tier] = np.array(needs.expert_bytes, np.float64)[bits]
    size[:n_experts, :, n_tiers] = np.where(bits[None, :] > 0, often[:, None], 0.0)
    rest = np.arange(n_experts, n_items)
    n_attention = needs.n_layers
    for t in range(n_tiers):
        cost[rest[:n_attention], t] = uses.attention_s[t]
        size[rest[:n_attention], t, t] = needs.attention_bytes
        cost[rest[n_attention:], t] = uses.kv_s[t]
        size[rest[n_attention:], t, t] = needs.kv_bytes
    if needs.pinned is not None:
        cost[np.flatnonzero(needs.pinned.ravel()), 1:] = np.inf
    capacity = np.append(room, needs.low_share * often.sum())
    names = (*(tier.name for tier in tiers), "the share at low bits")
    return Choices(cost, size, capacity, names)


def _residency(needs: Needs, tiers: tuple[Tier, ...], found: Chosen) -> Residency:
    shape, n_tiers = needs.activations.shape, len(tiers)
    n_experts = needs.activations.size
    tier, bits = found.option % n_tiers, found.option // n_tiers
    expert_tier = tier[:n_experts].reshape(shape)
    bit_index = bits[:n_experts].reshape(shape)
    attention_tier = tier[n_experts : n_experts + needs.n_layers]
    kv_tier = tier[n_experts + needs.n_layers :]
    sizes = np.array(needs.expert_bytes, np.int64)[bit_index].ravel()
    held = np.bincount(expert_tier.ravel(), weights=sizes, minlength=n_tiers).astype(np.int64)
    used = held + np.bincount(attention_tier, minlength=n_tiers) * needs.attention_bytes
    used = used + np.bincount(kv_tier, minlength=n_tiers) * needs.kv_bytes
    used[0] += needs.fixed_bytes
    return Residency(
        expert_tier=expert_tier,
        expert_bits=np.array(needs.expert_bits)[bit_index],
        attention_tier=attention_tier,
        kv_tier=kv_tier,
        used_bytes=used,
        seconds=found.cost,
        bound=found.bound,
        prices=found.prices[:n_tiers],
    )


def _hulls(rising: Doubles) -> Doubles:
    """The least concave curve above each row, at the same places."""
    n_rows, n = rising.shape
    places = np.arange(n)
    hulls = np.empty_like(rising)
    for row in range(n_rows):
        corners: list[int] = []
        for x in range(n):
            while len(corners) > 1 and _bends_up(rising[row], corners[-2], corners[-1], x):
                corners.pop()
            corners.append(x)
        hulls[row] = np.interp(places, corners, rising[row][corners])
    return hulls


def _bends_up(curve: Doubles, a: int, b: int, c: int) -> bool:
    """Whether b lies on or below the line from a to c."""
    return bool((curve[b] - curve[a]) * (c - a) <= (curve[c] - curve[a]) * (b - a))
