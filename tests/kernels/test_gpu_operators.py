"""Every GPU operator on a stand-in: whole rows, the right bytes and operations, right results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch", reason="needs torch (extra `kernels`)")

from moesim_kernels.bench import (  # noqa: E402
    accelerator,
    gpu_attention,
    gpu_copies,
    gpu_floor,
    gpu_router,
    timing,
)
from moesim_kernels.bench.accelerator import Accelerator  # noqa: E402
from moesim_kernels.bench.gpu_points import gpu_points  # noqa: E402
from moesim_kernels.bench.measured import CannotMeasurePoint, Measured  # noqa: E402
from moesim_kernels.bench.points import Point  # noqa: E402

from tests.kernels.stand_in import stand_in  # noqa: E402

ACTIVATIONS = "fp16"  # the interpreter multiplies bf16 tiles wrongly
SMALL_MEMORY = 1 << 24
FIELDS = {"schema", "op", "key", "device", "sw", "kernel", "shape", "dtype", "routing", "method",
          "lat_us", "telemetry", "derived", "check", "ok", "why"}  # fmt: skip


@pytest.fixture(autouse=True)
def little_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "POINT_SECONDS", 0.01)
    monkeypatch.setattr(gpu_floor, "REPLAYS", 3)
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("the stand-in is for the interpreter; the runner itself uses a GPU")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def row(
    do: Callable[[Point, Accelerator], Measured], point: Point, gpu: Accelerator | None = None
) -> dict:
    """The row as a reader of the file sees it."""
    made = do(point, gpu or stand_in(memory_bytes=SMALL_MEMORY)).row(point)
    assert set(made) == FIELDS
    assert made["device"] == {"name": "stand-in", "kind": "gpu"}
    assert 0 < made["lat_us"]["p10"] <= made["lat_us"]["median"] <= made["lat_us"]["p90"]
    return json.loads(json.dumps(made, allow_nan=False))


@pytest.mark.parametrize(("kind", "per_array"), [("copy", 2), ("set", 1), ("read", 1)])
def test_peak_bandwidth_counts_what_is_read_and_written(kind: str, per_array: int) -> None:
    made = row(gpu_floor.peak, Point("peak", {"kind": kind}))
    assert made["derived"] == {"bytes": per_array * SMALL_MEMORY // 16, "flops": 0}
    assert made["check"].get("max_rel_err", 0) == 0


@pytest.mark.parametrize(("kind", "in_bytes"), [("gemm_bf16", 2), ("gemm_fp8", 1)])
def test_a_peak_product_is_right_and_counts_two_operations_a_term(kind: str, in_bytes: int) -> None:
    try:
        made = row(gpu_floor.peak, Point("peak", {"kind": kind}))
    except CannotMeasurePoint as refusal:
        pytest.skip(f"{refusal}")
    side = made["kernel"]["config"]["m"]
    assert made["derived"] == {"bytes": side**2 * (2 * in_bytes + 2), "flops": 2 * side**3}
    assert made["check"]["max_rel_err"] < 1e-2


def test_sizes_of_the_peaks_follow_the_device() -> None:
    h200 = stand_in(memory_bytes=139 << 30, l2_bytes=50 << 20)
    assert (gpu_floor.array_bytes(h200), gpu_floor.gemm_side(h200)) == (1 << 30, 8192)
    large_cache = stand_in(memory_bytes=1 << 30, l2_bytes=40 << 20)
    assert gpu_floor.array_bytes(large_cache) >= 4 * (40 << 20)
    assert gpu_floor.gemm_side(stand_in(memory_bytes=SMALL_MEMORY)) == 256


@pytest.mark.parametrize("kind", ["graph", "eager"])
def test_a_launch_row_shares_its_time_among_its_kernels(kind: str) -> None:
    made = row(gpu_floor.launch, Point("launch", {"kind": kind, "kernels": 4}))
    each = made["derived"]["per_kernel_us"]
    assert each == pytest.approx(made["lat_us"]["median"] / 4, abs=2e-3)
    assert ("alone_us" in made["derived"]) == (kind == "graph")


@pytest.mark.parametrize("memory", ["pinned", "pageable"])
@pytest.mark.parametrize(("to", "times"), [("gpu", 1), ("cpu", 1), ("both", 2)])
@pytest.mark.parametrize("streams", [1, 4])
def test_a_copy_counts_both_directions_and_says_which_memory(
    memory: str, to: str, times: int, streams: int
) -> None:
    shape = {"bytes": 4096, "to": to, "memory": memory, "streams": streams}
    made = row(gpu_copies.copy, Point("copy", shape, {"w": "uint8"}))
    assert made["derived"] == {"bytes": times * 4096, "flops": 0}
    assert made["method"]["memory"] == "pageable"  # nothing can be pinned without CUDA


def test_the_parts_of_a_copy_are_even_and_cover_every_byte_once() -> None:
    for way in ("gpu", "cpu"):
        moves = gpu_copies._moves(way, 4098, 4, False, stand_in())
        assert [len(source) for _, source in moves] == [1025, 1025, 1024, 1024]
        for target, source in moves:
            source.fill_(7)
            target.copy_(source)
        whole = moves[0][0]._base
        assert (whole == 7).all()
        assert len(whole) == 4098


@pytest.mark.parametrize("pair", ["gemm+copy", "gemm+gemm", "stream+copy", "stream+gemm"])
def test_overlap_tells_alone_together_and_serial(pair: str) -> None:
    made = row(gpu_copies.overlap, Point("overlap", {"pair": pair, "bytes": 1 << 16}))
    derived, times = made["derived"], made["kernel"]["config"]["times"]
    one = {"gemm": (6 * 128**2, 2 * 128**3), "copy": (1 << 16, 0), "stream": (1 << 17, 0)}
    jobs = [one[name] for name in pair.split("+")]
    assert derived["bytes"] == sum(n * job[0] for n, job in zip(times, jobs, strict=True))
    assert derived["flops"] == sum(n * job[1] for n, job in zip(times, jobs, strict=True))
    assert derived["serial_us"] == pytest.approx(sum(derived["alone_us"]), abs=1e-2)
    assert len(derived["slowdown"]) == len(derived["together_us"]) == 2
    assert min(times) == 1


@pytest.mark.parametrize("factors", [(1.0, 1.0), (2.0, 1.0), (1.3, 1.8)])
@pytest.mark.parametrize("alone", [(1.0, 1.0), (1.0, 1.5), (2.0, 1.6)])
def test_contention_finds_the_factors_of_two_jobs_that_slow_each_other(alone, factors) -> None:
    # Jobs that advance at 1 / factor until one is done, and then the other at full speed.
    first = min(range(2), key=lambda job: alone[job] * factors[job])
    both = alone[first] * factors[first]
    ends = [both + taken - both / factor for taken, factor in zip(alone, factors, strict=True)]
    found = gpu_copies.contention(alone, ends)
    assert found["slowdown"] == pytest.approx(list(factors), rel=1e-3)
    assert found["serial_us"] == pytest.approx(1e6 * sum(alone))


def test_jobs_one_after_the_other_have_no_slowdown_of_the_second() -> None:
    assert gpu_copies.contention((1.0, 1.0), (1.0, 2.0))["slowdown"] == [1.0, None]


def _router_point(op: str, n_experts: int = 8, topk: int = 2, dist: str = "balanced") -> Point:
    shape = {"tokens": 6, "experts": n_experts, "topk": topk, "hidden": 40}
    return Point(op, shape, {"w": ACTIVATIONS, "a": ACTIVATIONS}, {"dist": dist, "seed": 0})


@pytest.mark.parametrize(("n_experts", "topk", "scoring"), [(8, 2, "softmax"), (256, 8, "sigmoid")])
def test_the_gate_chooses_as_plain_torch_does(n_experts: int, topk: int, scoring: str) -> None:
    made = row(gpu_router.gate, _router_point("gate", n_experts, topk))
    assert made["kernel"]["config"]["scoring"] == scoring
    assert made["derived"] == {
        "bytes": 6 * n_experts * 2 + 6 * topk * 8, "flops": 0, "equal_ids": 1.0
    }  # fmt: skip
    assert made["check"]["max_rel_err"] < 1e-5


def test_permuting_reads_each_row_once_and_writes_it_top_k_times() -> None:
    made = row(gpu_router.permute, _router_point("permute"))
    assert made["derived"] == {"bytes": 2 * 40 * (6 + 12) + 12 * 8, "flops": 0}
    assert made["check"]["max_rel_err"] == 0
    assert sum(made["routing"]["counts"]) == 12


def test_unpermuting_reads_top_k_rows_and_adds_them_weighted() -> None:
    made = row(gpu_router.unpermute, _router_point("unpermute"))
    assert made["derived"] == {"bytes": 2 * 40 * (6 + 12) + 12 * 8, "flops": 2 * 12 * 40}
    assert made["check"]["max_rel_err"] < 1e-3


@pytest.mark.parametrize("kernel", ["moesim", "torch_sdpa"])
def test_grouped_query_decode_reads_its_cache_once_and_is_right(kernel: str) -> None:
    shape = {"batch": 3, "context": 70, "heads": 4, "kv_heads": 2, "head_dim": 16, "kind": "gqa"}
    made = row(
        gpu_attention.decode, Point("attention_decode", shape, {"a": ACTIVATIONS}, {}, kernel)
    )
    cache, queries = 2 * 3 * 70 * 2 * 16 * 2, 3 * 4 * 16 * 2
    assert made["derived"] == {"bytes": cache + 2 * queries, "flops": 4 * 3 * 4 * 70 * 16}
    assert made["check"]["max_rel_err"] < 5e-3
    assert kernel.split("_")[0] in made["kernel"]["source"]


def test_caches_take_turns_until_they_exceed_the_last_level_cache() -> None:
    shape = {"batch": 1, "context": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "kind": "gqa"}
    point = Point("attention_decode", shape, {"a": ACTIVATIONS}, {}, "torch_sdpa")
    cache_bytes = 2 * 32 * 16 * 2
    made = row(gpu_attention.decode, point, stand_in(l2_bytes=2 * cache_bytes))
    assert made["method"]["copies"] == 6


def test_latent_decode_reads_latents_and_rotary_keys_once_and_is_right() -> None:
    shape = {"batch": 3, "context": 40, "heads": 4, "kv_rank": 32, "rope_dim": 8, "kind": "mla"}
    point = Point("attention_decode", shape, {"a": ACTIVATIONS}, {}, "moesim")
    made = row(gpu_attention.decode, point)
    moved = 2 * (3 * 40 * (32 + 8) + 3 * 4 * (32 + 8) + 3 * 4 * 32)
    flops = 2 * 3 * 4 * 40 * (32 + 8) + 2 * 3 * 4 * 40 * 32
    assert made["derived"] == {"bytes": moved, "flops": flops}
    assert made["check"]["max_rel_err"] < 5e-3


@pytest.mark.parametrize("heads", [4, 2])
def test_prefill_counts_the_causal_half_and_is_right(heads: int) -> None:
    shape = {"batch": 2, "tokens": 33, "heads": heads, "kv_heads": 2, "head_dim": 16}
    point = Point("attention_prefill", shape, {"a": ACTIVATIONS}, {}, "torch_sdpa")
    made = row(gpu_attention.prefill, point)
    assert made["derived"]["flops"] == 4 * 2 * heads * 16 * sum(range(1, 34))
    assert made["derived"]["bytes"] == 2 * 2 * 33 * 16 * (2 * heads + 2 * 2)
    assert made["check"]["max_rel_err"] < 5e-3


def test_a_cache_that_does_not_fit_refuses_its_point_only() -> None:
    shape = {"batch": 1, "context": 4096, "heads": 2, "kv_heads": 1, "head_dim": 64, "kind": "gqa"}
    point = Point("attention_decode", shape, {"a": ACTIVATIONS}, {}, "torch_sdpa")
    with pytest.raises(CannotMeasurePoint, match="do not fit this device"):
        gpu_attention.decode(point, stand_in(memory_bytes=1 << 20))


def test_every_kind_of_point_of_these_operators_has_its_function() -> None:
    points = gpu_points()
    assert {str(p.shape["kind"]) for p in points["peak"]} == set(gpu_floor._PEAKS)
    pairs = {str(p.shape["pair"]) for p in points["overlap"]}
    assert {job for pair in pairs for job in pair.split("+")} == set(gpu_copies._JOBS)
    assert {str(p.shape["to"]) for p in points["copy"]} == set(gpu_copies.WAYS)
    attention = points["attention_decode"] + points["attention_prefill"]
    assert {p.kernel for p in attention} == set(gpu_attention.SOURCES)
    assert {str(p.dtype["a"]) for p in attention} <= set(gpu_attention.DTYPES)
    assert accelerator.MOST_COPIES >= 3
