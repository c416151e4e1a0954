"""Which tokens run together: the fewer experts a batch needs, the fewer are read or loaded.

`expert_aware_order` serves the longest queue first, for routers whose choices are known before
the batch runs (Read-ME, arXiv 2410.19123). `regroup` deals two batches anew so that each needs
few experts, from predicted paths (ExpertFlow, arXiv 2410.17954).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError

Flags = npt.NDArray[np.bool_]
Index = npt.NDArray[np.int64]
_Bits = npt.NDArray[np.int32]  # 0 and 1

MOST_MEANS_ROUNDS = 16  # the assignment settles in a handful; a cycle must not last
MOST_SWAPS = 256


@dataclass(frozen=True, slots=True)
class Waiting:
    """Pieces of work that wait to be batched (a prompt, the next token of a conversation).

    experts  bool[pieces, n_experts], what each piece needs, the same in every layer
    tokens   int64[pieces], >= 1
    waited   int64[pieces], batches that have gone without it, >= 0
    """

    experts: Flags
    tokens: Index
    waited: Index

    def __post_init__(self) -> None:
        pieces = len(self.tokens)
        if self.experts.ndim != 2 or not len(self.experts) == len(self.waited) == pieces:
            raise SimulationError(
                f"waiting: experts {self.experts.shape}, waited {self.waited.shape},"
                f" expected one row for each of {pieces} pieces"
            )
        if pieces and (self.tokens.min() < 1 or self.waited.min() < 0):
            raise SimulationError(
                f"waiting: tokens >= {self.tokens.min()}, waited >= {self.waited.min()},"
                " expected tokens of 1 or more, waited of 0 or more"
            )


def expert_aware_order(waiting: Waiting, most_waited: int) -> Index:
    """The order in which pieces enter batches: overdue ones, then longest queue after queue.

    A piece stands in the queue of every expert it needs. The queue with most pieces left goes
    first; pieces that leave it leave the other queues too. Inside a queue the pieces are ordered
    the same way by what else they need, so that equal needs stand together. Of equal queues the
    lower expert goes first, of equal needs the piece that has waited longest.
    most_waited  a piece that has waited so many batches goes before all queues, so that a rare
                 expert is not starved
    returns      int64[pieces], a permutation
    source       arXiv 2410.19123, serving section; the age bound and the order inside a queue are
                 ours, see `longest_queue_order` for the plain form
    """
    overdue, left = _by_age(waiting, most_waited)
    return np.concatenate([overdue, _queues(waiting.experts[left], left, nested=True)])


def longest_queue_order(waiting: Waiting, most_waited: int) -> Index:
    """The same with the longest waiting piece first inside every queue, whatever else it needs."""
    overdue, left = _by_age(waiting, most_waited)
    return np.concatenate([overdue, _queues(waiting.experts[left], left, nested=False)])


def _by_age(waiting: Waiting, most_waited: int) -> tuple[Index, Index]:
    """Overdue pieces and the others, longest waiting first, then as given."""
    if most_waited < 1:
        raise SimulationError(f"most_waited={most_waited}, expected 1 or more")
    by_age = np.argsort(-waiting.waited, kind="stable").astype(np.int64)
    overdue = waiting.waited[by_age] >= most_waited
    return by_age[overdue], by_age[~overdue]


def _queues(needs: Flags, pieces: Index, nested: bool) -> Index:
    """Pieces of the longest queue, of the longest one without these, and so on.

    needs   bool[pieces, n_experts], what is left of each piece's needs
    pieces  int64[pieces], which they are
    """
    parts = [pieces[:0]]
    while len(pieces) > 1 and (lengths := needs.sum(axis=0)).any():
        expert = lengths.argmax()
        inside = needs[:, expert]
        queue = pieces[inside]
        if nested and len(queue) > 1:
            others = needs[inside]
            others[:, expert] = False
            queue = _queues(others, queue, nested)
        parts.append(queue)
        pieces, needs = pieces[~inside], needs[~inside]
    return np.concatenate([*parts, pieces])


def first_fitting(
    order: Index, tokens: Index, max_pieces: int, max_tokens: int | None = None
) -> Index:
    """The batch: pieces in the order given, passing over those that no longer fit.

    max_tokens  None for no limit; the first piece always goes, even alone above the limit
    returns     int64[batch], a part of order in its order
    """
    if max_pieces < 1 or (max_tokens is not None and max_tokens < 1):
        raise SimulationError(
            f"max_pieces={max_pieces}, max_tokens={max_tokens}: expected 1 or more each"
        )
    if max_tokens is None:
        return order[:max_pieces]
    batch: list[int] = []
    room = max_tokens
    for piece in order.tolist():
        if not batch or (len(batch) < max_pieces and tokens[piece] <= room):
            batch.append(piece)
            room -= int(tokens[piece])
    return np.array(batch, dtype=np.int64)


def paths_of(topk: npt.NDArray[np.int16], n_experts: int) -> Flags:
    """Bit matrix of paths, bool[tokens, layers * n_experts], from topk int16[tokens, layers, k]."""
    tokens, layers, _ = topk.shape
    paths = np.zeros((tokens, layers, n_experts + 1), dtype=np.bool_)  # the last holds the missing
    np.put_along_axis(paths, topk.astype(np.int64), True, axis=2)
    return paths[:, :, :n_experts].reshape(tokens, -1)


def active_experts(paths: Flags, groups: Index) -> Index:
    """How many (layer, expert) pairs each group needs.

    paths    bool[tokens, bits]
    groups   int64[groups, tokens of a group], rows of paths
    returns  int64[groups]
    """
    active: Index = paths[groups].any(axis=1).sum(axis=1)
    return active


def regroup(paths: Flags) -> Index:
    """Deal two adjacent batches anew into two of the same size that need few experts.

    Two-centre K-means with equal sizes on the Hamming distance of paths, then swaps of two tokens
    as long as one lowers the number of active experts; the same swaps start from the order given
    as well, and the better outcome counts, so the result never needs more than what came in.
    paths    bool[2 * T, bits], the first T rows are the first batch
    returns  int64[2, T], rows of each new batch, rising
    raises   SimulationError for an odd or empty number of tokens
    source   arXiv 2410.17954, token scheduler (K-means); starting points and swaps are ours
    """
    if paths.ndim != 2 or len(paths) == 0 or len(paths) % 2:
        raise SimulationError(f"paths: shape {paths.shape}, expected [2 * T, bits]")
    # A bit that at most one token has, or every token, counts the same in every split.
    uses = paths.sum(axis=0)
    bits = paths[:, (uses > 1) & (uses < len(paths))].astype(np.int32)
    given = np.arange(len(paths), dtype=np.int64).reshape(2, -1)
    outcomes = [_swapped(bits, start) for start in (given, _two_means(bits))]
    best = min(outcomes, key=lambda groups: int(active_experts(paths, groups).sum()))
    return np.sort(best, axis=1)


def _two_means(bits: _Bits) -> Index:
    """Equal halves nearest to two centres, which start at two tokens far apart."""
    first = np.abs(bits - bits[0]).sum(axis=1).argmax()
    second = np.abs(bits - bits[first]).sum(axis=1).argmax()
    towards = (bits[second] - bits[first]).astype(np.float64)
    groups = np.zeros((2, 0), dtype=np.int64)
    for _ in range(MOST_MEANS_ROUNDS):
        # Distance to centre c is size + sum(c) - 2 bits.c: of the difference only this matters.
        order = np.argsort(bits @ towards, kind="stable")
        dealt = np.sort(order.reshape(2, -1), axis=1)
        if np.array_equal(dealt, groups):
            break
        groups = dealt
        towards = bits[groups[1]].mean(axis=0) - bits[groups[0]].mean(axis=0)
    return groups


def _swapped(bits: _Bits, groups: Index) -> Index:
    """The same groups after the best swap, again and again, until none lowers the union."""
    groups = groups.copy()
    for _ in range(MOST_SWAPS):
        change = _exchange(bits, groups[0], groups[1]) + _exchange(bits, groups[1], groups[0]).T
        own, other = np.unravel_index(int(change.argmin()), change.shape)
        if change[own, other] >= 0:
            break
        groups[0, own], groups[1, other] = groups[1, other], groups[0, own]
    return groups


def _exchange(bits: _Bits, group: Index, others: Index) -> Index:
    """By how much a group's union grows when its member i leaves and other j comes: [i, j].

    A bit that one member alone has leaves with it, unless the comer has it too.
    """
    members, comers = bits[group], bits[others]
    uses = members.sum(axis=0)
    single = np.flatnonzero(uses == 1)
    owner = members[:, single].argmax(axis=0)
    order = np.argsort(owner, kind="stable")
    end = np.searchsorted(owner[order], np.arange(len(group) + 1))  # of the bits of one owner
    replaced = np.zeros((len(others), len(single) + 1), np.int32)
    np.cumsum(comers[:, single[order]], axis=1, out=replaced[:, 1:])
    new = comers[:, uses == 0].sum(axis=1)
    change: Index = new[None, :] - np.diff(end)[:, None] + np.diff(replaced[:, end], axis=1).T
    return change
