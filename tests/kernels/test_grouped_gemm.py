"""The grouped GEMM against the float32 loop over experts, in every weight format."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moesim_kernels import quantise
from moesim_kernels.align import align
from moesim_kernels.errors import KernelError
from moesim_kernels.grouped_gemm import Routed, grouped_gemm, moe_ffn, moe_ffn_reference
from moesim_kernels.tuning import Config

SMALL = Config(16, 32, 32, 1, 4, 2)
MAKERS = {
    "dense": quantise.dense,
    "int8": quantise.int8,
    "int4": quantise.int4,
    "fp8": quantise.fp8,
}
# The interpreter multiplies bf16 tiles wrongly (triton 3.7 to 3.9), a device does not.
DTYPES = [torch.float32, torch.float16]
if os.environ.get("TRITON_INTERPRET") == "0":
    DTYPES.append(torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def _ids(kind: str, n_tokens: int, n_experts: int, top_k: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(7)
    scores = torch.rand(n_tokens, n_experts, generator=draw)
    if kind == "half the experts get nothing":
        scores[:, ::2] -= 2
    elif kind == "every token takes the last expert":
        scores[:, -1] += 2
    ids = scores.topk(top_k, 1).indices.int()
    if kind == "some experts are elsewhere":
        ids[ids == 1] = -1
        ids[0] = -1
    return ids


def _layer(weight_format: str, dtype: torch.dtype, shape: tuple[int, int, int], device: str):
    n_experts, hidden, inter = shape
    draw = torch.Generator().manual_seed(3)
    gate_up = torch.randn(n_experts, 2 * inter, hidden, generator=draw) / hidden**0.5
    down = torch.randn(n_experts, hidden, inter, generator=draw) / inter**0.5
    make = MAKERS[weight_format]
    return make(gate_up.to(dtype).to(device)), make(down.to(dtype).to(device))


def _worst(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over the largest value."""
    return float((y.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _check(case, weight_format: str, dtype: torch.dtype, device: str, config: Config) -> None:
    kind, n_tokens, top_k, shape = case
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(n_tokens, shape[1], generator=draw).to(dtype).to(device)
    gates = torch.rand(n_tokens, top_k, generator=draw).to(device)
    routed = Routed(_ids(kind, n_tokens, shape[0], top_k).to(device), gates)
    gate_up, down = _layer(weight_format, dtype, shape, device)
    y = moe_ffn(x, gate_up, down, routed, config)
    expected = moe_ffn_reference(x, gate_up, down, routed)
    assert y.dtype == dtype
    assert torch.isfinite(expected).all()
    assert expected.abs().max() > 0.01
    assert _worst(y, expected) <= TOLERANCE[dtype]


CASES = [
    ("any", 19, 2, (5, 48, 40)),  # neither width is a multiple of a block
    ("half the experts get nothing", 9, 2, (6, 64, 32)),
    ("every token takes the last expert", 40, 1, (3, 64, 32)),
    ("any", 1, 3, (7, 33, 17)),
    ("some experts are elsewhere", 12, 2, (4, 32, 32)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_sixteen_and_thirty_two_bit_experts_equal_the_loop(case, dtype, device) -> None:
    _check(case, "dense", dtype, device, SMALL)


QUANTISED = [
    ("any", 11, 2, (3, 176, 72)),  # a ragged last group in both GEMMs
    ("half the experts get nothing", 5, 2, (4, 128, 128)),
    ("every token takes the last expert", 20, 1, (3, 128, 48)),
    ("any", 1, 2, (3, 256, 40)),
]


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", QUANTISED, ids=lambda case: f"{case[0]}-{case[1]}")
def test_weight_only_formats_equal_the_loop_on_dequantised_weights(
    case, dtype, weight_format, device
) -> None:
    _check(case, weight_format, dtype, device, Config(16, 64, 128))


def test_a_nibble_in_the_last_mantissa_bits_is_exact() -> None:
    # What the kernel does with the bits; the interpreter runs it in fp16 and fp32 only.
    nibble = torch.arange(16, dtype=torch.int16)
    for dtype, bits, offset in ((torch.bfloat16, 0x4300, 136), (torch.float16, 0x6400, 1032)):
        assert ((nibble | bits).view(dtype) - offset).tolist() == list(range(-8, 8))


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("block_k", [32, 64])
def test_a_group_may_take_several_steps(weight_format, block_k, device) -> None:
    case = ("any", 3, 2, (2, 176, 72))
    _check(case, weight_format, torch.float16, device, Config(16, 64, block_k))


@pytest.mark.parametrize(
    "case",
    [
        ("any", 5, 2, (2, 136, 128)),
        ("half the experts get nothing", 3, 1, (3, 256, 128)),
        ("any", 1, 2, (3, 128, 256)),
    ],
    ids=lambda case: f"{case[0]}-{case[1]}-{case[3]}",
)
def test_fp8_blocks_equal_the_loop_on_fp8_inputs(case, device) -> None:
    # The second GEMM rounds its input to fp8: a last-bit difference of the first one moves a
    # value by one fp8 step (1/16), so only the mean error can be held tightly.
    kind, n_tokens, top_k, shape = case
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(n_tokens, shape[1], generator=draw).to(device)
    gate_up, _ = _layer("fp8", torch.float32, shape, device)
    ids = _ids(kind, n_tokens, shape[0], top_k).to(device)
    alignment = align(ids, shape[0], 16)
    y = grouped_gemm(x, gate_up, alignment, ids.numel(), Config(16, 128, 128))
    x_seen = quantise.fp8_rows_to_float(*quantise.fp8_rows_reference(x))
    w = quantise.dequantise(gate_up)
    expected = torch.stack([w[e] @ x_seen[t] for t, row in enumerate(ids) for e in row])
    assert _worst(y, expected) <= 2e-5
    gates = torch.rand(n_tokens, top_k, generator=draw).to(device)
    routed = Routed(ids, gates)
    layer = _layer("fp8", torch.float32, shape, device)
    y = moe_ffn(x, *layer, routed, Config(16, 128, 128))
    expected = moe_ffn_reference(x, *layer, routed)
    assert float((y - expected).norm() / expected.norm()) <= 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 128), (13, 300), (40, 512), (3, 7)])
def test_fp8_rows_in_one_launch_equal_the_reference(dtype, shape, device) -> None:
    draw = torch.Generator().manual_seed(11)
    # Rows of all sizes, with zeros and with values that become subnormal in e4m3.
    x = torch.randn(shape, generator=draw) * torch.logspace(-6, 4, shape[0])[:, None]
    x *= torch.logspace(0, -7, shape[1])
    x[0, : shape[1] // 2] = 0
    x = x.to(dtype).to(device)
    values, scales = quantise.fp8_rows(x)
    expected_values, expected_scales = quantise.fp8_rows_reference(x)
    torch.testing.assert_close(scales, expected_scales, rtol=2e-7, atol=0)
    if device == "cpu":  # where torch divides as exactly; a GPU multiplies by 1 / 448
        assert torch.equal(scales, expected_scales)
        assert torch.equal(values.float(), expected_values.float())
    step = 2 ** (expected_values.float().abs().clamp_min(2**-6).log2().floor() - 3)
    assert ((values.float() - expected_values.float()).abs() <= step).all()


def test_no_rows_make_no_fp8_rows(device) -> None:
    values, scales = quantise.fp8_rows(torch.zeros(0, 200, device=device))
    assert (values.shape, scales.shape) == ((0, 200), (0, 2))


def test_sweeping_row_blocks_together_changes_no_number(device) -> None:
    gate_up, _ = _layer("dense", torch.float32, (5, 48, 40), device)
    x = torch.randn(37, 48, generator=torch.Generator().manual_seed(1)).to(device)
    ids = _ids("any", 37, 5, 2).to(device)
    found = [
        grouped_gemm(x, gate_up, align(ids, 5, 16), 74, Config(16, 32, 32, group_m, 4, 2))
        for group_m in (1, 3, 64)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_default_configuration_serves_every_format(device) -> None:
    for weight_format in MAKERS:
        gate_up, down = _layer(weight_format, torch.float16, (2, 128, 128), device)
        x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).half().to(device)
        routed = Routed(_ids("any", 3, 2, 1).to(device), torch.ones(3, 1, device=device))
        expected = moe_ffn_reference(x, gate_up, down, routed)
        assert _worst(moe_ffn(x, gate_up, down, routed), expected) < 0.03


def test_no_tokens_make_an_empty_result(device) -> None:
    gate_up, down = _layer("dense", torch.float32, (3, 32, 16), device)
    routed = Routed(
        torch.zeros(0, 2, dtype=torch.int32, device=device), torch.zeros(0, 2, device=device)
    )
    assert moe_ffn(torch.zeros(0, 32, device=device), gate_up, down, routed).shape == (0, 32)


def test_what_does_not_fit_is_refused_by_name(device) -> None:
    gate_up, down = _layer("int4", torch.float16, (2, 128, 64), device)
    x = torch.zeros(2, 128, dtype=torch.float16, device=device)
    routed = Routed(_ids("any", 2, 2, 1).to(device), torch.ones(2, 1, device=device))
    with pytest.raises(KernelError, match="block_k=256: int4 needs 32..128"):
        moe_ffn(x, gate_up, down, routed, Config(16, 32, 256))
    with pytest.raises(KernelError, match=r"x: shape \[2, 96\]"):
        moe_ffn(x[:, :96].contiguous(), gate_up, down, routed)
    with pytest.raises(KernelError, match="expected both"):
        Routed(routed.ids, torch.ones(2, 2, device=device))
    with pytest.raises(KernelError, match="x is torch.float16, dense weights are torch.float32"):
        moe_ffn(x, *_layer("dense", torch.float32, (2, 128, 64), device), routed)


@settings(max_examples=12, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 70), st.integers(1, 40)),
    n_tokens=st.integers(1, 24),
    top_k=st.integers(1, 6),
    kind=st.sampled_from(["any", "half the experts get nothing", "some experts are elsewhere"]),
)
def test_any_shape_and_routing_equals_the_loop(device, shape, n_tokens, top_k, kind) -> None:
    draw = torch.Generator().manual_seed(n_tokens)
    x = torch.randn(n_tokens, shape[1], generator=draw).to(device)
    ids = _ids(kind, n_tokens, shape[0], min(top_k, shape[0])).to(device)
    routed = Routed(ids, torch.rand(ids.shape, generator=draw).to(device))
    layer = _layer("dense", torch.float32, shape, device)
    y = moe_ffn(x, *layer, routed, SMALL)
    torch.testing.assert_close(y, moe_ffn_reference(x, *layer, routed), rtol=1e-4, atol=1e-5)
