"""Rows of the routed experts on a stand-in: every kernel and format counts and computes right."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch (extra `kernels`)")

from moesim_kernels.bench import gpu_experts, peers  # noqa: E402
from moesim_kernels.bench.gpu_experts import Sizes, grouped_gemm, random_layer  # noqa: E402
from moesim_kernels.bench.gpu_points import gpu_points  # noqa: E402
from moesim_kernels.bench.measured import CannotMeasurePoint, Measured  # noqa: E402
from moesim_kernels.bench.points import Point  # noqa: E402
from moesim_kernels.bench.routing import CapturedRouting, drawn_ids, with_traces  # noqa: E402
from moesim_kernels.quantise import dequantise  # noqa: E402
from moesim_kernels.tuning import Config, Problem, default_config, save_table  # noqa: E402

from tests.kernels.stand_in import stand_in  # noqa: E402

SHAPE = {"tokens": 5, "hidden": 128, "inter": 128, "experts": 6, "topk": 2}
# The interpreter multiplies bf16 tiles wrongly; fp8 tiles it widens itself.
FORMATS = [("fp16", "fp16"), ("int8", "fp16"), ("int4", "fp16"), ("fp8", "fp8")]
PEERS = ["torch_grouped_mm", "torch_loop", "triton_kernels"]


@pytest.fixture(autouse=True)
def one_thread():
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("the stand-in is for the interpreter; the runner itself uses a GPU")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _point(stored: str, activation: str, kernel: str = "moesim", dist: str = "balanced", **shape):
    routing = {"dist": dist, "seed": 0}
    return Point("grouped_gemm", SHAPE | shape, {"w": stored, "a": activation}, routing, kernel)


def _check_row(measured: Measured, point: Point) -> dict:
    row = measured.row(point)
    counts = row["routing"]["counts"]
    ids = drawn_ids(point, ())
    assert sum(counts) == point.shape["tokens"] * point.shape["topk"]
    assert row["routing"]["distinct"] == len(np.unique(ids)) == len(counts)
    assert row["routing"]["max_load"] == np.bincount(ids.ravel()).max()
    assert row["lat_us"]["median"] > 0
    return row


@pytest.mark.parametrize(("stored", "activation"), FORMATS)
@pytest.mark.parametrize("dist", ["balanced", "power_law_1.2"])
def test_each_format_gives_a_row_that_counts_and_computes_right(
    stored: str, activation: str, dist: str
) -> None:
    point = _point(stored, activation, dist=dist)
    measured = grouped_gemm(point, stand_in())
    row = _check_row(measured, point)
    # Three matrices of 128 x 128 an expert, a float32 scale per 128 values or 128 x 128 block.
    values = {"fp16": 6 * 128**2, "int8": 3 * 128**2, "int4": 3 * 128**2 // 2, "fp8": 3 * 128**2}
    scales = {"fp16": 0, "int8": 4 * 3 * 128, "int4": 4 * 3 * 128, "fp8": 4 * 3}
    weights = (values[stored] + scales[stored]) * row["routing"]["distinct"]
    assert row["derived"] == {"bytes": weights + 10 * 2 * 128 * 2, "flops": 10 * 6 * 128 * 128}
    assert row["kernel"]["source"] == "moesim.triton.grouped"
    kind = gpu_experts.FORMATS[stored]
    assert row["kernel"]["config"] == default_config(10, 6, kind).to_json()
    assert row["check"]["max_rel_err"] < (0.05 if stored == "fp8" else 3e-3)


@pytest.mark.parametrize("kernel", PEERS[:2])
def test_torch_peers_move_the_same_bytes_and_compute_the_same_layer(kernel: str) -> None:
    point = _point("bf16", "bf16", kernel, dist="power_law_1.2", tokens=20)
    measured = grouped_gemm(point, stand_in())
    row = _check_row(measured, point)
    ours = grouped_gemm(_point("fp16", "fp16", dist="power_law_1.2", tokens=20), stand_in())
    assert (measured.n_bytes, measured.flops) == (ours.n_bytes, ours.flops)
    assert measured.routing == ours.routing
    assert row["check"]["max_rel_err"] < 2e-2
    assert row["kernel"]["config"] == {}
    assert (row["method"].get("spans") == "known to the host") == (kernel == "torch_loop")


def test_a_wrong_result_shows_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers.grouped_mm_ffn
    monkeypatch.setattr(peers, "grouped_mm_ffn", lambda *given: 1.5 * right(*given))
    measured = grouped_gemm(_point("bf16", "bf16", "torch_grouped_mm"), stand_in())
    assert measured.max_rel_err == pytest.approx(0.5, abs=0.02)
    monkeypatch.setattr(peers, "grouped_mm_ffn", lambda *given: right(*given) * float("nan"))
    with pytest.raises(CannotMeasurePoint, match="not finite"):
        grouped_gemm(_point("bf16", "bf16", "torch_grouped_mm"), stand_in())


def test_what_cannot_be_measured_is_said_in_words() -> None:
    if importlib.util.find_spec("triton_kernels") is None:
        with pytest.raises(CannotMeasurePoint, match="triton_kernels is not installed"):
            grouped_gemm(_point("bf16", "bf16", "triton_kernels"), stand_in())
    with pytest.raises(CannotMeasurePoint, match="takes 16-bit weights, not int4"):
        grouped_gemm(_point("int4", "bf16", "torch_loop"), stand_in())
    with pytest.raises(CannotMeasurePoint, match="'cublas' is unknown, known: moesim, torch_gr"):
        grouped_gemm(_point("bf16", "bf16", "cublas"), stand_in())
    with pytest.raises(CannotMeasurePoint, match="no kernel for int3 weights with bf16"):
        grouped_gemm(_point("int3", "bf16"), stand_in())
    with pytest.raises(CannotMeasurePoint, match="no kernel for bf16 weights with fp16"):
        grouped_gemm(_point("bf16", "fp16"), stand_in())
    with pytest.raises(CannotMeasurePoint, match="no captured routing"):
        grouped_gemm(_point("bf16", "bf16", dist="captured"), stand_in())
    with pytest.raises(CannotMeasurePoint, match="GiB do not fit"):
        grouped_gemm(_point("bf16", "bf16"), stand_in(memory_bytes=1 << 16))


def test_captured_routing_is_that_of_the_trace() -> None:
    topk = np.tile(np.array([4, 1], dtype=np.int16), (9, 3, 1))  # every token takes experts 4 and 1
    trace = CapturedRouting("trace.npz", topk)
    plain = _point("int8", "fp16", dist="captured", experts=6, topk=2)
    (point,) = with_traces([plain], [trace])
    assert point.routing["trace"] == "trace.npz"
    assert with_traces([replace(plain, shape={**plain.shape, "topk": 3})], [trace]) == []
    measured = grouped_gemm(point, stand_in([trace]))
    assert measured.routing == {"counts": [5, 5], "distinct": 2, "max_load": 5}
    assert measured.max_rel_err < 3e-3


@pytest.mark.parametrize("kernel", ["moesim", "torch_loop"])
def test_sets_of_weights_take_turns_until_the_cache_is_cold(kernel: str) -> None:
    point = _point("fp16", "fp16", kernel)
    once = grouped_gemm(point, stand_in())
    assert once.method["copies"] == 1
    busy = once.n_bytes - 10 * 2 * 128 * 2
    assert grouped_gemm(point, stand_in(l2_bytes=busy)).method["copies"] == 3
    seen: list[int] = []

    def watch(calls, graph):
        results = [call() for call in calls]
        seen.append(len({float(y.float().sum()) for y in results}))
        return once.timed, {"copies": len(calls)}

    assert grouped_gemm(point, stand_in(l2_bytes=busy, time=watch)).method["copies"] == 3
    assert seen == [3]  # different weights, not three views of one set


@pytest.mark.parametrize("stored", ["fp16", "int8", "int4", "fp8"])
@pytest.mark.parametrize(("hidden", "inter"), [(128, 128), (320, 192), (200, 72)])
def test_random_weights_occupy_what_is_reckoned_and_keep_the_variance(
    stored: str, hidden: int, inter: int
) -> None:
    sizes = Sizes(1, hidden, inter, 3, 2, gpu_experts.FORMATS[stored], torch.float16)
    layer = random_layer(sizes, torch.device("cpu"))
    assert layer.gate_up.n_bytes() + layer.down.n_bytes() == 3 * sizes.expert_bytes()
    for weights, n_in in ((layer.gate_up, hidden), (layer.down, inter)):
        wide = dequantise(weights)
        assert wide.shape[2] == n_in
        assert 0.8 < float(wide.std()) * n_in**0.5 < 1.25
        assert not torch.equal(wide[0], wide[1])


def test_a_tuned_table_beside_the_results_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    tuned = Config(32, 32, 64, 1, 8, 2)
    save_table(tmp_path / Problem(6, 128, "stand-in", "int4").file_name(), {8: tuned})
    monkeypatch.setattr(gpu_experts, "tuned_folder", lambda name: tmp_path)
    assert grouped_gemm(_point("int4", "fp16"), stand_in()).config == tuned.to_json()
    untuned = grouped_gemm(_point("int8", "fp16"), stand_in()).config
    assert untuned == default_config(10, 6, "int8").to_json()


def test_a_device_without_tables_has_no_folder() -> None:
    assert gpu_experts.tuned_folder("NVIDIA Nothing 9000") is None


def test_every_point_of_the_operator_is_of_a_kernel_and_format_known_here() -> None:
    points = gpu_points()["grouped_gemm"]
    for point in points:
        assert point.kernel in gpu_experts.IMPLEMENTATIONS
        assert gpu_experts._sizes(point).expert_bytes() > 0


def _loop_over(a, b, sizes, *, rows, activation=None, factors=None):
    """What a ragged product is: rows[i] of a times the matrix of the i-th sorted slot's expert."""
    expert = torch.repeat_interleave(torch.arange(len(sizes)), sizes.long())
    y = torch.stack([a[r].float() @ b[e].float() for r, e in zip(rows, expert, strict=True)])
    if activation:
        y = torch.nn.functional.silu(y[:, ::2]) * y[:, 1::2]
    return (y if factors is None else y * factors[:, None]).to(a.dtype)


def _matmul(a, b, bias, a_ragged_metadata, gather_indx=None, scatter_indx=None, gammas=None,
            fused_activation=None):  # fmt: skip
    rows = torch.arange(a.shape[0]) if gather_indx is None else gather_indx.long()
    y = _loop_over(a, b, a_ragged_metadata, rows=rows, activation=fused_activation, factors=gammas)
    return y if scatter_indx is None else torch.empty_like(y).index_copy_(0, scatter_indx.long(), y)


def _matmul_ogs(x, w, bias, routing_data, gather_indx=None, scatter_indx=None, gammas=None,
                fused_activation=None):  # fmt: skip
    rows = torch.arange(x.shape[0])
    if gather_indx is not None:
        rows = gather_indx.src_indx.long() // routing_data.n_expts_act
    y = _loop_over(
        x, w, routing_data.expt_data, rows=rows, activation=fused_activation, factors=gammas
    )
    if scatter_indx is None:
        return y
    by_slot = y[scatter_indx.src_indx.long()]
    return by_slot.view(-1, routing_data.n_expts_act, y.shape[1]).sum(1)


def _pretend(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    package = ModuleType("triton_kernels")
    package.__path__ = []
    specs = {"FnSpecs": lambda *a, **k: a, "FusedActivation": lambda *a: a}
    products, tensor = ModuleType(name), ModuleType("tensor")
    products.__dict__.update(specs | contents)
    tensor.make_ragged_tensor_metadata = lambda sizes, n: sizes
    monkeypatch.setitem(sys.modules, "triton_kernels", package)
    monkeypatch.setitem(sys.modules, f"triton_kernels.{name}", products)
    monkeypatch.setitem(sys.modules, "triton_kernels.tensor", tensor)


def _kinds() -> dict[str, object]:
    def routing_data(gate_scal, expt_hist, n_expts_tot, n_expts_act, expt_data):
        return SimpleNamespace(n_expts_act=n_expts_act, expt_data=expt_data)

    def pair(src_indx, dst_indx):
        return SimpleNamespace(src_indx=src_indx, dst_indx=dst_indx)

    return {"RoutingData": routing_data, "GatherIndx": pair, "ScatterIndx": pair}


def test_both_interfaces_of_triton_kernels_are_given_the_right_indices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    point = _point("bf16", "bf16", "triton_kernels", dist="power_law_1.2", tokens=7)
    with monkeypatch.context() as patch:
        _pretend(patch, "matmul", matmul=_matmul)
        assert grouped_gemm(point, stand_in()).max_rel_err < 2e-2
    with monkeypatch.context() as patch:
        _pretend(patch, "matmul_ogs", matmul_ogs=_matmul_ogs, **_kinds())
        assert grouped_gemm(point, stand_in()).max_rel_err < 2e-2


def test_another_version_of_triton_kernels_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    point = _point("bf16", "bf16", "triton_kernels")
    with monkeypatch.context() as patch:
        _pretend(patch, "matmul", matmul=lambda a, b: a)
        with pytest.raises(CannotMeasurePoint, match="triton_kernels: .*unexpected keyword"):
            grouped_gemm(point, stand_in())
    with monkeypatch.context() as patch:
        _pretend(patch, "routing")
        with pytest.raises(CannotMeasurePoint, match="another version: no triton_kernels.matmul"):
            grouped_gemm(point, stand_in())
