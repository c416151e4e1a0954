"""What a run takes follows from its parts: a queue of reads beside a line of computations.

The prediction below knows the costs of the parts and what was asked for, not what was measured.
How near it comes on a quiet machine is shown by `moesim validate offload`; here parts of known
length make it exact, and real ones show that nothing large is left out.
"""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch", reason="needs torch (extra `kernels`)")

from moesim_kernels.errors import KernelError  # noqa: E402
from moesim_kernels.offload import calibrate, compute, measure, run, storage  # noqa: E402
from moesim_kernels.offload.measure import MeasureOptions  # noqa: E402
from moesim_kernels.offload.policy import POLICIES, LruPrefetch, Policy, policy_of  # noqa: E402
from moesim_kernels.offload.run import RunOptions, run_stack  # noqa: E402
from moesim_kernels.offload.stack import Stack, StackSpec, open_stack  # noqa: E402

SPEC = StackSpec(n_layers=3, n_experts=8, top_k=2, hidden=32, intermediate=24, dense=40)
READ_S, DENSE_S, EXPERT_S = 0.006, 0.009, 0.002
Ids = npt.NDArray[np.int64]


def drawn_ids(n_tokens: int, spec: StackSpec, seed: int = 0) -> Ids:
    rng = np.random.default_rng(seed)
    wanted = rng.gumbel(size=(n_tokens, spec.n_layers, spec.n_experts))
    wanted += 3 * rng.random((spec.n_layers, spec.n_experts))
    return np.argsort(-wanted, axis=2)[:, :, : spec.top_k]


def skip_unless_calm(step_s: object, robbed_s: object) -> None:
    """Times of a run that other programs robbed of its cores say nothing about its parts."""
    share = np.median(np.asarray(robbed_s) / np.asarray(step_s))
    if share > 0.05:
        pytest.skip(f"other programs took the cores for {share:.0%} of a step")


class Disk:
    """The background reader as the run promises it, in simulated time."""

    def __init__(self, read_s: float) -> None:
        self.read_s, self.free = read_s, 0.0
        self.urgent: deque[tuple[float, int]] = deque()
        self.ahead: deque[tuple[float, int]] = deque()
        self.ends: dict[int, float | None] = {}  # of each slot; None: not begun

    def begin(self, until: float) -> None:
        """Begin all reads that begin by then."""
        while queue := self.urgent or self.ahead:
            start = max(self.free, queue[0][0])
            if start > until:
                return
            self.free = start + self.read_s
            self.ends[queue.popleft()[1]] = self.free

    def ask(self, now: float, slots: list[int], queue: deque[tuple[float, int]]) -> None:
        self.begin(now)
        for slot in slots:
            self.ends[slot] = None
            queue.append((now, slot))

    def hurry(self, now: float, slots: list[int]) -> list[int]:
        self.begin(now)
        late = [slot for slot in slots if self.ends.get(slot, 0.0) is None]
        for slot in late:
            asked = next((one for one in self.ahead if one[1] == slot), None)
            if asked is not None:
                self.ahead.remove(asked)
                self.urgent.append((now, slot))
        return late + [slot for slot in slots if (self.ends.get(slot) or 0.0) > now]

    def end(self, slot: int) -> float:
        while (end := self.ends.get(slot, 0.0)) is None:
            self.begin(self.free)
        return end


def predicted_steps(
    policy: Policy, parts: tuple[float, float, float], ids: Ids, ahead: run.Ahead
) -> npt.NDArray[np.float64]:
    """Seconds of each token; parts, of a read, the dense part and an expert."""
    read_s, dense_s, expert_s = parts
    disk, now, steps = Disk(read_s), 0.0, []
    for of_token, expected in zip(ids.tolist(), ahead, strict=True):
        began = now
        for layer, chosen in enumerate(of_token):
            now += dense_s
            slots, order, demand, early = policy.decide(layer, chosen, expected[layer])
            if not policy.background:
                now += len(demand) * read_s + len(order) * expert_s
                continue
            hits = order[: len(order) - len(demand)]
            late = disk.hurry(now, [slots[i] for i in hits])
            disk.ask(now, [one.slot for one in demand], disk.urgent)
            disk.ask(now, [one.slot for one in early], disk.ahead)
            ready = [i for i in hits if slots[i] not in late]
            for i in ready + [i for i in order if i not in ready]:
                now = max(now, disk.end(slots[i])) + expert_s
        steps.append(now - began)
    return np.array(steps)


@pytest.fixture
def of_known_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads, dense parts and experts take what is written above, and do their work besides."""

    def lasting(seconds, call):
        def slept(*arguments):
            end = time.perf_counter() + seconds
            result = call(*arguments)
            time.sleep(max(end - time.perf_counter(), 0.0))
            return result

        return slept

    monkeypatch.setattr(storage.FileTier, "read", lasting(READ_S, storage.FileTier.read))
    monkeypatch.setattr(run, "dense_part", lasting(DENSE_S, compute.dense_part))
    monkeypatch.setattr(run, "expert_part", lasting(EXPERT_S, compute.expert_part))


def test_steps_of_known_parts_take_what_the_queue_says_under_every_policy(
    tmp_path: Path, of_known_length: None
) -> None:
    ids = drawn_ids(12, SPEC)
    rng = np.random.default_rng(1)
    guessed = np.where(rng.random(ids.shape) < 0.7, ids, rng.integers(-1, 8, ids.shape))
    took: dict[str, float] = {}
    with open_stack(SPEC, tmp_path) as stack:
        for name in POLICIES:
            measured = run_stack(stack, ids, name, 4, guessed)
            pinned = run.most_frequent(ids, SPEC.n_experts, 4)
            policy = policy_of(name, SPEC, 4, pinned)
            ahead = run.checked_ahead(SPEC, guessed, ids, 4, needed=policy.background)
            steps = predicted_steps(policy, (READ_S, DENSE_S, EXPERT_S), ids, ahead)
            took[name] = float(np.median(measured.step_s))
            least = SPEC.n_layers * (DENSE_S + SPEC.top_k * EXPERT_S)
            assert (measured.step_s >= least).all()
            if name != "lru_prefetch":
                assert (measured.stall_s >= measured.misses * READ_S).all()
            skip_unless_calm(measured.step_s, measured.robbed_s)
            error = np.median(np.abs(steps / measured.step_s - 1))
            assert error < 0.15, name  # sleeping takes a little longer than asked for
    assert took["lru_prefetch"] < took["lru"] < took["on_demand"]


def test_reads_run_beside_the_computation_when_they_are_predicted(
    tmp_path: Path, of_known_length: None
) -> None:
    ids = np.zeros((8, 3, 2), np.int64) + np.arange(8)[:, None, None] % 4 * 2 + [0, 1]
    with open_stack(SPEC, tmp_path) as stack:
        plain = run_stack(stack, ids, "lru", 2)
        early = run_stack(stack, ids, "lru_prefetch", 2, ids)
    assert plain.misses.sum() == early.misses.sum() + early.prefetched.sum() == 8 * 3 * 2
    assert (early.misses.sum(0) == [16, 0, 0]).all()
    skip_unless_calm(early.step_s, early.robbed_s)
    read_s = 2 * READ_S
    assert (plain.stall_s >= read_s).all()
    assert np.median(early.stall_s[:, 1:]) < 0.5 * read_s


def test_the_prediction_for_a_reader_that_is_never_idle_is_the_one_worked_out_by_hand() -> None:
    """All experts predicted and all missing: the reader sets the pace."""
    spec = StackSpec(2, 8, 2, 8, 8, 8)
    ids = np.arange(16).reshape(4, 2, 2) % 8
    ahead = run.checked_ahead(spec, ids, ids, 2, needed=True)
    steps = predicted_steps(LruPrefetch(spec, 2), (1.0, 0.25, 0.125), ids, ahead)
    # a token reads four experts in 4 s; the first two begin when its first dense part is over
    assert steps[0] == 0.25 + 4 + 0.125
    assert (steps[1:] == steps[0]).all()


MEDIUM = StackSpec(n_layers=4, n_experts=8, top_k=2, hidden=256, intermediate=256, dense=1024)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory):
    ids = drawn_ids(40, MEDIUM, seed=2)
    events: list[dict[str, object]] = []
    folder = tmp_path_factory.mktemp("experts")
    options = MeasureOptions(
        spec=MEDIUM, slots=4, warm_up=16, rounds=2, chunk=10, folder=folder, tier="auto"
    )
    return measure.measure(ids, ids, options, events.append), events, folder, ids


def test_what_was_measured_is_json_and_holds_every_policy_and_token(measured) -> None:
    result, events, folder, _ = measured
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert list(result["policies"]) == list(POLICIES)
    for of_policy in result["policies"].values():
        assert len(of_policy["step_s"]) == result["n_tokens"] == 24
        assert np.shape(of_policy["misses"]) == np.shape(of_policy["hits"]) == (24, 4)
        assert np.shape(of_policy["round_step_s"]) == (2, 24)
        within = np.array(of_policy["round_step_s"])
        assert (within.min(0) <= of_policy["step_s"]).all()
        assert (of_policy["step_s"] <= within.max(0)).all()
    assert result["same_outputs"] is True
    assert result["tier"] in ("direct", "buffered")
    assert {"load_average", "device", "huge_pages"} <= set(result["environment"])
    turns = [event for event in events if event["event"] == "turn"]
    assert [(turn["round"], turn["done"]) for turn in turns] == [
        (r, done) for r in (0, 1) for done in (10, 20, 24)
    ]
    assert list(folder.iterdir()) == []


def of_seconds(costs: dict[str, object]) -> dict[str, object]:
    return {name: cost for name, cost in costs.items() if name.endswith("_s")}


def test_costs_have_an_order_that_no_machine_turns_round(measured) -> None:
    costs = measured[0]["costs"]
    assert costs["expert_bytes"] == MEDIUM.expert_bytes == 786_432
    for cost in of_seconds(costs).values():
        for one in [cost] if "median" in cost else cost.values():
            assert 0 <= one["p10"] <= one["median"] <= one["p90"]
            assert one["middle"] >= 0
            assert one["n"] >= 5
    sizes = sorted(costs["read_bytes_s"], key=int)
    assert [int(size) for size in sizes] == [196_608, 393_216, 786_432, 1_572_864]
    assert costs["read_bytes_s"][sizes[-1]]["p10"] > costs["read_bytes_s"][sizes[0]]["p10"]
    assert costs["expert_tokens_s"]["8"]["p10"] > costs["expert_s"]["p10"] / 2


def test_the_parts_of_a_step_add_up_to_it(measured) -> None:
    """Far from what a quiet machine gives, so that a busy one passes too."""
    result, _, _, _ = measured
    seconds = of_seconds(result["costs"])
    costs = {name: cost["middle"] for name, cost in seconds.items() if "middle" in cost}
    loop_s = seconds["loop_s"]["inline"]["middle"]
    for name in ("on_demand", "static", "lru"):
        of_policy = result["policies"][name]
        misses = np.array(of_policy["misses"]).sum(1)
        layer_s = loop_s + costs["dense_s"] + MEDIUM.top_k * costs["expert_s"]
        steps = MEDIUM.n_layers * layer_s + misses * costs["read_s"]
        skip_unless_calm(of_policy["step_s"], of_policy["robbed_s"])
        error = np.median(np.abs(steps / np.array(of_policy["step_s"]) - 1))
        assert error < 0.5, name


def test_calibration_alone_gives_costs_in_moments(tmp_path: Path) -> None:
    with open_stack(SPEC, tmp_path) as stack:
        costs = calibrate.calibrate(stack, 12, reps=2)
    assert costs.read_s.n >= 5
    assert costs.read_s.p90 < 1
    assert set(costs.loop_s) == {"inline", "background"}
    assert list(costs.expert_tokens_s) == list(calibrate.TOKENS)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"slots": 1}, "slots=1, expected top_k=2"),
        ({"rounds": 0}, "rounds=0, expected at least 1"),
        ({"policies": ("lru", "mru")}, "policy='mru', expected some of on_demand"),
        ({"policies": ()}, "policies: none"),
        ({"tier": "tape"}, "tier='tape'"),
        ({"warm_up": 40}, "warm_up=40"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    usual: dict[str, object] = {"spec": SPEC, "slots": 4, "warm_up": 8, "folder": tmp_path}
    ids = drawn_ids(40, SPEC)
    with pytest.raises(KernelError, match=message):
        measure.measure(ids, ids, MeasureOptions(**(usual | changed)))
    assert list(tmp_path.iterdir()) == []


def test_reading_ahead_without_predictions_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    options = MeasureOptions(spec=SPEC, slots=4, warm_up=8, folder=tmp_path)
    with pytest.raises(KernelError, match="predicted: not given"):
        measure.measure(drawn_ids(40, SPEC), None, options)
    assert list(tmp_path.iterdir()) == []


def test_rounds_that_were_robbed_of_a_core_do_not_count_where_calm_ones_are() -> None:
    step_s = np.array([[1.0, 5.0, 2.0], [3.0, 1.0, 4.0], [2.0, 6.0, 9.0]])
    robbed_s = np.array([[0.0, 4.0, 0.5], [0.0, 0.0, 2.0], [0.0, 3.0, 4.5]])
    kept = measure._of_calm_rounds(step_s, {"step_s": step_s, "robbed_s": robbed_s})
    assert kept.tolist() == [2.0, 1.0, 2.0]


def test_a_captured_trace_runs_and_prefetch_hides_reads(shared: Path, tmp_path: Path) -> None:
    path = shared / "traces" / "gpt-oss-20b-decode.npz"
    if not path.exists():
        pytest.skip(f"needs {path.name}")
    with np.load(path, allow_pickle=False) as held:
        ids = held["topk"][:80, :4].astype(np.int64)
    spec = StackSpec(4, 32, 4, 64, 64, 64)
    with open_stack(spec, tmp_path) as stack:
        hits = {name: _hit_rate(stack, ids, name) for name in POLICIES}
    assert hits["on_demand"] == 0
    assert 0.3 < hits["lru"] < hits["lru_prefetch"] < 1


def _hit_rate(stack: Stack, ids: Ids, policy: str) -> float:
    return run_stack(stack, ids, policy, 12, ids, RunOptions(warm_up=40)).hit_rate
