"""The router's work on a GPU: the gate, and moving token rows into expert order and back."""

from __future__ import annotations

from functools import partial

import torch
from moesim_kernels.bench.accelerator import Accelerator
from moesim_kernels.bench.measured import Measured
from moesim_kernels.bench.points import Point
from moesim_kernels.bench.routing import drawn_ids, routing_of
from moesim_kernels.gate import GateRule, gate_reference
from moesim_kernels.gate import gate as run_gate
from moesim_kernels.permute import permute as run_permute
from moesim_kernels.permute import permute_reference, positions
from moesim_kernels.permute import unpermute as run_unpermute

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEEPSEEK_V3 = GateRule(8, "sigmoid", n_groups=8, groups_kept=4, scale=2.5)  # with a bias
CHECKED_TOKENS = 1024
INDEX_BYTES = WEIGHT_BYTES = 4


def rule_of(n_experts: int, topk: int) -> GateRule:
    """DeepSeek-V3's rule for top-8 of 256, else softmax and renormalised."""
    return DEEPSEEK_V3 if (n_experts, topk) == (256, 8) else GateRule(topk)


def gate(point: Point, gpu: Accelerator) -> Measured:
    """Warm logits to expert ids and weights, in one launch; `equal_ids` is the share of checked ids
    that plain torch chooses too, and the error is that of their weights.
    """
    n_tokens, n_experts, topk = (int(point.shape[name]) for name in ("tokens", "experts", "topk"))
    rule = rule_of(n_experts, topk)
    logits = torch.randn(n_tokens, n_experts, dtype=_dtype(point), device=gpu.device)
    bias = 0.1 * torch.randn(n_experts, device=gpu.device) if rule.scoring == "sigmoid" else None
    ids, weights = (of_all[:CHECKED_TOKENS] for of_all in run_gate(logits, rule, bias))
    expected_ids, expected = gate_reference(logits[:CHECKED_TOKENS], rule, bias)
    same = ids == expected_ids
    results = n_tokens * topk * (INDEX_BYTES + WEIGHT_BYTES)
    return gpu.measured(
        [partial(run_gate, logits, rule, bias)], source="moesim.triton.gate",
        n_bytes=logits.numel() * logits.element_size() + results,
        config={"scoring": rule.scoring, "groups": rule.n_groups, "kept": rule.groups_kept},
        derived={"equal_ids": round(float(same.float().mean()), 6)},
        max_rel_err=_error(weights[same], expected[same]),
    )  # fmt: skip


def permute(point: Point, gpu: Accelerator) -> Measured:
    """Sort the slots by expert and copy each token's row to its top-k places."""
    x, ids, n_experts = _tokens(point, gpu)
    made = run_permute(x, ids, n_experts)
    error = _error(made.rows, permute_reference(x, ids, n_experts))
    moved = (x.numel() + made.rows.numel()) * x.element_size() + 2 * ids.numel() * INDEX_BYTES
    del made
    return gpu.measured(
        [partial(run_permute, x, ids, n_experts)], source="moesim.triton.permute", n_bytes=moved,
        routing=routing_of(ids.cpu().numpy(), n_experts), max_rel_err=error,
    )  # fmt: skip


def unpermute(point: Point, gpu: Accelerator) -> Measured:
    """Weighted sum of each token's top-k rows, which lie in expert order."""
    x, ids, n_experts = _tokens(point, gpu)
    position, _ = positions(ids, n_experts)
    rows = torch.randn(ids.numel(), x.shape[1], dtype=x.dtype, device=gpu.device)
    weights = torch.rand(ids.shape, device=gpu.device)
    call = partial(run_unpermute, rows, position, weights)
    checked = position[:CHECKED_TOKENS].long()
    expected = (rows[checked].float() * weights[:CHECKED_TOKENS, :, None]).sum(1)
    slot_bytes = INDEX_BYTES + WEIGHT_BYTES
    return gpu.measured(
        [call], source="moesim.triton.unpermute",
        n_bytes=(x.numel() + rows.numel()) * x.element_size() + ids.numel() * slot_bytes,
        flops=2 * rows.numel(), routing=routing_of(ids.cpu().numpy(), n_experts),
        max_rel_err=_error(call()[:CHECKED_TOKENS], expected),
    )  # fmt: skip


def _tokens(point: Point, gpu: Accelerator) -> tuple[torch.Tensor, torch.Tensor, int]:
    """x [tokens, hidden], int32 ids [tokens, topk], number of experts."""
    ids = torch.from_numpy(drawn_ids(point, gpu.traces)).int().to(gpu.device)
    x = torch.randn(len(ids), int(point.shape["hidden"]), dtype=_dtype(point), device=gpu.device)
    return x, ids, int(point.shape["experts"])


def _dtype(point: Point) -> torch.dtype:
    return DTYPES[str(point.dtype["a"])]


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over the largest expected value; 0 where there is nothing to compare."""
    if not expected.numel():
        return 0.0
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
