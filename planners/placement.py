"""Placement: the planner. Candidates are built, searched, priced layer by layer; the best is kept.

Per layer: (1) replicate and pack, over the cluster and inside the nodes; (2) level the ranks by
swaps; (3) swap experts so that tokens visit fewer ranks and nodes; (4) keep the candidate with
the least predicted seconds, EPLB's own included, so that no plan is worse than EPLB's on what
was planned on. Tokens are priced exactly on a sample; counts alone by expectation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from planners.bounds import spread_groups
from planners.dispatch import Mode, Routing, inclusion_chances
from planners.drift import Drift, group_kin, token_kin
from planners.errors import PlanError
from planners.expected_traffic import GroupChances, expected_price, relocate_expected
from planners.incumbents import (
    Shape,
    contiguous,
    eplb_global,
    eplb_hierarchical,
    experts_by_node,
    fill_nodes,
)
from planners.layer import LayerPrice, LayerTask, Search
from planners.packing import level, separate
from planners.plan import Placement, rank_loads, replica_counts
from planners.step_time import MoeLaws
from planners.traffic import relocate, sampled_price

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]

MOST_SAMPLED_TOKENS = 3072


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the planner may look at.

    tokens_per_expert  float64[layers, n_experts] of the planned part
    topk               int16[tokens, layers, k] tokens of the planned part, None for counts only
    routing            top_k and the router's group limit
    """

    tokens_per_expert: FloatArray
    topk: npt.NDArray[np.int16] | None
    routing: Routing


@dataclass(frozen=True, slots=True)
class PlacementOptions:
    """What the plan is for.

    tokens_per_step  tokens of a step over all ranks
    mode             what an all-to-all sends (see dispatch.py)
    node_limited     expert groups stay inside one node, as EPLB's hierarchical form keeps them
    keep_balance     the busiest rank carries no more than under EPLB; what was counted outranks
                     what was assumed. None: yes for counts only, no when tokens are known
    drift            how far loads move until the plan is used
    """

    tokens_per_step: float
    mode: Mode = "device"
    node_limited: bool = False
    keep_balance: bool | None = None
    search: Search = Search()
    drift: Drift = Drift()


def plan_placement(
    evidence: Evidence, shape: Shape, laws: MoeLaws, options: PlacementOptions
) -> Placement:
    """The placement with the least predicted seconds per layer among all candidates.

    raises  PlanError when slots, ranks, nodes and groups do not fit each other
    """
    load = np.ascontiguousarray(evidence.tokens_per_expert, dtype=np.float64)
    if load.sum(axis=1).min() <= 0:
        raise PlanError(f"layer {int(load.sum(axis=1).argmin())} of the counts has no tokens")
    check_groups(shape, load.shape[1], options.node_limited)
    scale = evidence.routing.top_k * options.tokens_per_step / load.sum(axis=1, keepdims=True)
    step_load = load * scale
    price = layer_price(laws, shape, options)
    judge = _Layerwise(evidence, step_load, kin_of(evidence), shape, price, options)
    candidates = _incumbent_forms(step_load, shape, options.node_limited)
    caps = _caps(candidates, step_load, evidence, options)
    starts = []
    if not options.node_limited or shape.n_nodes == 1:
        starts.append(_packed(step_load, shape))
    if shape.n_nodes > 1 and shape.n_groups % shape.n_nodes == 0:
        starts.append(_levelled(_spread(step_load, shape), step_load, within_nodes=True))
        starts.append(_levelled(eplb_hierarchical(step_load, shape), step_load, within_nodes=True))
    for start in starts:
        candidates.append(start)
        if judge.can_price_traffic:
            candidates.append(judge.searched(start, caps))
    levelled = _levelled(starts[0], step_load, within_nodes=options.node_limited)
    return judge.best([*candidates, levelled], caps)


def check_groups(shape: Shape, n_experts: int, node_limited: bool) -> None:
    """PlanError unless groups divide the experts, and the nodes when the plan is node-limited."""
    if n_experts % shape.n_groups:
        raise PlanError(f"experts={n_experts} is not divisible by groups={shape.n_groups}")
    if node_limited and (shape.n_groups % shape.n_nodes or shape.n_slots % shape.n_nodes):
        raise PlanError(
            f"a node-limited plan needs groups={shape.n_groups} and slots={shape.n_slots}"
            f" divisible by nodes={shape.n_nodes}"
        )


def layer_price(laws: MoeLaws, shape: Shape, options: PlacementOptions) -> LayerPrice:
    """Seconds of a layer as a function of what swaps change; sources are spread evenly."""
    tokens = options.tokens_per_step
    n_bytes = laws.dispatch_bytes + laws.combine_bytes
    up = tokens * n_bytes * laws.all_to_all.up_s_per_byte
    out = tokens * n_bytes * laws.all_to_all.out_s_per_byte
    abroad = 1 - shape.ranks_per_node / shape.n_ranks
    beside = (shape.ranks_per_node - 1) / shape.n_ranks
    experts = laws.experts
    slots_per_rank = shape.n_slots // shape.n_ranks
    rank_copy_s, node_copy_s, per_pair_s = max(up * beside, out * abroad), 0.0, 0.0
    if options.mode == "node":
        rank_copy_s = up * (shape.ranks_per_node - 1) / shape.ranks_per_node
        node_copy_s = out * abroad / shape.ranks_per_node
    elif options.mode == "expert":
        per_pair_s, rank_copy_s = rank_copy_s / tokens, 0.0
    return LayerPrice(
        floor_s=slots_per_rank * experts.weight_s,
        compute_s=experts.compute_s,
        activation_s=experts.activation_s + per_pair_s,
        rank_copy_s=rank_copy_s,
        node_copy_s=node_copy_s,
    )


@dataclass(frozen=True, slots=True)
class _Layerwise:
    """Searches and prices candidates layer by layer, with tokens or with expectations."""

    evidence: Evidence
    step_load: FloatArray
    kin: list[FloatArray]
    shape: Shape
    price: LayerPrice
    options: PlacementOptions

    @property
    def can_price_traffic(self) -> bool:
        """Counts say something about traffic only through the router's group limit."""
        routing = self.evidence.routing
        return self.evidence.topk is not None or routing.topk_groups < routing.n_groups

    def searched(self, start: Placement, caps: FloatArray) -> Placement:
        """The placement after the swap search of every layer that is under its cap."""
        slots = start.physical_to_logical_map.copy()
        over = rank_loads(start, self.step_load).max(axis=1) > caps * (1 + 1e-9)
        search = replace(self.options.search, within_nodes=self.options.node_limited)
        chances, sample = self._chances(start), _sample(self.evidence, first=True)
        for layer, task in enumerate(self._tasks(start, caps)):
            if over[layer]:
                continue
            seeded = replace(search, seed=search.seed * 1_000_003 + layer)
            if sample is None:
                slots[layer] = relocate_expected(slots[layer], chances[layer], task, seeded)
            else:
                rows = np.ascontiguousarray(sample[:, layer])
                slots[layer] = relocate(slots[layer], rows, task, seeded)
        return replace(start, physical_to_logical_map=slots)

    def best(self, candidates: list[Placement], caps: FloatArray) -> Placement:
        """Layer by layer the candidate with the least seconds among the soundest.

        First comes that no rank is over its cap, then that no rank holds an expert twice. The last
        candidate is levelled to the planned load; where traffic is priced it only stands in for a
        layer without another sound one.
        """
        seconds = np.stack([self._seconds(candidate) for candidate in candidates])
        busiest = np.stack([rank_loads(c, self.step_load).max(axis=1) for c in candidates])
        tier = np.where(busiest > caps * (1 + 1e-9), 4, 0)
        tier += np.where(np.stack([_doubles(c) for c in candidates]), 2, 0)
        if self.can_price_traffic:
            tier[-1] += 1
        chosen = (tier * 2 * seconds.max(axis=0) + seconds).argmin(axis=0)
        tables = np.stack([c.physical_to_logical_map for c in candidates])
        table = tables[chosen, np.arange(len(chosen))]
        return replace(candidates[0], physical_to_logical_map=table)

    def _seconds(self, placement: Placement) -> FloatArray:
        """float64[layers]: predicted seconds on tokens the search has not seen, if there are."""
        slots, sample = placement.physical_to_logical_map, _sample(self.evidence, first=False)
        chances = self._chances(placement)
        seconds = np.empty(len(slots))
        for layer, task in enumerate(self._tasks(placement)):
            if sample is None:
                seconds[layer] = expected_price(slots[layer], chances[layer], task)
            else:
                rows = np.ascontiguousarray(sample[:, layer])
                seconds[layer] = sampled_price(slots[layer], rows, task)
        return seconds

    def _tasks(self, placement: Placement, caps: FloatArray | None = None) -> Iterator[LayerTask]:
        share = self.step_load / replica_counts(placement)
        for layer, row in enumerate(share):
            yield LayerTask(
                share=row,
                kin=self.kin[layer],
                n_ranks=self.shape.n_ranks,
                ranks_per_node=self.shape.ranks_per_node,
                price=self.price,
                drift=self.options.drift,
                cap=np.inf if caps is None else float(caps[layer]),
            )

    def _chances(self, placement: Placement) -> list[GroupChances]:
        """Group and replica chances of every layer under the placement's replica counts."""
        routing = self.evidence.routing
        inclusion, opening = inclusion_chances(self.step_load, routing)
        per_replica = inclusion / replica_counts(placement)
        per_replica /= np.repeat(opening, per_replica.shape[1] // routing.n_groups, axis=1)
        return [GroupChances(q, x) for q, x in zip(opening, per_replica, strict=True)]


def kin_of(evidence: Evidence) -> list[FloatArray]:
    """Which experts drift together, float64[n_experts, n_experts] per layer."""
    n_layers, n_experts = evidence.tokens_per_expert.shape
    sample = _sample(evidence, first=True)
    if sample is None:
        return [group_kin(n_experts, evidence.routing.n_groups)] * n_layers
    return [token_kin(sample[:, layer], n_experts) for layer in range(n_layers)]


def _sample(evidence: Evidence, first: bool) -> npt.NDArray[np.int16] | None:
    """Half of the planned tokens, evenly spaced: the first for search, the other for choice."""
    if evidence.topk is None:
        return None
    half = evidence.topk[0::2] if first else evidence.topk[1::2]
    stride = max(1, -(-len(half) // MOST_SAMPLED_TOKENS))
    return half[::stride]


def _incumbent_forms(load: FloatArray, shape: Shape, node_limited: bool) -> list[Placement]:
    forms = [eplb_hierarchical(load, shape)]
    if not node_limited:
        forms += [eplb_global(load, shape), contiguous(load.shape[0], load.shape[1], shape)]
    return forms


def _doubles(placement: Placement) -> npt.NDArray[np.bool_]:
    """bool[layers]: whether some rank holds an expert twice.

    That nearly always wastes a slot; a hot expert on every rank of a node is the exception.
    """
    by_rank = placement.physical_to_logical_map.reshape(
        placement.n_layers, placement.n_ranks, placement.slots_per_rank
    )
    ordered = np.sort(by_rank, axis=2)
    return np.asarray((ordered[..., 1:] == ordered[..., :-1]).any(axis=(1, 2)))


def _packed(load: FloatArray, shape: Shape) -> Placement:
    """Replicated and packed over the whole cluster, no expert twice on a rank.

    The search starts here and not from the levelled form: levelling to the last token fits the
    planned load, and what it shuffles for that only adds noise on another workload.
    """
    everything = np.arange(load.shape[1], dtype=np.int32)
    experts = np.tile(everything, (load.shape[0], 1, 1))
    slots = fill_nodes(load, experts, shape, most_copies=shape.n_ranks)
    packed = Placement(slots, load.shape[1], shape.n_ranks, shape.ranks_per_node)
    share = load / replica_counts(packed)
    for layer in range(len(slots)):
        separate(slots[layer], share[layer], shape.n_ranks, 0, shape.n_ranks)
    return packed


def _spread(load: FloatArray, shape: Shape) -> Placement:
    """Groups on nodes by the exact partition, then replicated and packed inside the nodes."""
    node_of_group, _ = spread_groups(load, shape)
    experts = experts_by_node(node_of_group, load.shape[1], shape.n_nodes)
    slots = fill_nodes(load, experts, shape, most_copies=shape.ranks_per_node)
    return Placement(slots, load.shape[1], shape.n_ranks, shape.ranks_per_node)


def _levelled(start: Placement, load: FloatArray, within_nodes: bool) -> Placement:
    """The placement after levelling the ranks of the cluster, or of each node."""
    slots = start.physical_to_logical_map.copy()
    share = load / replica_counts(start)
    step = start.ranks_per_node if within_nodes else start.n_ranks
    for layer in range(len(slots)):
        for first in range(0, start.n_ranks, step):
            separate(slots[layer], share[layer], start.n_ranks, first, first + step)
            level(slots[layer], share[layer], start.n_ranks, first, first + step)
    return replace(start, physical_to_logical_map=slots)


def _caps(
    forms: list[Placement], load: FloatArray, evidence: Evidence, options: PlacementOptions
) -> FloatArray:
    """float64[layers]: most load of the busiest rank; inf where balance need not be kept."""
    keep = options.keep_balance if options.keep_balance is not None else evidence.topk is None
    if not keep:
        return np.full(len(load), np.inf)
    busiest = [rank_loads(form, load).max(axis=1) for form in forms]
    least: FloatArray = np.min(busiest, axis=0)
    return least
