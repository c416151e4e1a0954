"""`moesim validate offload`: the decisions and the clock of a real runtime, and the command."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim import engine
from moesim.cli import validate_offload
from moesim.errors import SimulationError
from moesim.lower.runtime import READY, Beside, Gap, Parts, between_gates, inline_program
from moesim.offload.built_in import decide_built_in, hooks_for
from moesim.offload.decide import decide
from moesim.offload.reading_ahead import clock
from moesim.offload.truth import (
    POLICIES,
    Asked,
    compare,
    counts_of,
    cut,
    decisions_of,
    expected,
    policy_of,
    predict,
)
from moesim.offload.truth_record import Record, read_record
from tests.moesim.cli_case import counts_file, moesim, refused, small_trace, trace_file
from traces.layer_steps import forward_passes, layer_steps
from traces.routing import DECODE, MISSING, RoutingTrace

torch = pytest.importorskip("torch", reason="needs torch (extra `kernels`)")

from moesim_kernels.offload import policy as runtime  # noqa: E402
from moesim_kernels.offload.run import checked_ahead  # noqa: E402
from moesim_kernels.offload.stack import StackSpec  # noqa: E402

# Exact in binary, so that hand-computed times are equal, not near.
PARTS = Parts(
    dense_s=2.0, dense_after_reads_s=3.0, dense_beside_s=2.0, expert_s=1.0, expert_read_s=0.5,
    expert_beside_s=1.0, read_s=4.0, read_next_s=3.0, read_beside_s=4.0, handoff_s=0.0,
    loop_inline_s=0.25, loop_background_s=0.0,
)  # fmt: skip
ALONE = Beside.of(PARTS)
SLOWED = replace(PARTS, expert_beside_s=1.25)  # a read takes a fifth of the expert's time


def decode_trace(topk: np.ndarray, n_experts: int) -> RoutingTrace:
    n_tokens = len(topk)
    return RoutingTrace(
        topk=topk.astype(np.int16), n_experts=n_experts, layers=tuple(range(topk.shape[1])),
        request=np.zeros(n_tokens, np.int32), position=np.arange(n_tokens, dtype=np.int32),
        phase=np.full(n_tokens, DECODE, np.int8),
    )  # fmt: skip


def asked_of(topk: object, n_experts: int, slots: int, predicted: object, warm_up: int) -> Asked:
    trace = decode_trace(np.array(topk), n_experts)
    work = layer_steps(trace, forward_passes(trace))
    return Asked(work, np.array(predicted, np.int64), slots, warm_up)


@st.composite
def routings(draw: st.DrawFn, tight: bool = False) -> Asked:
    """Any routing, skewed so that it hits, and any predictions, of which some are right.

    tight  no slot to spare, and predictions for all of them: many are thrown out before use
    """
    n_layers, top_k = draw(st.integers(1 + tight, 4)), draw(st.integers(1 + tight, 3))
    n_experts = draw(st.integers(top_k + 3 * tight, 9))
    slots = top_k if tight else draw(st.integers(top_k, n_experts))
    n_tokens = draw(st.integers(1 + tight, 24))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    wanted = rng.gumbel(size=(n_tokens, n_layers, n_experts))
    wanted += draw(st.integers(0, 3)) * rng.random((n_layers, n_experts))
    topk = np.argsort(-wanted, axis=2)[:, :, :top_k]
    most = slots if tight else draw(st.integers(1, slots))
    guessed = rng.integers(-1, n_experts, (n_tokens, n_layers, most))
    right = min(top_k, guessed.shape[2])
    known = rng.random((n_tokens, n_layers, right)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    guessed[:, :, :right] = np.where(known, topk[:, :, :right], guessed[:, :, :right])
    return asked_of(topk, n_experts, slots, guessed, draw(st.integers(0, n_tokens - 1)))


def runtime_decisions(name: str, asked: Asked):
    """What the runtime's own policy decides, layer by layer of every token."""
    work, ids = asked.work, asked.ids
    spec = StackSpec(work.n_layers, work.n_experts, work.top_k, 8, 8, 8)
    pinned = runtime.most_frequent(ids[: asked.warm_up or None], work.n_experts, asked.slots)
    policy = runtime.policy_of(name, spec, asked.slots, pinned)
    ahead = checked_ahead(spec, asked.predicted, ids, asked.slots, needed=policy.background)
    for token, chosen in enumerate(ids.tolist()):
        for layer, of_layer in enumerate(chosen):
            yield policy.decide(layer, of_layer, ahead[token][layer])


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None, max_examples=100)
@given(asked=routings() | routings(tight=True))
def test_the_simulator_decides_what_the_runtime_decides(name: str, asked: Asked) -> None:
    work = asked.work
    decided = decisions_of(name, asked)
    theirs = list(runtime_decisions(name, asked))
    reads = [read for one in theirs for read in (*one.demand, *one.ahead)]
    objects = [read.layer * work.n_experts + read.expert for read in reads]
    assert decided.loads.object.tolist() == objects
    counts = counts_of(asked, decided)
    shape = (asked.n_tokens, work.n_layers)
    for ours, per_step in (
        (counts.hits, [len(one.order) - len(one.demand) for one in theirs]),
        (counts.misses, [len(one.demand) for one in theirs]),
        (counts.prefetched, [len(one.ahead) for one in theirs]),
    ):
        np.testing.assert_array_equal(ours, np.reshape(per_step, shape)[asked.warm_up :])


@settings(deadline=None, max_examples=60)
@given(asked=routings() | routings(tight=True))
def test_the_compiled_loop_lets_the_same_copies_leave_as_the_plain_one(asked: Asked) -> None:
    ahead = expected(asked)
    for keep in (False, True):
        policy = replace(policy_of("lru_prefetch", asked), keep_expected=keep)
        fast = decide_built_in(asked.work, policy, None, ahead)
        plain = decide(asked.work, policy, hooks_for(asked.work, policy), ahead)
        for field in ("object", "step", "kind", "victim"):
            np.testing.assert_array_equal(getattr(fast.loads, field), getattr(plain.loads, field))
        np.testing.assert_array_equal(fast.load, plain.load)
        assert fast.evictions == int((fast.loads.victim >= 0).sum())


def test_a_load_by_demand_spares_what_is_expected_unless_told_otherwise() -> None:
    """Layer 1 holds 0 and 1, 0 longest unused. 0 is expected there, but 2 is chosen."""
    topk = [[[0], [0]], [[0], [1]], [[0], [2]]]
    predicted = [[[MISSING], [0]], [[MISSING], [1]], [[MISSING], [0]]]
    asked = asked_of(topk, 3, 2, predicted, 0)
    plain = policy_of("lru_prefetch", asked)
    for policy, leaves in ((plain, 0), (replace(plain, keep_expected=True), 1)):
        decided = decide_built_in(asked.work, policy, None, expected(asked))
        assert decided.loads.object[-1] == 3 + 2
        assert decided.loads.victim[-1] == 3 + leaves


def test_inline_times_add_up_as_by_hand() -> None:
    """Two tokens of two layers, top 2; a layer after two reads has a slower dense part."""
    inline = inline_program(np.array([[0, 2], [1, 0]]), 2, PARTS)
    timeline = engine.run(inline.program)
    first = (0.25 + 2 + 2 * 1) + (0.25 + 2 + 4 + 0.5 + 3 + 0.5)
    second = (0.25 + 3 + 1 + 4 + 0.5) + (0.25 + 2 + 2 * 1)
    assert timeline.end_s[inline.token_end].tolist() == [first, first + second]
    reads = (timeline.end_s - timeline.start_s)[inline.read]
    assert reads.tolist() == [4, 3, 4]
    assert set(np.array(inline.names.labels)[inline.names.label[inline.read]]) == {"read"}


def ends(gap: Gap, parts: Parts) -> list[float]:
    return engine.run(between_gates(gap, parts, Beside.of(parts))).end_s.tolist()


def test_a_read_slows_what_computes_beside_it_and_keeps_its_pace() -> None:
    gap = Gap(False, [4.0], [READY, READY, 0], dense=True)
    wakes, read, first, second, third, loop, dense = ends(gap, SLOWED)
    assert (wakes, read) == (0.0, 4.0)
    assert [first, second] == pytest.approx([1.25, 2.5])
    assert [third, loop, dense] == pytest.approx([5.0, 5.0, 7.0])  # the reader has nothing left


def test_the_part_that_a_read_slows_less_draws_at_less() -> None:
    both = replace(SLOWED, dense_beside_s=2.2)
    *_, expert, _, dense = ends(Gap(False, [100.0], [READY], dense=True), both)
    assert expert == pytest.approx(1.25)
    assert dense - expert == pytest.approx(2.2)


def test_a_slow_down_beyond_twofold_is_capped_and_says_so() -> None:
    beside = Beside.of(replace(PARTS, expert_beside_s=3.0))
    assert beside.capped
    assert beside.read == 0.5
    *_, expert, _ = ends(Gap(False, [100.0], [READY], dense=False), replace(
        PARTS, expert_beside_s=3.0))  # fmt: skip
    assert expert == pytest.approx(2.0)
    assert not ALONE.capped
    assert Beside.of(replace(PARTS, dense_beside_s=1.5)) == ALONE  # faster beside a read: noise


def test_waking_the_reader_costs_both_threads() -> None:
    parts = replace(PARTS, handoff_s=0.5)
    wakes, read, ready, late, _ = ends(Gap(True, [4.0], [READY, 0], dense=False), parts)
    assert (wakes, read, ready, late) == (0.5, 4.5, 1.5, 5.5)


def clocked(topk: object, predicted: object, slots: int, chunk: int = 8, n_experts: int = 8):
    asked = asked_of(topk, n_experts, slots, predicted, 0)
    return clock(asked.work, decisions_of("lru_prefetch", asked), PARTS, 0, chunk)


def test_what_is_needed_overtakes_what_is_read_ahead() -> None:
    """One token, top 1. Gate 0 at 2: 0 is read 2-6, then 5 and 6 are asked for ahead, 5 from 6.

    0 is computed 6-7, gate 1 at 9: 1 is missing and comes before 6, 10-14; the end is at 15.
    """
    found = clocked([[[0], [1]]], [[[MISSING, MISSING], [5, 6]]], slots=3)
    assert found.step_s.tolist() == [15.0]
    assert found.stall_s.tolist() == [4.0 + 5.0]
    assert (found.late.tolist(), found.dropped.tolist()) == ([0], [0])


def test_what_was_asked_for_ahead_and_is_needed_is_late_and_computed_last() -> None:
    """Gate 0 at 2: 0 and 1 by 10, computed by 11; 2 is read ahead 10-14, 3 behind it.

    Gate 1 at 13 needs 3 and 2, both on their way: 3 hurries but 2 is in progress; in the order of
    the router 3 is computed first, 18-19, then 2.
    """
    topk = [[[0, 1], [3, 2]]]
    found = clocked(topk, [[[MISSING] * 2, [2, 3]]], slots=2)
    assert found.late.tolist() == [2]
    assert found.step_s.tolist() == [20.0]


def test_a_read_whose_slot_is_given_away_before_it_begins_is_dropped() -> None:
    """One slot a layer: 5 is on its way, 6 waits behind it for the other layer's slot.

    Token 0: gate 0 at 2, 0 by 6; ahead 5 (layer 1) from 6. Gate 1 at 9 needs 1, which takes the
    slot of 5: 5 is in progress and finished at 10, 1 is read 10-14.
    """
    found = clocked([[[0], [1]]], [[[MISSING], [5]]], slots=1)
    assert found.dropped.tolist() == [0]
    assert found.step_s.tolist() == [15.0]
    # With two experts a layer to be read first, 5 and 6 have not begun when 1 and 2 take the slots.
    topk = [[[0, 3], [1, 2]]]
    slow = replace(PARTS, dense_s=0.5)
    asked = asked_of(topk, 8, 2, [[[MISSING] * 2, [5, 6]]], 0)
    late = clock(asked.work, decisions_of("lru_prefetch", asked), slow, 0, 8)
    # gate 0 at 0.5, reads by 8.5, computed by 9.5, gate 1 at 10: 5 is in progress till 12.5
    assert late.dropped.tolist() == [1]
    assert late.step_s.tolist() == [12.5 + 8 + 1]


def test_between_chunks_the_reader_is_waited_for_off_the_clock() -> None:
    """5 to 7 are read ahead for nothing: at the end of token 0, 6 is in progress, 7 is not begun.

    Without a stop 6 ends at 18, token 1 gets 2 at 22, then 7 comes by 26 and 3 by 30: it ends at
    31. After a stop 2 and 3 are read at once.
    """
    topk, ahead = [[[0], [1]], [[2], [3]]], [[[MISSING] * 3, [5, 6, 7]]] * 2
    assert clocked(topk, ahead, slots=4, chunk=1).step_s.tolist() == [15.0, 14.0]
    assert clocked(topk, ahead, slots=4, chunk=2).step_s.tolist() == [15.0, 16.0]


class _Thread:
    """The reader by slots, as the runtime keeps it: the specification of `Reads`."""

    def __init__(self, read_s: float) -> None:
        self.read_s, self.free, self.dropped = read_s, 0.0, 0
        self.urgent: list[list] = []
        self.ahead: list[list] = []
        self.last: dict[int, list] = {}

    def until(self, now: float) -> None:
        """Begin what begins before now; a job is [slot, asked at, end or None]."""
        while (queue := self.urgent or self.ahead) and max(self.free, queue[0][1]) < now:
            self.begin(queue)

    def begin(self, queue: list[list]) -> None:
        job = queue.pop(0)
        job[2] = self.free = max(self.free, job[1]) + self.read_s

    def ask(self, now: float, slots: list[int], queue: list[list]) -> None:
        for slot in slots:
            old = self.last.get(slot)
            for waiting in (self.urgent, self.ahead):
                if any(job is old for job in waiting):
                    waiting[:] = [job for job in waiting if job is not old]
                    self.dropped += 1
            self.last[slot] = [slot, now, None]
            queue.append(self.last[slot])

    def coming(self, now: float, slots: list[int]) -> list[int]:
        jobs = [self.last[slot] for slot in slots if slot in self.last]
        for job in jobs:
            if any(job is other for other in self.ahead):
                self.ahead[:] = [other for other in self.ahead if other is not job]
                self.urgent.append(job)
        return [job[0] for job in jobs if job[2] is None or job[2] > now]

    def end(self, slot: int) -> float:
        job = self.last.get(slot)
        while job is not None and job[2] is None:
            self.begin(self.urgent or self.ahead)
        return 0.0 if job is None else job[2]


@settings(deadline=None, max_examples=100)
@given(asked=routings() | routings(tight=True), read_s=st.sampled_from([5.3, 20.3, 1.3, 0.3]))
def test_steps_take_what_a_queue_of_slots_says(asked: Asked, read_s: float) -> None:
    """Nothing slows anything, so the clock is that of a plain queue beside a line of work."""
    parts = replace(PARTS, read_s=read_s, read_beside_s=read_s)
    found = clock(asked.work, decisions_of("lru_prefetch", asked), parts, 0, asked.n_tokens)
    thread, now, steps, late = _Thread(read_s), 0.0, [], []
    for step, one in enumerate(runtime_decisions("lru_prefetch", asked)):
        if step % asked.work.n_layers == 0:
            steps.append(now)
        now += parts.dense_s
        thread.until(now)
        hits = [one.slots[i] for i in one.order[: len(one.order) - len(one.demand)]]
        coming = thread.coming(now, hits)
        thread.ask(now, [read.slot for read in one.demand], thread.urgent)
        thread.ask(now, [read.slot for read in one.ahead], thread.ahead)
        missing = [read.slot for read in one.demand]
        for slot in [s for s in hits if s not in coming] + coming + missing:
            now = max(now, thread.end(slot)) + parts.expert_s
        late.append(len(coming))
    took = np.diff([*steps, now])
    np.testing.assert_allclose(found.step_s, took, rtol=1e-9)
    assert found.dropped.sum() == thread.dropped
    assert found.late.sum() == sum(late)


def spread(seconds: float) -> dict:
    return {"median": seconds, "middle": seconds, "p10": seconds, "p90": seconds, "n": 9}


def record_of(asked: Asked, factors: dict[str, float], chunk: int = 8) -> dict:
    """A record of a machine whose steps take what is predicted, times a factor a policy."""
    seconds = asdict(PARTS)
    loops = {name: spread(seconds.pop(f"loop_{name}_s")) for name in ("inline", "background")}
    costs = {name: spread(value) for name, value in seconds.items()}
    costs |= {"expert_bytes": 4096, "loop_s": loops, "expert_tokens_s": {}, "read_bytes_s": {}}
    policies = {}
    for name, factor in factors.items():
        said = predict(name, asked, PARTS, chunk)
        step_s = (factor * said.clocked.step_s).tolist()
        policies[name] = {
            "hit_rate": said.hit_rate, "buffer_bytes": 0, "step_s": step_s,
            "stall_s": said.clocked.stall_s.tolist(), "busy_s": [0.0] * len(step_s),
            "robbed_s": [0.0] * len(step_s), "late": said.clocked.late.tolist(),
            "dropped": said.clocked.dropped.tolist(),
            "bytes_read": (said.reads * 4096).tolist(),
            "round_step_s": [step_s, step_s], "round_robbed_s": [[0.0] * len(step_s)] * 2,
            "hits": said.counts.hits.tolist(), "misses": said.counts.misses.tolist(),
            "prefetched": said.counts.prefetched.tolist(),
        }  # fmt: skip
    return {
        "schema": 1, "stack": {}, "tier": "direct", "slots": asked.slots, "warm_up": asked.warm_up,
        "rounds": 2, "chunk": chunk, "n_tokens": asked.n_tokens - asked.warm_up,
        "calm_share": 0.01, "costs": costs, "policies": policies, "same_outputs": True,
        "environment": {},
    }  # fmt: skip


@pytest.fixture(scope="module")
def asked() -> Asked:
    rng = np.random.default_rng(3)
    wanted = rng.gumbel(size=(60, 3, 8)) + 3 * rng.random((3, 8))
    topk = np.argsort(-wanted, axis=2)[:, :, :2]
    guessed = np.where(rng.random(topk.shape) < 0.8, topk, rng.integers(0, 8, topk.shape))
    return asked_of(topk, 8, 3, guessed, 20)


RIGHT = dict.fromkeys(POLICIES, 1.0)


def test_errors_are_those_that_the_record_was_made_with(asked: Asked) -> None:
    factors = dict(zip(POLICIES, (1.0, 1.25, 0.8, 1.0), strict=True))
    truth = compare(read_record(record_of(asked, factors)), asked)
    medians = [truth.groups[name].median_abs_pct_error for name in POLICIES]
    assert medians == pytest.approx([0, 20, 25, 0])
    assert truth.overall.rows == 4 * 40
    assert truth.same_decisions
    assert truth.rounds_agree
    assert not truth.passes(24.0)


def test_what_was_predicted_exactly_passes_at_tolerance_0(asked: Asked) -> None:
    assert compare(read_record(record_of(asked, RIGHT)), asked).passes(0.0)


def test_a_wrong_order_does_not_pass_whatever_the_errors(asked: Asked) -> None:
    order = compare(read_record(record_of(asked, RIGHT)), asked).order_predicted
    truth = compare(read_record(record_of(asked, RIGHT | {order[0]: 50.0})), asked)
    assert truth.order_measured == (*order[1:], order[0])
    assert not truth.passes(1e6)


def test_a_decision_that_differs_is_counted_and_does_not_pass(asked: Asked) -> None:
    record = record_of(asked, RIGHT)
    record["policies"]["lru"]["misses"][3][1] += 1
    truth = compare(read_record(record), asked)
    assert truth.policies["lru"].differing == {"misses": 1}
    assert not truth.same_decisions
    assert not truth.passes(1e6)
    record["policies"]["lru"]["misses"].pop()
    with pytest.raises(SimulationError, match=r"misses\[39, 3\], expected \[40, 3\]"):
        compare(read_record(record), asked)


def test_steps_that_other_programs_robbed_are_left_out_while_calm_ones_are_left(
    asked: Asked,
) -> None:
    record = record_of(asked, RIGHT)
    lru = record["policies"]["lru"]
    for token in range(30):
        lru["robbed_s"][token] = 0.3 * lru["step_s"][token]
        lru["step_s"][token] *= 3
    truth = compare(read_record(record), asked)
    assert truth.groups["lru"].rows == 10
    assert truth.passes(0.0)
    lru["robbed_s"] = lru["step_s"]
    truth = compare(read_record(record), asked)
    assert truth.groups["lru"].rows == 40
    assert not truth.passes(50.0)


def test_a_record_with_a_misspelled_or_missing_key_is_refused(asked: Asked) -> None:
    record = record_of(asked, RIGHT)
    with pytest.raises(SimulationError, match=r"^record of the runtime: costs\.read_z: Extra"):
        read_record(record | {"costs": record["costs"] | {"read_z": 1}})
    with pytest.raises(SimulationError, match="schema"):
        read_record(record | {"schema": 2})


def test_tokens_with_holes_or_an_expert_twice_are_skipped_and_counted() -> None:
    trace = small_trace(600)
    topk = trace.topk.copy()
    decode = np.flatnonzero(trace.phase == DECODE)
    topk[decode[0], 0, 1] = MISSING
    topk[decode[3], 1] = 4
    topk[decode[200], 1] = 4  # behind what is taken
    part, skipped = cut(replace(trace, topk=topk), 2, 100)
    assert skipped == 2
    np.testing.assert_array_equal(part.topk, topk[decode[[1, 2, *range(4, 102)]]])
    with pytest.raises(SimulationError, match="297 tokens to run, expected at least 298"):
        cut(replace(trace, topk=topk), 2, 298)
    # a hole in a layer that does not run is none
    assert cut(replace(trace, topk=topk), 1, 3)[1] == 1


def small_run(folder: Path, *more: object):
    sizes = ("--hidden", 64, "--intermediate", 32, "--dense", 64)
    amount = ("--tokens", 24, "--warm-up", 32, "--rounds", 2, "--slots", 3)
    return moesim(
        "validate", "offload", "--trace", trace_file(folder), *sizes, *amount, "--folder", folder,
        *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("run")
    done = small_run(folder, "--tolerance", 0, "--output", folder / "out", "--json")
    return done, folder


def test_the_command_scores_every_step_of_every_policy_and_decides_alike(ran) -> None:
    done, _ = ran
    assert done.raised is None, done.raised
    found = done.json()
    keys = {
        "rows", "skipped", "mean_abs_pct_error", "median_abs_pct_error", "p90_abs_pct_error",
        "bias_pct", "within_10_pct", "groups", "rank_order_right", "order_measured",
        "order_predicted", "costs", "environment",
    }  # fmt: skip
    assert keys <= set(found)
    assert set(found["groups"]) == set(found["order_measured"]) == set(POLICIES)
    assert found["rows"] + found["skipped"] == 4 * 24
    assert found["same_decisions"] is True
    assert found["same_outputs"] is True
    for of in found["groups"].values():
        assert of["differing"] == {}
        assert of["hit_rate"]["measured"] == of["hit_rate"]["predicted"]
    moved = found["groups"]["lru"]["bytes_per_token"]
    assert moved["measured"] == moved["predicted"] > 0


def test_a_tolerance_of_0_answers_no(ran) -> None:
    done, _ = ran
    assert done.code == 1
    assert done.json()["passed"] is False


def test_the_folder_holds_the_record_the_steps_and_a_picture_and_no_experts(ran) -> None:
    done, folder = ran
    out = folder / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        validate_offload.PICTURE, "result.json", "steps.csv",
    ]  # fmt: skip
    assert json.loads((out / "result.json").read_text()) == done.json()
    lines = (out / "steps.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 24
    assert (out / validate_offload.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["out", "small.parquet"]


def test_the_answer_is_a_table_and_says_why_it_is_no(tmp_path: Path) -> None:
    done = small_run(tmp_path, "--rounds", 1, "--tolerance", 0)
    assert (done.raised, done.code) == (None, 1)
    for word in ("decided alike", *POLICIES, "fastest first, measured:", "not passed, tolerance 0"):
        assert word in done.out


def test_steps_of_a_quiet_machine_are_predicted(tmp_path: Path) -> None:
    """Experts of 768 KiB, a few seconds; a real run is several times as near."""
    sizes = ("--hidden", 256, "--intermediate", 256, "--dense", 1024)
    found = small_run(tmp_path, *sizes, "--json").json()
    share = max(of["robbed_share"] for of in found["groups"].values())
    if share > 0.05:
        pytest.skip(f"other programs took the cores for {share:.0%} of a step")
    assert found["median_abs_pct_error"] < 35


def test_what_cannot_run_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate_offload, "RUNTIME", "never.started")
    refused(small_run(tmp_path, "--slots", 1), "slots=1", "top_k=2")
    refused(small_run(tmp_path, "--slots", 9), "slots=9", "n_experts=8")
    refused(small_run(tmp_path, "--tokens", 9999), "tokens to run", "--warm-up")
    counts = ("--trace", counts_file(tmp_path))
    refused(moesim("validate", "offload", *counts), "running a trace", "token order")
    monkeypatch.setattr(validate_offload, "find_spec", lambda name: None)
    refused(small_run(tmp_path), "torch", "pip install 'moesim[kernels]'")


def test_what_the_runtime_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    refused(small_run(tmp_path, "--tier", "tape"), "tier='tape'", "direct")
    refused(small_run(tmp_path, "--folder", tmp_path / "nowhere"), "nowhere: no such folder")


def test_the_runtime_takes_no_option_that_it_does_not_know(asked: Asked) -> None:
    with pytest.raises(SimulationError, match="unexpected keyword argument 'speed'"):
        validate_offload.run_runtime(asked, {"rounds": 1, "speed": 2})


def test_the_record_of_the_runtime_is_one_that_is_read(asked: Asked, tmp_path: Path) -> None:
    spec = {"n_layers": 3, "n_experts": 8, "top_k": 2, "hidden": 16, "intermediate": 16,
            "dense": 16}  # fmt: skip
    options = {"spec": spec, "slots": 3, "warm_up": 20, "rounds": 1, "folder": str(tmp_path),
               "policies": ["lru"]}  # fmt: skip
    record = read_record(validate_offload.run_runtime(asked, options))
    assert isinstance(record, Record)
    assert list(record.policies) == ["lru"]
    assert compare(record, asked).same_decisions
