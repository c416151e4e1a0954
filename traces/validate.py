"""What is wrong with a capture, by name: validate(trace) gives the findings.

A capture goes wrong in ways that no type check sees: a hook that fires on one layer only copies
it, padding becomes tokens, a dispatch buffer is logged instead of the router's choice. Each check
below looks for one of these on whole arrays; an error means that statistics and plans made from
the trace would be about the capture, not about the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from traces.routing import DECODE, MISSING, PREFILL, RoutingTrace

# Thresholds. Real captures of seven models stay far from all of them: no two layers agree on more
# than 21 % of the tokens, no two neighbouring tokens agree everywhere, and of the changes of the
# first id at most 58 % go one way.
COPIED_LAYER_SHARE = 0.99
PLACEHOLDER_SHARE = 0.99
IDENTICAL_RUN = 32
IDENTICAL_SHARE = 0.2
SORTED_SHARE = 0.9
HOT_EXPERT_SHARE = 0.5
MIN_TOKENS = 64  # fewer say nothing about a router

Ids = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong (error) or unusual (warning) in a capture.

    what      what is wrong, in words
    where     layer, token or request it was seen at
    value     what was found
    expected  what a sound capture has
    """

    severity: Literal["error", "warning"]
    what: str
    where: str
    value: str
    expected: str

    def __str__(self) -> str:
        """The finding in one line."""
        return (
            f"{self.severity}: {self.what} ({self.where}): {self.value}, expected {self.expected}"
        )


def validate(trace: RoutingTrace) -> list[Finding]:
    """Everything found in a trace, errors first; an empty list means nothing to say."""
    if trace.n_tokens == 0:
        return [Finding("error", "no tokens", "trace", "0", "at least 1")]
    view = _View(trace)
    findings = [
        finding
        for check in (
            _missing_cells,
            _duplicates,
            _placeholders,
            _copied_layers,
            _identical_rows,
            _sorted_by_expert,
            _collapsed_router,
            _positions,
            _phases,
            _requests,
        )
        for finding in check(view)
    ]
    return sorted(findings, key=lambda finding: finding.severity != "error")


class _View:
    """A trace in the orders the checks read it in.

    choices  int16[layers, top_k, tokens]: one slot of a layer lies in one piece
    hashes   uint64[layers, tokens]: equal for equal sets of experts, whatever their order
    order    rows by request, in their own order
    inside   whether a row and the next in that order are of one request
    """

    def __init__(self, trace: RoutingTrace) -> None:
        self.trace = trace
        self.choices = np.ascontiguousarray(trace.topk.transpose(1, 2, 0))
        self.hashes = _set_hashes(self.choices, trace.n_experts)
        self.order = np.argsort(trace.request, kind="stable")
        request = trace.request[self.order]
        self.inside = request[1:] == request[:-1]
        # With all experts chosen, or one token, sameness says nothing.
        self.can_differ = trace.n_tokens > 1 and trace.top_k < trace.n_experts


def first_bad_id(topk: Ids, n_experts: int) -> tuple[int, int, int] | None:
    """(token, layer column, value) of the first id outside -1..n_experts-1, or None.

    topk  integers of any width [tokens, layers, top_k]; works before a RoutingTrace exists
    """
    if not topk.size or (int(topk.min()) >= MISSING and int(topk.max()) < n_experts):
        return None
    bad = (topk >= n_experts) | (topk < MISSING)
    token, column, slot = np.unravel_index(int(np.argmax(bad)), topk.shape)
    return int(token), int(column), int(topk[token, column, slot])


def check_ids(topk: Ids, n_experts: int, layers: tuple[int, ...]) -> list[Finding]:
    """A finding for the first expert id out of range, with the number of such ids."""
    bad = first_bad_id(topk, n_experts)
    if bad is None:
        return []
    token, column, value = bad
    count = int(((topk >= n_experts) | (topk < MISSING)).sum())
    where = f"token {token}, layer {layers[column]}"
    return [
        Finding(
            "error",
            f"{count} expert ids out of range",
            where,
            f"id {value}",
            f"0..{n_experts - 1}, or -1 where missing",
        )
    ]


def _set_hashes(choices: Ids, n_experts: int) -> npt.NDArray[np.uint64]:
    table = np.random.default_rng(0x5E7).integers(1, 2**63, size=n_experts + 1, dtype=np.uint64)
    hashes = np.zeros((choices.shape[0], choices.shape[2]), dtype=np.uint64)
    for layer, slots in enumerate(choices):
        for ids in slots:
            hashes[layer] += table[ids]  # -1, missing, is the last entry
    return hashes


def _missing_cells(view: _View) -> list[Finding]:
    missing = (view.choices == MISSING).mean(axis=(1, 2))
    return [
        Finding(
            "error" if missing[column] == 1 else "warning",
            "missing expert ids",
            f"layer {view.trace.layers[column]}",
            f"{missing[column]:.1%} of the cells",
            "every token to have its ids",
        )
        for column in np.flatnonzero(missing)
    ]


def _duplicates(view: _View) -> list[Finding]:
    findings = []
    for column, slots in enumerate(view.choices):
        repeated = np.zeros(slots.shape[1], dtype=bool)
        for slot, ids in enumerate(slots):
            for other in slots[:slot]:
                repeated |= (ids == other) & (ids != MISSING)
        if repeated.any():
            token = int(np.argmax(repeated))
            findings.append(
                Finding(
                    "error",
                    f"{int(repeated.sum())} tokens choose an expert twice",
                    f"layer {view.trace.layers[column]}, first at token {token}",
                    str(slots[:, token].tolist()),
                    "distinct ids",
                )
            )
    return findings


def _placeholders(view: _View) -> list[Finding]:
    """Layers whose tokens all carry 0..k-1 (a buffer never filled) or all 0 (a dense layer)."""
    trace = view.trace
    first = np.arange(trace.top_k).reshape(1, -1, 1)
    patterns = {f"0..{trace.top_k - 1}": first}
    if trace.top_k > 1:
        patterns["only 0"] = np.zeros_like(first)
    findings = []
    for name, ids in patterns.items():
        share = (view.hashes == _set_hashes(ids, trace.n_experts)[0, 0]).mean(axis=1)
        findings += [
            Finding(
                "error",
                "placeholder ids instead of choices",
                f"layer {trace.layers[column]}",
                f"{name} in {share[column]:.1%} of the tokens",
                "ids of the router",
            )
            for column in np.flatnonzero(share > PLACEHOLDER_SHARE)
            if view.can_differ
        ]
    return findings


def _copied_layers(view: _View) -> list[Finding]:
    findings = []
    for column in range(1, view.trace.n_layers if view.can_differ else 0):
        share = (view.hashes[:column] == view.hashes[column]).mean(axis=1)
        for source in np.flatnonzero(share > COPIED_LAYER_SHARE)[:1]:
            findings.append(
                Finding(
                    "error",
                    f"copy of layer {view.trace.layers[source]}",
                    f"layer {view.trace.layers[column]}",
                    f"the same experts in {share[source]:.1%} of the tokens",
                    "each layer to choose for itself",
                )
            )
    return findings


def _identical_rows(view: _View) -> list[Finding]:
    """Neighbouring tokens with the same experts at all layers: padding logged as tokens."""
    if not view.can_differ:
        return []
    same = (view.hashes[:, 1:] == view.hashes[:, :-1]).all(axis=0)
    share, (start, length) = float(same.mean()), _longest_run(same)
    long_or_many = length + 1 >= IDENTICAL_RUN or share > IDENTICAL_SHARE
    if not long_or_many and share <= 0.01:
        return []
    # Few cells may agree by chance, as in one layer of a top-1 router.
    severe = long_or_many and view.trace.n_layers * view.trace.top_k >= 8
    return [
        Finding(
            "error" if severe and view.trace.n_tokens >= MIN_TOKENS else "warning",
            "runs of identical tokens",
            f"longest from token {start}",
            f"{length + 1} tokens, {share:.1%} of all equal the one before at all layers",
            f"runs under {IDENTICAL_RUN}, share under {IDENTICAL_SHARE:.0%}",
        )
    ]


def _longest_run(flags: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """(start, length) of the longest run of True; (0, 0) when there is none."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    if not len(starts):
        return 0, 0
    longest = int(np.argmax(lengths))
    return int(starts[longest]), int(lengths[longest])


def _sorted_by_expert(view: _View) -> list[Finding]:
    """Ids that rise along the tokens: rows in dispatch order, not in token order.

    In token order a change of the first id goes up about as often as down.
    """
    findings = []
    for column, slots in enumerate(view.choices):
        up, down = (
            int((slots[0, 1:] > slots[0, :-1]).sum()),
            int((slots[0, 1:] < slots[0, :-1]).sum()),
        )
        changes = up + down
        share = max(up, down) / max(changes, 1)
        # Seven changes one way are one sorted pass over eight experts or more.
        sorted_once = share == 1.0 and changes >= 7 and view.trace.n_tokens >= MIN_TOKENS
        if sorted_once or (share >= SORTED_SHARE and changes >= MIN_TOKENS):
            findings.append(
                Finding(
                    "error",
                    "tokens sorted by expert",
                    f"layer {view.trace.layers[column]}",
                    f"{share:.1%} of {changes} changes of the first id go one way",
                    f"under {SORTED_SHARE:.0%}, as in token order",
                )
            )
    return findings


def _collapsed_router(view: _View) -> list[Finding]:
    """Few experts take everything (error), or one takes most tokens (warning).

    The number of effective experts is exp(entropy of the load): E when even, top_k at the least.
    """
    trace = view.trace
    if trace.n_tokens < MIN_TOKENS or not view.can_differ:
        return []
    even = trace.top_k / trace.n_experts
    floor = min(1.5 * trace.top_k, 0.5 * (trace.top_k + trace.n_experts))
    findings = []
    for layer, slots in zip(trace.layers, view.choices, strict=True):
        counts = np.bincount(slots.ravel() + 1, minlength=trace.n_experts + 1)[1:]
        if not counts.any():
            continue
        load = counts / counts.sum()
        effective = float(np.exp(-np.sum(load[load > 0] * np.log(load[load > 0]))))
        hottest = int(np.argmax(load))
        share = float(load[hottest]) * trace.top_k
        if effective < floor:
            value, expected = f"{effective:.2f} effective experts", f"at least {floor:.1f}"
            findings.append(Finding("error", "collapsed router", f"layer {layer}", value, expected))
        elif share - even > HOT_EXPERT_SHARE:
            what = f"expert {hottest} takes most tokens"
            value, expected = f"{share:.1%} of the tokens", f"about {even:.1%} if loads were even"
            findings.append(Finding("warning", what, f"layer {layer}", value, expected))
    return findings


def _positions(view: _View) -> list[Finding]:
    """Positions that do not go up by one within a request, in the order of the rows."""
    step = np.diff(view.trace.position[view.order].astype(np.int64))
    findings = []
    cases = {"repeat or go back": step < 1, "jump": step > 1}
    for name, wrong in cases.items():
        wrong = wrong & view.inside
        if wrong.any():
            first = int(view.order[int(np.argmax(wrong)) + 1])
            findings.append(
                Finding(
                    "warning",
                    f"positions {name} within a request",
                    f"request {view.trace.request[first]}, first at token {first}",
                    f"{int(wrong.sum())} times",
                    "each token one after the last",
                )
            )
    return findings


def _phases(view: _View) -> list[Finding]:
    """Prefill after decode in one request: several turns, or phases mixed up."""
    phase = view.trace.phase[view.order]
    back = (phase[:-1] == DECODE) & (phase[1:] == PREFILL) & view.inside
    if not back.any():
        return []
    rows = view.order[1:][back]
    return [
        Finding(
            "warning",
            "decode before prefill in one request",
            f"request {view.trace.request[rows[0]]}, first at token {rows[0]}",
            f"{len(np.unique(view.trace.request[rows]))} requests",
            "prefill first (several turns in one request look like this)",
        )
    ]


def _requests(view: _View) -> list[Finding]:
    """Several decode tokens of one request in one forward pass: requests were not told apart."""
    if view.trace.forward is None:
        return []
    decode = view.trace.phase == DECODE
    forward, request = view.trace.forward[decode], view.trace.request[decode]
    order = np.lexsort((request, forward))
    forward, request = forward[order], request[order]
    same = (forward[1:] == forward[:-1]) & (request[1:] == request[:-1])
    if not same.any():
        return []
    return [
        Finding(
            "warning",
            "requests not told apart",
            "decode tokens",
            f"up to {_longest_run(same)[1] + 1} of one request in one forward pass",
            "1 (more only with speculative decoding)",
        )
    ]
