"""Routed experts as grouped GEMMs: signatures, launches, and the float32 loop that defines them.

`moe_ffn` is what an engine runs per layer: align, gate-and-up GEMM with SwiGLU in its epilogue,
down GEMM with the gate weight in its epilogue, sum over the top_k slots of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moesim_kernels.align import Alignment, align, align_reference
from moesim_kernels.errors import KernelError
from moesim_kernels.permute import sum_slots
from moesim_kernels.quantise import (
    GROUP,
    ExpertWeights,
    dequantise,
    fp8_rows,
    fp8_rows_reference,
    fp8_rows_to_float,
)
from moesim_kernels.tuning import Config, default_config

_FORMAT_CODE = {"dense": 0, "int8": 1, "int4": 2, "fp8": 3}


@dataclass(frozen=True, slots=True)
class Routed:
    """One batch's routing.

    ids    int[n_tokens, top_k], the expert of each slot; -1 where it is not held here
    gates  float32[n_tokens, top_k], the weight of each slot's output
    """

    ids: torch.Tensor
    gates: torch.Tensor

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.ids.shape != self.gates.shape:
            raise KernelError(
                f"ids: shape {list(self.ids.shape)}, gates: shape {list(self.gates.shape)}; "
                "expected both [tokens, top_k]"
            )


def grouped_gemm(
    x: torch.Tensor,
    weights: ExpertWeights,
    alignment: Alignment,
    n_slots: int,
    config: Config,
    *,
    swiglu: bool = False,
    gates: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each slot's row of x times its expert's matrix.

    x        [n_rows, n_in], contiguous; slot s reads row s // (n_slots / n_rows)
    swiglu   the matrix stacks gate over up; the result is silu(gate) * up, half as wide
    gates    float32[n_slots] factors of the results, or None
    returns  [n_slots, n_out or n_out / 2] of x's dtype; rows of absent experts are undefined
    raises   KernelError on shapes, dtypes or blocks that do not fit

    With fp8 weights x is quantised on the way, one scale per row and 128 values.
    """
    _check(x, weights, n_slots, config)
    n_out = weights.n_out // 2 if swiglu else weights.n_out
    if swiglu and (weights.n_out % 2 or (weights.weight_format == "fp8" and n_out % GROUP)):
        raise KernelError(
            f"n_out={weights.n_out}: SwiGLU needs two equal halves, of whole {GROUP}-row blocks in "
            "fp8"
        )
    y = torch.empty(n_slots, n_out, dtype=x.dtype, device=x.device)
    if y.numel():
        _launch(_Launch(x, weights, y, alignment, config, swiglu, gates))
    return y


@dataclass(frozen=True, slots=True)
class _Launch:
    x: torch.Tensor
    weights: ExpertWeights
    y: torch.Tensor
    alignment: Alignment
    config: Config
    swiglu: bool
    gates: torch.Tensor | None


def _launch(call: _Launch, *, compile_only: bool = False) -> None:
    import triton
    from moesim_kernels.grouped_gemm_kernel import grouped_gemm_kernel

    weights, config, alignment = call.weights, call.config, call.alignment
    (n_slots, n_out), n_in = call.y.shape, weights.n_in
    x, x_scales = fp8_rows(call.x) if weights.weight_format == "fp8" else (call.x, call.x)
    scales = weights.values if weights.scales is None else weights.scales
    n_blocks_m = alignment.block_expert.numel()
    grid = (n_blocks_m * triton.cdiv(n_out, config.block_n),)
    grouped_gemm_kernel.run(
        *(x, x_scales, weights.values, scales, call.y),
        call.y if call.gates is None else call.gates,
        *(alignment.slots, alignment.block_expert, alignment.n_padded),
        *(n_slots, n_blocks_m, n_out, n_in, weights.values.stride(0), scales.stride(0)),
        SLOTS_PER_ROW=n_slots // x.shape[0],
        FORMAT=_FORMAT_CODE[weights.weight_format],
        SWIGLU=call.swiglu,
        WEIGHTED=call.gates is not None,
        EVEN_K=n_in % max(config.block_k, GROUP if weights.weight_format != "dense" else 1) == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.n_warps,
        num_stages=config.n_stages,
        grid=grid,
        warmup=compile_only,
    )


def _check(x: torch.Tensor, weights: ExpertWeights, n_slots: int, config: Config) -> None:
    if x.dim() != 2 or x.shape[1] != weights.n_in or not x.is_contiguous():
        raise KernelError(f"x: shape {list(x.shape)}, expected contiguous [rows, {weights.n_in}]")
    if x.shape[0] and n_slots % x.shape[0]:
        raise KernelError(f"n_slots={n_slots} is not a multiple of x's {x.shape[0]} rows")
    if weights.weight_format == "dense" and weights.values.dtype != x.dtype:
        raise KernelError(f"x is {x.dtype}, dense weights are {weights.values.dtype}")
    largest = GROUP if weights.weight_format != "dense" else config.block_k
    smallest = 32 if weights.weight_format == "int4" else 16  # half a step is one nibble's tile
    if not smallest <= config.block_k <= largest:
        raise KernelError(
            f"block_k={config.block_k}: {weights.weight_format} needs {smallest}..{largest}"
        )


def moe_ffn(
    x: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    routed: Routed,
    config: Config | None = None,
) -> torch.Tensor:
    """The routed experts of one layer.

    x        [n_tokens, hidden], contiguous
    gate_up  [n_experts, 2 * intermediate, hidden], gate rows first
    down     [n_experts, hidden, intermediate]
    config   for both GEMMs; None takes `tuning.default_config`
    returns  [n_tokens, hidden] of x's dtype, the gate-weighted sum over each token's experts
    raises   KernelError on shapes, dtypes or blocks that do not fit
    """
    if routed.ids.shape[0] != x.shape[0]:
        raise KernelError(f"ids: {routed.ids.shape[0]} tokens, x has {x.shape[0]}")
    if gate_up.n_out != 2 * down.n_in or gate_up.n_experts != down.n_experts:
        raise KernelError(
            f"gate_up: {gate_up.n_experts} experts of {gate_up.n_out} rows, expected "
            f"{down.n_experts} of {2 * down.n_in}"
        )
    n_slots, n_experts = routed.ids.numel(), gate_up.n_experts
    config = config or default_config(n_slots, n_experts, gate_up.weight_format)
    alignment = align(routed.ids, n_experts, config.block_m)
    inner = grouped_gemm(x, gate_up, alignment, n_slots, config, swiglu=True)
    gates = routed.gates.float().contiguous().reshape(-1)
    rows = grouped_gemm(inner, down, alignment, n_slots, config, gates=gates)
    return sum_slots(rows, routed.ids)


def compile_moe_ffn(
    x: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    routed: Routed,
    config: Config,
) -> None:
    """Compile both GEMMs of `moe_ffn` and launch neither; arguments as there.

    Inside `triton.AsyncCompileMode` its threads compile, and this returns at once.
    """
    n_slots = routed.ids.numel()
    alignment = align_reference(routed.ids, gate_up.n_experts, config.block_m)
    inner, y = x.new_empty(n_slots, down.n_in), x.new_empty(n_slots, down.n_out)
    gates = routed.gates.float().contiguous().reshape(-1)
    for call in (
        _Launch(x, gate_up, inner, alignment, config, True, None),
        _Launch(inner, down, y, alignment, config, False, gates),
    ):
        _check(call.x, call.weights, n_slots, config)
        _launch(call, compile_only=True)


def moe_ffn_reference(
    x: torch.Tensor, gate_up: ExpertWeights, down: ExpertWeights, routed: Routed
) -> torch.Tensor:
    """What `moe_ffn` computes: a loop over experts in float32 on the dequantised weights.

    fp8 weights round the input of both GEMMs to fp8, as the kernel does.
    """
    matrices, backs = dequantise(gate_up), dequantise(down)
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(gate_up.n_experts):
        token, choice = (routed.ids == expert).nonzero(as_tuple=True)
        if not token.numel():
            continue
        gate, up = (_input(x[token], gate_up) @ matrices[expert].T).chunk(2, 1)
        inner = (torch.nn.functional.silu(gate) * up).to(x.dtype)
        out = _input(inner, down) @ backs[expert].T
        y.index_add_(0, token, out * routed.gates[token, choice, None].float())
    return y


def _input(x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    if weights.weight_format == "fp8":
        return fp8_rows_to_float(*fp8_rows_reference(x))
    return x.float()
