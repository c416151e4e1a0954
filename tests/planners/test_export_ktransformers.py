"""KTransformers' fork picks exactly the plan's experts from our counts, and no others."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from planners.errors import PlanError
from planners.export import ktransformers, torch_file
from planners.export.projection import experts, with_slots_filled
from planners.residency_file import CacheEntry, ResidencyFile
from tests.planners.export_case import functions_of, plan_of, plans, wheel

torch = pytest.importorskip("torch")
QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def picked_by_the_fork(file: Path, ratio: float, n_dense: int) -> np.ndarray:
    """bool[n_layers, n_experts] as the fork picks: the top N of all counts, dense layers all."""
    counts = torch.load(file, map_location="cpu", weights_only=True)["logical_count"]
    assert counts.dim() == 3
    summed = counts.sum(dim=0).float()
    n_layers, n_experts = summed.shape
    budget = int((n_layers - n_dense) * n_experts * ratio)
    chosen = torch.zeros(summed.numel(), dtype=torch.bool)
    if budget:
        chosen[torch.topk(summed.flatten(), budget, sorted=False).indices] = True
    masks = chosen.view(n_layers, n_experts)
    masks[:n_dense] = True
    return np.asarray(masks.numpy())


def _ratio(flags: tuple[str, ...]) -> float:
    return float(flags[flags.index("--kt-gpu-experts-ratio") + 1])


@given(plan=plans())
@QUICK
def test_the_fork_picks_exactly_the_plans_experts_on_every_layer(
    plan: ResidencyFile, tmp_path: Path
) -> None:
    plan = _without_disk(plan)
    written = ktransformers.write(plan, tmp_path / "counts.pt")
    dense = plan.moe_layers[0]
    masks = picked_by_the_fork(written.file, _ratio(written.flags), dense)
    assert (masks[dense:] == experts(with_slots_filled(plan)).on_device).all()
    assert written.loss.lost_share == 0


@pytest.mark.parametrize("pinned", [0, 1, 7, 16])
def test_none_some_and_all_experts_can_be_on_the_device(pinned: int, tmp_path: Path) -> None:
    tier = np.where(np.arange(16) < pinned, 0, 1).reshape(2, 8)
    written = ktransformers.write(plan_of(tier, dense=1), tmp_path / "counts.pt")
    assert _ratio(written.flags) <= 1
    masks = picked_by_the_fork(written.file, _ratio(written.flags), 1)
    assert masks[1:].sum() == pinned


def test_slots_of_a_cache_the_fork_does_not_have_hold_the_most_used_experts() -> None:
    tier = np.array([[0, 1, 1, 1], [1, 1, 1, 0]])
    load = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.3, 0.1, 0.1]])
    plan = plan_of(tier, cache=CacheEntry(slots=[2, 1], policy="lru"), load=load)
    filled = experts(with_slots_filled(plan)).on_device
    assert filled.tolist() == [[True, False, True, True], [True, False, False, True]]


def test_the_number_survives_the_ratio_at_any_real_size() -> None:
    for layers, n_experts in ((94, 512), (58, 256), (61, 384), (32, 8)):
        total = layers * n_experts
        picked = [int(total * ktransformers.gpu_experts_ratio(n, layers, n_experts))
                  for n in range(total + 1)]  # fmt: skip
        assert picked == list(range(total + 1))


@pytest.mark.needs_wheel
@given(plan=plans())
@settings(QUICK, max_examples=15)
def test_the_forks_own_code_picks_them_too(plan: ResidencyFile, tmp_path: Path) -> None:
    plan = _without_disk(plan)
    written = ktransformers.write(plan, tmp_path / "counts.pt")
    masks = _fork_masks(plan, written.file, written.flags)
    assert masks.shape == (len(plan.layers), plan.n_experts)
    assert (
        masks[list(plan.moe_layers)].numpy() == experts(with_slots_filled(plan)).on_device
    ).all()


def _fork_masks(plan: ResidencyFile, file: Path, flags: tuple[str, ...]) -> torch.Tensor:
    """The masks of the fork's `_init_kt_gpu_experts_masks` and kt-kernel's generator."""
    known: dict = {
        "torch": torch,
        "logger": logging.getLogger("fork"),
        "dist": SimpleNamespace(is_initialized=lambda: False),
        "get_tensor_model_parallel_rank": lambda: 0,
        "_KT_GPU_EXPERTS_MASKS": None,
    }
    kernel = wheel("kt_kernel-*.whl", "kt-kernel==0.7.2")
    functions_of(kernel, "kt_kernel/experts_base.py", ["generate_gpu_experts_masks"], known)
    fork = wheel("sglang_kt-*.whl", "sglang-kt==0.7.2")
    member = "sglang/srt/layers/moe/kt_ep_wrapper.py"
    functions_of(fork, member, ["_init_kt_gpu_experts_masks"], known)
    config = SimpleNamespace(
        num_hidden_layers=len(plan.layers),
        num_experts=plan.n_experts,
        first_k_dense_replace=plan.moe_layers[0],
    )
    arguments = SimpleNamespace(
        get_hf_config=lambda: config,
        kt_gpu_experts_ratio=_ratio(flags),
        kt_num_gpu_experts=None,
        kt_expert_placement_strategy=flags[flags.index("--kt-expert-placement-strategy") + 1],
        init_expert_location=str(file),
    )
    masks: torch.Tensor = known["_init_kt_gpu_experts_masks"](arguments)
    return masks


@given(plan=plans())
@settings(QUICK, max_examples=15)
def test_torch_reads_the_tensor_that_was_written_without_it(
    plan: ResidencyFile, tmp_path: Path
) -> None:
    table = ktransformers.logical_count(plan, experts(plan))
    torch_file.write_tensor(tmp_path / "t.pt", "logical_count", table)
    loaded = torch.load(tmp_path / "t.pt", weights_only=True)
    assert list(loaded) == ["logical_count"]
    tensor = loaded["logical_count"]
    assert tensor.dtype == torch.int32
    assert tensor.is_contiguous()
    assert (tensor.numpy() == table).all()
    tensor += 1  # the storage is its own


def test_equal_plans_give_equal_bytes_and_the_sidecar_says_where_from(tmp_path: Path) -> None:
    plan = plan_of(np.array([[0, 1], [1, 0]]), dense=2, inputs={"trace": "abc"})
    first = ktransformers.write(plan, tmp_path / "a.pt")
    second = ktransformers.write(plan, tmp_path / "b.pt")
    assert first.file.read_bytes() == second.file.read_bytes()
    sidecar = json.loads(first.sidecar.read_text())
    assert sidecar["inputs"] == {"trace": "abc"}
    assert sidecar["loss"]["lost_share"] == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.pt", "a.provenance.json", "b.pt", "b.provenance.json",
    }  # fmt: skip


def test_the_formats_example_gives_its_ratio() -> None:
    """Five layers, the first dense, 8 experts; 8 of 32 on the GPU."""
    assert ktransformers.gpu_experts_ratio(8, 4, 8) == 8.5 / 32


def _good() -> np.ndarray:
    table = np.zeros((1, 3, 4), dtype=np.int32)
    table[0, 1:, 0] = 1
    return table


@pytest.mark.parametrize(
    ("spoil", "ratio", "expected"),
    [
        (lambda t: t[0], 2.5 / 8, "has shape"),
        (lambda t: t[:, 1:], 2.5 / 8, "has shape"),
        (lambda t: t.astype(np.float32), 2.5 / 8, "expected int32"),
        (lambda t: t * 2, 2.5 / 8, "expected 0 and 1"),
        (lambda t: np.roll(t, 1, axis=1), 2.5 / 8, r"not zero on dense layers \[0\]"),
        (lambda t: t, 3.5 / 8, "picks 3 experts, expected the plan's 2"),
        (lambda t: t, 2.5 / 12, "picks 1 experts, expected the plan's 2"),
    ],
)
def test_counts_that_the_fork_would_place_otherwise_are_refused(
    spoil: object, ratio: float, expected: str
) -> None:
    with pytest.raises(PlanError, match=expected):
        ktransformers.check_counts(spoil(_good()), ratio, (1, 2), (3, 4))  # type: ignore[operator]


def test_good_counts_pass() -> None:
    ktransformers.check_counts(_good(), 2.5 / 8, (1, 2), (3, 4))


def test_counts_on_a_dense_layer_would_indeed_take_places(tmp_path: Path) -> None:
    table = _good()
    table[0, 0] = 5
    torch_file.write_tensor(tmp_path / "bad.pt", "logical_count", table)
    masks = picked_by_the_fork(tmp_path / "bad.pt", 2.5 / 8, 1)
    assert masks[1:].sum() == 0


def test_moe_layers_that_the_fork_cannot_know_are_refused(tmp_path: Path) -> None:
    plan = plan_of(np.array([[0, 1], [0, 1], [0, 1]]), dense=1)
    assert ktransformers.layer_rule(plan) == (1, 1)
    note = " ".join(ktransformers.write(plan, tmp_path / "x.pt").notes)
    assert "first_k_dense_replace=1 and moe_layer_freq=1" in note
    dense = plan.layers[0]
    every_second = [plan.layers[1], dense, plan.layers[2], dense, plan.layers[3], dense]
    assert ktransformers.layer_rule(_renumbered(plan, every_second)) == (0, 2)
    odd = [dense, plan.layers[1], dense, plan.layers[2], dense, plan.layers[3]]
    with pytest.raises(PlanError, match=r"moe_layers \[1, 3, 5\] of 6"):
        ktransformers.layer_rule(_renumbered(plan, odd))


def test_what_the_fork_cannot_do_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    plan = plan_of(np.array([[0, 1, 2, 2]]), spare=(0, 500, 10**6))
    with pytest.raises(PlanError, match="experts of the CPU takes 3000 bytes.*short by 1500"):
        ktransformers.write(plan, tmp_path / "x.pt")
    with pytest.raises(PlanError, match=r"expected \.pt"):
        ktransformers.write(plan, tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


def test_a_cache_and_mixed_bits_are_said_to_be_lost(tmp_path: Path) -> None:
    cache = CacheEntry(slots=[1], policy="lfu")
    plan = plan_of(np.array([[0, 1]]), bits=np.array([[8.0, 4.0]]), cache=cache)
    notes = " ".join(ktransformers.write(plan, tmp_path / "x.pt").notes)
    assert "mixes 4, 8 bits" in notes
    assert "cache (lfu, 1 slots) is not carried over" in notes


def _without_disk(plan: ResidencyFile) -> ResidencyFile:
    """The fork keeps what is not on the GPU in host memory: give it enough."""
    tiers = [entry.model_copy() for entry in plan.tiers]
    tiers[1].capacity_bytes = 10**9
    return plan.model_copy(update={"tiers": tiers})


def _renumbered(plan: ResidencyFile, layers: list) -> ResidencyFile:
    numbered = [row.model_copy(update={"layer": index}) for index, row in enumerate(layers)]
    return plan.model_copy(update={"layers": numbered})
