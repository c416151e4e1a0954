"""The simulator against a runtime that ran: the same decisions? and the same times?

`kernels/offload` runs an MoE layer stack whose experts are on disk or in memory, times every step,
and calibrates its parts in between. Here the same routing is decided by `decide_built_in` and
clocked by programs on the engine, from the calibrated parts alone. What the runtime decided (hits,
misses, reads ahead of every layer of every token) must come out the same, to the last one; how long
its steps took, nearly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hwmodels.calibration import Score, score_of
from moesim import engine
from moesim.errors import SimulationError
from moesim.lower.runtime import Parts, inline_program
from moesim.offload.built_in import decide_built_in
from moesim.offload.decisions import DEMAND, PREFETCH, Decisions
from moesim.offload.policy import OffloadPolicy
from moesim.offload.reading_ahead import Clocked, clock
from moesim.offload.truth_record import PolicyRecord, Record
from moesim.policies.prefetch import Predictions
from traces.layer_steps import LayerSteps, forward_passes, layer_steps
from traces.routing import DECODE, MISSING, RoutingTrace

Longs = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

POLICIES = ("on_demand", "static", "lru", "lru_prefetch")
LEAST_CALM = 5  # tokens; with fewer calm ones, all count


def cut(trace: RoutingTrace, n_layers: int, n_tokens: int) -> tuple[RoutingTrace, int]:
    """The first tokens and layers of a trace as one-token passes, and how many tokens were skipped.

    Decode tokens, where the trace has any. A token without all its experts in these layers, or with
    one twice, is skipped.
    raises  SimulationError when too few tokens are left
    """
    decode = trace.phase == DECODE
    rows = np.flatnonzero(decode if decode.any() else np.ones_like(decode))
    ids = np.sort(trace.topk[rows, :n_layers], axis=2)
    whole = (ids != MISSING).all((1, 2)) & (ids[:, :, 1:] != ids[:, :, :-1]).all((1, 2))
    kept = rows[whole][:n_tokens]
    if len(kept) < n_tokens:
        raise SimulationError(
            f"the trace has {whole.sum()} tokens to run, expected at least {n_tokens}"
            " (--warm-up and --tokens together)"
        )
    skipped = int((~whole[: np.flatnonzero(whole)[n_tokens - 1]]).sum())
    part = replace(
        trace.rows(kept),
        topk=np.ascontiguousarray(trace.topk[kept, :n_layers]),
        layers=trace.layers[:n_layers],
        phase=np.full(n_tokens, DECODE, np.int8),
        weights=None,
        scores=None,
    )
    return part, skipped


@dataclass(frozen=True, slots=True)
class Asked:
    """What a runtime is asked to run.

    work       passes of one token each
    predicted  int64[tokens, layers, most], experts expected in each layer, -1 for none; those of
               the first layer are not used
    slots      of each layer; warm_up, tokens that fill them and are not timed
    raises     SimulationError for slots or a warm-up that do not fit
    """

    work: LayerSteps
    predicted: Longs
    slots: int
    warm_up: int

    def __post_init__(self) -> None:
        work = self.work
        if not work.top_k <= self.slots <= work.n_experts:
            raise SimulationError(
                f"slots={self.slots}, expected top_k={work.top_k} to n_experts={work.n_experts}"
            )
        if not 0 <= self.warm_up < self.n_tokens:
            raise SimulationError(
                f"warm_up={self.warm_up}, expected 0 to {self.n_tokens - 1} of the tokens"
            )

    @property
    def n_tokens(self) -> int:
        """Tokens, those of the warm-up among them."""
        return self.work.passes.n_passes

    @property
    def ids(self) -> Longs:
        """int64[tokens, layers, k]: the chosen experts."""
        shape = (self.n_tokens, self.work.n_layers, self.work.top_k)
        return self.work.expert.astype(np.int64).reshape(shape)


def asked_for(trace: RoutingTrace, named: Predictions, slots: int, warm_up: int) -> Asked:
    """What to ask for, of a trace as `cut` makes it and the experts predicted for its steps."""
    sizes = np.diff(named.start)
    most = int(sizes.max(initial=1))
    there = np.arange(most) < sizes[:, None]
    predicted = np.full(there.shape, MISSING, np.int64)
    predicted[there] = named.expert
    shape = (trace.n_tokens, trace.n_layers, most)
    work = layer_steps(trace, forward_passes(trace))
    return Asked(work, predicted.reshape(shape), slots, warm_up)


def policy_of(name: str, asked: Asked) -> OffloadPolicy:
    """The simulator's form of one of the runtime's policies; SimulationError lists the known ones.

    on_demand and static have no slots that keep anything: what is missing passes through. A load
    takes the slot longest unused, whether or not what is in it is expected soon.
    """
    work = asked.work
    if name not in POLICIES:
        raise SimulationError(f"policy {name!r} is unknown, known: {', '.join(POLICIES)}")
    if name in ("on_demand", "static"):
        pinned = _most_frequent(asked) if name == "static" else None
        return OffloadPolicy(slots=np.zeros(work.n_layers, np.int64), pinned=pinned)
    slots = np.full(work.n_layers, asked.slots, np.int64)
    return OffloadPolicy(slots=slots, keep_expected=False)


def _most_frequent(asked: Asked) -> npt.NDArray[np.bool_]:
    """bool[objects]: those chosen most often in the warm-up (all tokens, without one), by layer."""
    work = asked.work
    end = work.start[(asked.warm_up or asked.n_tokens) * work.n_layers]
    counts = np.bincount(work.objects()[:end], minlength=work.n_objects)
    order = np.argsort(-counts.reshape(work.n_layers, -1), axis=1, kind="stable")
    pinned = np.zeros((work.n_layers, work.n_experts), np.bool_)
    np.put_along_axis(pinned, order[:, : asked.slots], True, axis=1)
    return pinned.ravel()


def expected(asked: Asked) -> Predictions:
    """The predictions as the runtime uses them: each expert once, none for the first layer."""
    rows = asked.predicted.reshape(asked.work.n_steps, -1)
    earlier = np.tril(rows[:, :, None] == rows[:, None, :], -1).any(2)
    used = (rows >= 0) & ~earlier
    used[:: asked.work.n_layers] = False
    start = np.concatenate(([0], np.cumsum(used.sum(1)))).astype(np.int64)
    return Predictions(start, rows[used].astype(np.int32))


def decisions_of(name: str, asked: Asked) -> Decisions:
    """What the simulator decides under one of the runtime's policies."""
    ahead = expected(asked) if name == "lru_prefetch" else None
    return decide_built_in(asked.work, policy_of(name, asked), None, ahead)


@dataclass(frozen=True, slots=True)
class Counts:
    """int64[tokens, layers] of the tokens after the warm-up: experts found, read, read ahead."""

    hits: Longs
    misses: Longs
    prefetched: Longs


def counts_of(asked: Asked, decided: Decisions) -> Counts:
    """Hits, misses and reads ahead of each layer-step."""
    work, n_steps = asked.work, asked.work.n_steps
    step = np.repeat(np.arange(n_steps), np.diff(work.start))
    loads = decided.loads
    by_step = [
        np.bincount(step[decided.was_there], minlength=n_steps),
        *(np.bincount(loads.step[loads.kind == kind], minlength=n_steps)
          for kind in (DEMAND, PREFETCH)),
    ]  # fmt: skip
    shape = (asked.n_tokens, work.n_layers)
    hits, misses, ahead = (one.reshape(shape)[asked.warm_up :] for one in by_step)
    return Counts(hits, misses, ahead)


@dataclass(frozen=True, slots=True)
class Predicted:
    """What the simulator says of a run, for the tokens after the warm-up."""

    counts: Counts
    clocked: Clocked

    @property
    def hit_rate(self) -> float:
        """Hits among all chosen experts."""
        found, missed = self.counts.hits.sum(), self.counts.misses.sum()
        return float(found / (found + missed))

    @property
    def reads(self) -> Longs:
        """int64[tokens]: experts read, by demand and ahead, without those dropped."""
        asked = self.counts.misses.sum(1) + self.counts.prefetched.sum(1)
        return np.asarray(asked - self.clocked.dropped)


def predict(name: str, asked: Asked, parts: Parts, chunk: int) -> Predicted:
    """Decide and clock a policy of the runtime.

    chunk  tokens after which the runtime waits for its reader
    """
    decided = decisions_of(name, asked)
    counts = counts_of(asked, decided)
    if name == "lru_prefetch":
        return Predicted(counts, clock(asked.work, decided, parts, asked.warm_up, chunk))
    return Predicted(counts, _clock_inline(counts.misses, asked.work.top_k, parts))


def _clock_inline(misses: Longs, top_k: int, parts: Parts) -> Clocked:
    inline = inline_program(misses, top_k, parts)
    timeline = engine.run(inline.program)
    took = (timeline.end_s - timeline.start_s) * inline.read
    token = np.repeat(np.arange(len(misses)), np.diff(inline.token_end, prepend=-1))
    stall_s = np.bincount(token, weights=took, minlength=len(misses))
    none = np.zeros(len(misses), np.int64)
    step_s = np.diff(timeline.end_s[inline.token_end], prepend=0.0)
    return Clocked(step_s, stall_s.astype(np.float64), none, none)


@dataclass(frozen=True, slots=True)
class Compared:
    """One policy, predicted and measured.

    differing  layers of tokens in which a count differs, by the name of the count; empty: none
    calm       bool[tokens], a round of it was hardly disturbed by other programs
    """

    predicted: Predicted
    measured: PolicyRecord
    differing: Mapping[str, int]
    calm: npt.NDArray[np.bool_]

    @property
    def errors(self) -> Doubles:
        """(predicted - measured) / measured of the step times that count, float64[scored]."""
        step_s = self.measured.column("step_s")
        return np.asarray(self.predicted.clocked.step_s / step_s - 1)[self.scored]

    @property
    def robbed_share(self) -> float:
        """Of the median step: its threads were ready, and other programs held the cores."""
        return float(np.median(self.measured.column("robbed_s") / self.measured.column("step_s")))

    @property
    def scored(self) -> npt.NDArray[np.bool_]:
        """bool[tokens]: calm ones; all, where hardly any is, as the runtime treats its samples."""
        return self.calm if self.calm.sum() >= LEAST_CALM else np.ones_like(self.calm)


@dataclass(frozen=True, slots=True)
class Truth:
    """All policies.

    order_predicted, order_measured  policies, fastest first, by the mean step of the same tokens:
                  those that are calm under every policy
    rounds_agree  whether every round of measurements has that order of policies
    """

    policies: Mapping[str, Compared]
    overall: Score
    groups: Mapping[str, Score]
    order_predicted: tuple[str, ...]
    order_measured: tuple[str, ...]
    rounds_agree: bool

    @property
    def same_decisions(self) -> bool:
        """Whether the simulator decided everything as the runtime did."""
        return not any(of.differing for of in self.policies.values())

    def passes(self, tolerance_pct: float) -> bool:
        """Same decisions, same order, and no policy's median error beyond the tolerance."""
        near = all(of.median_abs_pct_error <= tolerance_pct for of in self.groups.values())
        return near and self.order_predicted == self.order_measured and self.same_decisions


def compare(record: Record, asked: Asked) -> Truth:
    """Predict what was measured from its calibrated parts, and score it."""
    parts = record.costs.parts()
    policies = {
        name: _compared(predict(name, asked, parts, record.chunk), measured, record.calm_share)
        for name, measured in record.policies.items()
    }
    calm = np.logical_and.reduce([of.calm for of in policies.values()])
    kept = calm if calm.sum() >= LEAST_CALM else np.ones_like(calm)
    measured = _order({name: of.measured.column("step_s")[kept] for name, of in policies.items()})
    rounds = [
        _order({name: of.measured.column("round_step_s")[r, kept] for name, of in policies.items()})
        for r in range(record.rounds)
    ]
    return Truth(
        policies,
        score_of(np.concatenate([of.errors for of in policies.values()])),
        {name: score_of(of.errors) for name, of in policies.items()},
        _order({name: of.predicted.clocked.step_s[kept] for name, of in policies.items()}),
        measured,
        all(order == measured for order in rounds),
    )


def _compared(predicted: Predicted, measured: PolicyRecord, calm_share: float) -> Compared:
    differing = {}
    for name in ("hits", "misses", "prefetched"):
        ours, theirs = getattr(predicted.counts, name), measured.column(name)
        if ours.shape != theirs.shape:
            raise SimulationError(f"record of the runtime: {name}{list(theirs.shape)}, expected"
                                  f" {list(ours.shape)}")  # fmt: skip
        if n_other := int((ours != theirs).sum()):
            differing[name] = n_other
    calm = measured.column("robbed_s") <= calm_share * measured.column("step_s")
    return Compared(predicted, measured, differing, calm)


def _order(step_s: Mapping[str, Doubles]) -> tuple[str, ...]:
    return tuple(sorted(step_s, key=lambda name: float(step_s[name].mean())))
