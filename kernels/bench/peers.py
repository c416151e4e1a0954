"""Other implementations of the routed experts, to measure ours against.

Each takes the same tokens, routing and weights as `moe_ffn` and returns the same sum. What depends
on the routing alone (sort order, offsets) is computed in the call, as an engine must, and rows are
moved by our own kernels, so that no peer loses by its permutation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from moesim_kernels.align import sort_slots
from moesim_kernels.bench.measured import CannotMeasurePoint
from moesim_kernels.grouped_gemm import Routed
from moesim_kernels.permute import permute, sum_slots, unpermute

Span = tuple[int, int, int]  # expert, and where its rows begin and end
Silu = torch.nn.functional.silu


def grouped_mm_ffn(
    rows: torch.Tensor, up: torch.Tensor, down: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Experts over rows in expert order, by `torch.nn.functional.grouped_mm`.

    rows  [n_rows, hidden]; up [experts, 2 * inter, hidden]; down [experts, hidden, inter]
    ends  int32[experts], where each expert's rows end
    """
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None)
    if grouped_mm is None:
        raise CannotMeasurePoint(f"torch {torch.__version__} has no grouped_mm")
    gate, value = grouped_mm(rows, up.transpose(1, 2), offs=ends).chunk(2, dim=1)
    inner = Silu(gate) * value
    out: torch.Tensor = grouped_mm(inner, down.transpose(1, 2), offs=ends)
    return out


def grouped_mm_moe(
    x: torch.Tensor, routed: Routed, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The layer by `grouped_mm_ffn`; x [tokens, hidden], weights as there."""
    moved = permute(x, routed.ids, up.shape[0])
    ends = moved.counts.cumsum(0).int()
    return unpermute(grouped_mm_ffn(moved.rows, up, down, ends), moved.position, routed.gates)


def spans_of(ids: torch.Tensor, n_experts: int) -> list[Span]:
    """Rows of each busy expert once the slots of ids are in expert order; reads the device."""
    counts = torch.bincount(ids.reshape(-1), minlength=n_experts).cpu()
    ends = counts.cumsum(0)
    return [
        (expert, end - count, end)
        for expert, (count, end) in enumerate(zip(counts.tolist(), ends.tolist(), strict=True))
        if count
    ]


def loop_moe(
    x: torch.Tensor, routed: Routed, up: torch.Tensor, down: torch.Tensor, spans: Sequence[Span]
) -> torch.Tensor:
    """The layer as one expert after another, with the host knowing each expert's rows."""
    moved = permute(x, routed.ids, up.shape[0])
    out = torch.empty_like(moved.rows)
    for expert, begin, end in spans:
        gate, value = torch.nn.functional.linear(moved.rows[begin:end], up[expert]).chunk(2, dim=1)
        torch.mm(Silu(gate) * value, down[expert].T, out=out[begin:end])
    return unpermute(out, moved.position, routed.gates)


def triton_kernels_moe(
    up: torch.Tensor, down: torch.Tensor
) -> Callable[[torch.Tensor, Routed], torch.Tensor]:
    """The layer by triton_kernels, with weights laid out as it wants them.

    up, down  as in `grouped_mm_ffn`; held anew as [experts, in, out] with `in` contiguous, gate and
              up columns taking turns
    raises    CannotMeasurePoint where it cannot be imported

    Knows `matmul` (from triton 3.7 on) and `matmul_ogs` with ragged metadata (3.6).
    """
    api = _triton_kernels()
    n_experts, both, hidden = up.shape
    turns = up.view(n_experts, 2, both // 2, hidden).transpose(1, 2).reshape(up.shape)
    matrices = turns.transpose(1, 2), down.transpose(1, 2)
    layer = _by_matmul if hasattr(api, "matmul") else _by_matmul_ogs
    return lambda x, routed: layer(api, x, routed, matrices)


def _triton_kernels() -> SimpleNamespace:
    """What is used of triton_kernels, and `swiglu`, the fused activation."""
    try:
        import triton_kernels.matmul as products
    except ImportError:
        products = None
    try:
        if products is None:
            import triton_kernels.matmul_ogs as products
        from moesim_kernels.bench.swiglu_kernel import silu_times_up
        from triton_kernels.tensor import make_ragged_tensor_metadata

        specs = products.FnSpecs("silu_times_up", silu_times_up, ("alpha",), reduction_n=2)
        swiglu = products.FusedActivation(specs, (1.0,))
    except ModuleNotFoundError as error:
        name = str(error.name)
        why = "is not installed" if name == "triton_kernels" else f"of another version: no {name}"
        raise CannotMeasurePoint(f"triton_kernels {why}") from None
    except (ImportError, AttributeError, TypeError) as error:
        raise CannotMeasurePoint(f"triton_kernels is of another version: {error}") from None
    return SimpleNamespace(**vars(products), ragged=make_ragged_tensor_metadata, swiglu=swiglu)


def _by_matmul(
    api: SimpleNamespace,
    x: torch.Tensor,
    routed: Routed,
    matrices: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    order, counts = sort_slots(routed.ids, matrices[0].shape[0])
    slot, n_slots = order.int(), order.numel()
    pieces = {"a_ragged_metadata": api.ragged(counts[:-1].int(), n_slots)}
    token = slot // routed.ids.shape[1]
    inner = api.matmul(
        x, matrices[0], None, **pieces, gather_indx=token, fused_activation=api.swiglu
    )
    gates = routed.gates.reshape(-1)[order]
    rows = api.matmul(inner, matrices[1], None, **pieces, scatter_indx=slot, gammas=gates)
    return sum_slots(rows.view(n_slots, -1), routed.ids)


def _by_matmul_ogs(
    api: SimpleNamespace,
    x: torch.Tensor,
    routed: Routed,
    matrices: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    n_experts, top_k = matrices[0].shape[0], routed.ids.shape[1]
    order, counts = sort_slots(routed.ids, n_experts)
    row = torch.empty_like(order)
    row[order] = torch.arange(order.numel(), device=order.device)
    slot, row, sizes = order.int(), row.int(), counts[:-1].int()
    gates = routed.gates.reshape(-1)[order]
    data = api.RoutingData(gates, sizes, n_experts, top_k, api.ragged(sizes, order.numel()))
    inner = api.matmul_ogs(
        x, matrices[0], None, data, gather_indx=api.GatherIndx(slot, row),
        fused_activation=api.swiglu,
    )  # fmt: skip
    y = api.matmul_ogs(
        inner, matrices[1], None, data, scatter_indx=api.ScatterIndx(row, slot), gammas=gates
    )
    return y.view(x.shape)
