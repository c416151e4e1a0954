"""Triton kernel of the fused gate: score, bias, group limit, top-k, weights, one token each."""

from __future__ import annotations

import triton
import triton.language as tl

SIGMOID = tl.constexpr(1)


@triton.jit
def _keep_groups(chosen, group, GROUPS_KEPT: tl.constexpr, SUM_TOP_2: tl.constexpr):
    """chosen[groups, members] with the members of all but the best groups at -inf."""
    best = tl.max(chosen, axis=1)
    if SUM_TOP_2:
        member = tl.arange(0, chosen.shape[1])
        first = tl.argmax(chosen, axis=1)
        rest = tl.where(member[None, :] == first[:, None], float("-inf"), chosen)
        best += tl.max(rest, axis=1)
    kept = group < 0
    for _ in tl.static_range(GROUPS_KEPT):
        winner = tl.argmax(best, axis=0)
        kept = kept | (group == winner)
        best = tl.where(group == winner, float("-inf"), best)
    return tl.where(kept[:, None], chosen, float("-inf"))


@triton.jit
def gate_kernel(
    logits_ptr,  # [tokens, groups * members]
    bias_ptr,  # float32 [groups * members], read when BIASED
    ids_ptr,  # int32 [tokens, TOP_K]
    weights_ptr,  # float32 [tokens, TOP_K]
    scale,
    SCORING: tl.constexpr,
    BIASED: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    GROUPS_KEPT: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_MEMBERS: tl.constexpr,
    PADDED_K: tl.constexpr,
):
    """Ids and weights of one token; see `gate.py`."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, PADDED_GROUPS)
    member = tl.arange(0, PADDED_MEMBERS)
    expert = group[:, None] * MEMBERS + member[None, :]
    real = (group[:, None] < GROUPS) & (member[None, :] < MEMBERS)
    at = logits_ptr + token * (GROUPS * MEMBERS) + expert
    logits = tl.load(at, mask=real, other=float("-inf")).to(tl.float32)
    if SCORING == SIGMOID:
        score = tl.sigmoid(logits)
    else:
        score = tl.exp(logits - tl.max(tl.max(logits, axis=1), axis=0))
        score = score / tl.sum(tl.sum(score, axis=1), axis=0)
    chosen = tl.where(real, score, float("-inf"))
    if BIASED:
        chosen += tl.load(bias_ptr + expert, mask=real, other=0.0)
    if GROUPS_KEPT < GROUPS:
        chosen = _keep_groups(chosen, group, GROUPS_KEPT, BIASED)

    # Flat order is the order of expert ids, so that ties go to the lower id.
    FLAT: tl.constexpr = PADDED_GROUPS * PADDED_MEMBERS
    chosen = tl.reshape(chosen, (FLAT,))
    score = tl.reshape(score, (FLAT,))
    place = tl.arange(0, FLAT)
    choice = tl.arange(0, PADDED_K)
    ids = tl.zeros((PADDED_K,), tl.int32)
    weights = tl.zeros((PADDED_K,), tl.float32)
    for i in tl.static_range(TOP_K):
        winner = tl.argmax(chosen, axis=0)
        weight = tl.sum(tl.where(place == winner, score, 0.0), axis=0)
        winner_id = (winner // PADDED_MEMBERS) * MEMBERS + winner % PADDED_MEMBERS
        ids = tl.where(choice == i, winner_id, ids)
        weights = tl.where(choice == i, weight, weights)
        chosen = tl.where(place == winner, float("-inf"), chosen)
    if RENORMALISE:
        weights = weights / tl.maximum(tl.sum(weights, axis=0), 1e-20)
    out = token * TOP_K + choice
    tl.store(ids_ptr + out, ids, mask=choice < TOP_K)
    tl.store(weights_ptr + out, weights * scale, mask=choice < TOP_K)
