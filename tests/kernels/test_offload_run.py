"""The runtime: the same result under every policy, every request accounted for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch", reason="needs torch (extra `kernels`)")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from moesim_kernels.errors import KernelError  # noqa: E402
from moesim_kernels.offload.policy import POLICIES, most_frequent  # noqa: E402
from moesim_kernels.offload.run import (  # noqa: E402
    Measured,
    RunOptions,
    Session,
    run_stack,
)
from moesim_kernels.offload.stack import Stack, StackSpec, open_stack  # noqa: E402

LAYERS, EXPERTS, K = 3, 7, 2
SPEC = StackSpec(
    n_layers=LAYERS, n_experts=EXPERTS, top_k=K, hidden=32, intermediate=24, dense=40, seed=4
)
Ids = npt.NDArray[np.int64]
few = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory):
    with open_stack(SPEC, tmp_path_factory.mktemp("experts")) as held:
        yield held


def random_ids(seed: int, n_tokens: int) -> Ids:
    """Some experts are chosen far more often than others."""
    rng = np.random.default_rng(seed)
    wanted = rng.gumbel(size=(n_tokens, LAYERS, EXPERTS)) + 2 * rng.random((LAYERS, EXPERTS))
    return np.argsort(-wanted, axis=2)[:, :, :K]


def guesses(seed: int, ids: Ids) -> Ids:
    """Right half of the time, else another expert or none."""
    rng = np.random.default_rng([seed, 1])
    return np.where(rng.random(ids.shape) < 0.5, ids, rng.integers(-1, EXPERTS, ids.shape))


def run(stack: Stack, ids: Ids, policy: str, slots: int, **changed: object) -> Measured:
    predicted = changed.pop("predicted", guesses(0, ids))
    return run_stack(stack, ids, policy, slots, predicted, RunOptions(**changed))


def resident_outputs(stack: Stack, ids: Ids) -> npt.NDArray[np.float64]:
    """All experts at hand, float64 and numpy."""

    def silu(x):
        return x / (1 + np.exp(-x))

    def norm(x):
        return x / np.sqrt((x**2).mean() + 1e-6)

    def exact(weights):
        return [w.double().numpy() for w in weights]

    outputs = []
    for token, x in enumerate(stack.inputs(len(ids)).double().numpy()):
        for layer in range(LAYERS):
            up, down = exact(stack.dense[layer])
            x = x + down @ silu(up @ norm(x))
            parts = []
            for expert in ids[token, layer]:
                both, down = exact(stack.load(layer, int(expert)))
                gate, value = np.split(both @ norm(x), 2)
                parts.append(down @ (silu(gate) * value))
            x = x + np.mean(parts, axis=0)
        outputs.append(x)
    return np.array(outputs)


@pytest.mark.parametrize("tier", ["auto", "buffered", "mapped"])
@pytest.mark.parametrize("slots", [K, 4, EXPERTS])
def test_every_policy_computes_what_a_run_with_all_experts_at_hand_computes(
    stack: Stack, tier: str, slots: int
) -> None:
    ids = random_ids(1, 8)
    expected = resident_outputs(stack, ids)
    runs = [run(stack, ids, policy, slots, tier=tier) for policy in POLICIES]
    for measured in runs:
        assert measured.outputs.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert torch.equal(measured.outputs, runs[0].outputs)


@few
@given(seed=st.integers(0, 999), slots=st.integers(K, EXPERTS), warm_up=st.integers(0, 5))
def test_every_request_is_a_hit_or_a_miss_and_every_read_is_counted(
    stack: Stack, seed: int, slots: int, warm_up: int
) -> None:
    ids = random_ids(seed, 8)
    for policy in POLICIES:
        measured = run(stack, ids, policy, slots, warm_up=warm_up)
        assert measured.hits.shape == (8 - warm_up, LAYERS)
        assert (measured.hits + measured.misses == K).all()
        assert (measured.late <= measured.hits).all()
        reads = (measured.misses + measured.prefetched).sum(1) - measured.dropped
        assert (measured.bytes_read == reads * SPEC.expert_bytes).all()
        if policy != "lru_prefetch":
            assert not measured.prefetched.any()
            assert not measured.late.any()
            assert (measured.bytes_read == measured.misses.sum(1) * SPEC.expert_bytes).all()
            assert ((measured.stall_s > 0) == (measured.misses > 0)).all()
        assert (measured.stall_s <= measured.layer_s).all()
        assert (measured.layer_s.sum(1) <= measured.step_s).all()
    assert not run(stack, ids, "on_demand", slots).hits.any()


def lru_misses(ids: Ids, slots: int) -> Ids:
    """Longest unused first, written out."""
    misses = np.zeros(ids.shape[:2], np.int64)
    for layer in range(LAYERS):
        recent: list[int] = []
        for token, chosen in enumerate(ids[:, layer].tolist()):
            misses[token, layer] = sum(expert not in recent for expert in chosen)
            recent = ([e for e in recent if e not in chosen] + chosen)[-slots:]
    return misses


@few
@given(seed=st.integers(0, 999), slots=st.integers(K, EXPERTS))
def test_misses_are_those_of_the_policy_and_more_slots_never_add_any(
    stack: Stack, seed: int, slots: int
) -> None:
    ids = random_ids(seed, 10)
    lru = run(stack, ids, "lru", slots)
    assert (lru.misses == lru_misses(ids, slots)).all()
    pinned = most_frequent(ids, EXPERTS, slots)
    static = run(stack, ids, "static", slots)
    out = [[[e not in pinned[x] for e in row[x]] for x in range(LAYERS)] for row in ids]
    assert (static.misses == np.sum(out, axis=2)).all()
    if slots < EXPERTS:
        for policy, fewer in (("lru", lru), ("static", static)):
            assert run(stack, ids, policy, slots + 1).misses.sum() <= fewer.misses.sum()
    assert not run(stack, ids, "static", EXPERTS).misses.any()


def test_pinned_experts_are_those_chosen_most_often_lowest_id_first_among_equals() -> None:
    ids = np.array([[[3, 5]], [[3, 1]], [[5, 0]], [[2, 4]]])
    assert most_frequent(ids, 7, 4).tolist() == [[3, 5, 0, 1]]


def test_static_pins_what_the_warm_up_chose(stack: Stack) -> None:
    ids = np.zeros((6, LAYERS, K), np.int64) + [0, 1]
    ids[4:] = [5, 6]
    assert not run(stack, ids, "static", K, warm_up=4).hits.any()
    assert run(stack, ids, "static", K).hits[:4].all()


@few
@given(seed=st.integers(0, 999), slots=st.integers(K, EXPERTS), warm_up=st.integers(1, 7))
def test_tokens_that_only_warm_up_leave_the_same_behind_as_tokens_that_run(
    stack: Stack, seed: int, slots: int, warm_up: int
) -> None:
    ids = random_ids(seed, 9)
    for policy in ("on_demand", "lru", "lru_prefetch"):
        whole = run(stack, ids, policy, slots)
        rest = run(stack, ids, policy, slots, warm_up=warm_up)
        for name in ("hits", "misses", "prefetched", "outputs"):
            assert (getattr(rest, name) == getattr(whole, name)[warm_up:]).all(), name


@few
@given(seed=st.integers(0, 999), slots=st.integers(K, EXPERTS))
def test_right_predictions_leave_misses_in_the_first_layer_only(
    stack: Stack, seed: int, slots: int
) -> None:
    ids = random_ids(seed, 8)
    right = run(stack, ids, "lru_prefetch", slots, predicted=ids)
    plain = run(stack, ids, "lru", slots)
    assert not right.misses[:, 1:].any()
    assert (right.misses[:, 0] == plain.misses[:, 0]).all()
    assert (right.prefetched[:, :-1] == plain.misses[:, 1:]).all()
    assert not right.prefetched[:, -1].any()
    nothing = run(stack, ids, "lru_prefetch", slots, predicted=np.full_like(ids, -1))
    assert (nothing.misses == plain.misses).all()
    assert not nothing.prefetched.any()


def test_what_is_decided_never_depends_on_how_long_anything_took(stack: Stack) -> None:
    ids = random_ids(5, 20)
    runs = [run(stack, ids, "lru_prefetch", 3, tier=t) for t in ("auto", "mapped", "auto")]
    for again in runs[1:]:
        for name in ("hits", "misses", "prefetched"):
            assert (getattr(again, name) == getattr(runs[0], name)).all()


def test_a_run_can_stop_between_tokens_and_ends_with_the_last(stack: Stack) -> None:
    ids = random_ids(6, 9)
    whole = run(stack, ids, "lru_prefetch", 4, warm_up=3)
    with Session(stack, ids, "lru_prefetch", 4, guesses(0, ids), RunOptions(3)) as session:
        assert session.n_tokens == 6
        for done in (4, 6, 6):
            session.advance(4)
            assert len(session.measured().step_s) == done
        measured = session.measured()
    assert (measured.misses == whole.misses).all()
    assert torch.equal(measured.outputs, whole.outputs)


def test_a_stack_of_one_layer_and_one_expert_a_token_runs(tmp_path: Path) -> None:
    spec = StackSpec(n_layers=1, n_experts=2, top_k=1, hidden=8, intermediate=8, dense=8)
    ids = np.array([[[0]], [[1]], [[0]]])
    with open_stack(spec, tmp_path) as one:
        assert run_stack(one, ids, "lru", 1).misses.sum() == 3
        assert run_stack(one, ids, "lru", 2).misses.sum() == 2
        assert run_stack(one, ids, "lru_prefetch", 1, ids).misses.sum() == 3


def test_bfloat16_runs_too(tmp_path: Path) -> None:
    spec = StackSpec(3, EXPERTS, K, 32, 24, 40, "bfloat16")
    ids = random_ids(0, 4)
    with open_stack(spec, tmp_path) as half:
        runs = [run(half, ids, policy, 3) for policy in POLICIES]
    assert all(torch.equal(one.outputs, runs[0].outputs) for one in runs)
    assert runs[0].outputs.dtype == torch.bfloat16
    assert runs[0].outputs.isfinite().all()


def wrong(at: tuple[int, ...], value: int) -> Ids:
    ids = random_ids(0, 4)
    ids[at] = value
    return ids


GOOD = random_ids(0, 4)
REFUSED = {
    "fewer slots than top-k": (GOOD, "lru", 1, GOOD, 0, "slots=1, expected top_k=2"),
    "more slots than experts": (GOOD, "lru", 8, GOOD, 0, "slots=8, expected .*n_experts=7"),
    "an id too large": (wrong((2, 1, 0), 7), "lru", 3, GOOD, 0, r"topk\[2, 1, 0\]=7, .*0 to 6"),
    "a missing id": (wrong((1, 0, 1), -1), "lru", 3, GOOD, 0, r"topk\[1, 0, 1\]=-1"),
    "an expert twice": (GOOD[:, :, [0, 0]], "lru", 3, GOOD, 0, "token 0, layer 0 names"),
    "too few layers": (GOOD[:, :2], "lru", 3, GOOD, 0, r"topk: shape \[4, 2, 2\], expected"),
    "another top-k": (GOOD[:, :, :1], "lru", 3, GOOD, 0, r"topk: shape \[4, 3, 1\]"),
    "no integers": (GOOD * 1.0, "lru", 3, GOOD, 0, "topk: float64, expected integers"),
    "all tokens warm up": (GOOD, "lru", 3, GOOD, 4, "warm_up=4, expected 0 to 3"),
    "an unknown policy": (GOOD, "mru", 3, GOOD, 0, "policy='mru', expected one of on_demand"),
    "nothing predicted": (GOOD, "lru_prefetch", 3, None, 0, "predicted: not given"),
    "fewer predicted": (GOOD, "lru_prefetch", 3, GOOD[1:], 0, r"predicted: shape \[3, 3, 2\]"),
    "more predicted than slots": (
        GOOD, "lru_prefetch", 3, np.tile(GOOD, 2), 0, r"\[4, 3, 4\].*at most slots=3"
    ),
    "a prediction below -1": (
        GOOD, "lru_prefetch", 3, wrong((0, 0, 0), -2), 0, r"predicted\[0, 0, 0\]=-2"
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "policy", "slots", "predicted", "warm_up", "message"), REFUSED.values(), ids=REFUSED
)
def test_what_does_not_fit_is_refused_in_one_line(
    stack: Stack, ids: Ids, policy: str, slots: int, predicted: Ids, warm_up: int, message: str
) -> None:
    with pytest.raises(KernelError, match=message) as refusal:
        run_stack(stack, ids, policy, slots, predicted, RunOptions(warm_up))
    assert "\n" not in str(refusal.value)


def test_settings_of_torch_are_as_before_after_a_run(stack: Stack) -> None:
    before = torch.get_num_threads(), torch.is_inference_mode_enabled()
    run(stack, GOOD, "lru", 3)
    with pytest.raises(KernelError):
        run(stack, GOOD, "lru", 1)
    assert (torch.get_num_threads(), torch.is_inference_mode_enabled()) == before
