"""The search keeps the quickest configuration, and every candidate gives the right numbers."""

from __future__ import annotations

import pytest
import torch
from moesim_kernels import quantise
from moesim_kernels.autotune import SHARED_MEMORY_BYTES, Workload, candidates, fits, tune
from moesim_kernels.errors import KernelError
from moesim_kernels.grouped_gemm import Routed, moe_ffn, moe_ffn_reference
from moesim_kernels.tuning import Config, default_config

FORMATS = ["dense", "int8", "int4", "fp8"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("n_slots", [1, 512, 100_000])
def test_candidates_fit_differ_and_begin_with_the_default(kind: str, n_slots: int) -> None:
    workload = Workload(n_slots, 64, kind)
    made = candidates(workload)
    assert made[0] == default_config(n_slots, 64, kind)
    assert len(set(made)) == len(made) >= 20
    assert all(fits(config, kind, SHARED_MEMORY_BYTES) for config in made)
    few = candidates(workload, limit=7)
    assert len(few) == 7
    assert set(few) <= set(made)
    assert few == candidates(workload, limit=7)


def test_the_quickest_wins_and_refusals_are_counted() -> None:
    from triton.runtime.errors import OutOfResources

    configs = candidates(Workload(64, 8), limit=6)

    def time_s(config: Config) -> float:
        if config in configs[:2]:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 1.0 + configs.index(config) % 3

    tuned = tune(configs, time_s)
    assert (tuned.config, tuned.seconds) == (configs[3], 1.0)
    assert (tuned.n_tried, tuned.n_refused) == (6, 2)
    with pytest.raises(KernelError, match="refused all 2"):
        tune(configs[:2], time_s)


def test_other_errors_of_a_kernel_are_not_taken_for_refusals() -> None:
    def broken(config: Config) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tune([Config(16, 16, 16)], broken)


@pytest.mark.parametrize("kind", ["dense", "int4"])
def test_candidates_drawn_at_random_compute_the_same_layer(kind: str, device: str) -> None:
    draw = torch.Generator().manual_seed(0)
    make = {"dense": quantise.dense, "int4": quantise.int4}[kind]
    gate_up = make((torch.randn(2, 128, 128, generator=draw) / 11).half().to(device))
    down = make((torch.randn(2, 128, 64, generator=draw) / 8).half().to(device))
    x = torch.randn(6, 128, generator=draw).half().to(device)
    ids = torch.tensor([[0], [1], [1], [0], [1], [1]], device=device)
    routed = Routed(ids, torch.rand(6, 1, generator=draw).to(device))
    expected = moe_ffn_reference(x, gate_up, down, routed)
    for config in candidates(Workload(6, 2, kind), limit=5):
        y = moe_ffn(x, gate_up, down, routed, config).float()
        assert float((y - expected).abs().max() / expected.abs().max()) < 2e-3
