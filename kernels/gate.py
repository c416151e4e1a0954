"""The fused gate: router logits to expert ids and weights, with every rule one launch.

Rules of published models:
    Mixtral, Qwen3      GateRule(2 or 8)                          softmax, renormalised
    OLMoE               GateRule(8, renormalise=False)
    gpt-oss, Granite    GateRule(4): softmax over the chosen logits equals the softmax over all,
                        renormalised
    DeepSeek-V2         GateRule(6, n_groups=8, groups_kept=3, renormalise=False, scale=16.0)
    DeepSeek-V3         GateRule(8, "sigmoid", n_groups=8, groups_kept=4, scale=2.5), with a bias
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moesim_kernels.errors import KernelError

_SCORINGS = {"softmax": 0, "sigmoid": 1}


@dataclass(frozen=True, slots=True)
class GateRule:
    """How experts are chosen and weighted.

    top_k         experts per token
    scoring       softmax or sigmoid of the logits
    n_groups      equal groups of consecutive experts; 1 is no limit
    groups_kept   groups a token may choose from; a group's score is the sum of its two best
                  biased scores where there is a bias, else its best score
    renormalise   divide the chosen scores by their sum
    scale         factor of all weights, applied last
    """

    top_k: int
    scoring: str = "softmax"
    n_groups: int = 1
    groups_kept: int = 1
    renormalise: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scoring not in _SCORINGS:
            raise KernelError(f"scoring={self.scoring!r}: expected softmax or sigmoid")
        if self.top_k < 1 or not 1 <= self.groups_kept <= self.n_groups:
            raise KernelError(
                f"top_k={self.top_k} must be >= 1 and groups_kept={self.groups_kept} in "
                f"1..n_groups={self.n_groups}"
            )


def gate(
    logits: torch.Tensor, rule: GateRule, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids and weights.

    logits   finite float[n_tokens, n_experts], contiguous; computed in float32
    bias     float[n_experts] added to the scores for the choice, never to the weights; or None
    returns  int32[n_tokens, top_k] in the order of falling biased score, the lower id first where
             two are equal, and float32[n_tokens, top_k]
    raises   KernelError where shapes and rule do not fit
    """
    import triton
    from moesim_kernels.gate_kernel import gate_kernel

    members = _check(logits, rule, bias)
    n_tokens, device = logits.shape[0], logits.device
    ids = torch.empty(n_tokens, rule.top_k, dtype=torch.int32, device=device)
    weights = torch.empty(n_tokens, rule.top_k, dtype=torch.float32, device=device)
    if n_tokens:
        gate_kernel[(n_tokens,)](
            logits,
            weights if bias is None else bias.float().contiguous(),
            ids,
            weights,
            float(rule.scale),
            SCORING=_SCORINGS[rule.scoring],
            BIASED=bias is not None,
            GROUPS=rule.n_groups,
            MEMBERS=members,
            GROUPS_KEPT=rule.groups_kept,
            TOP_K=rule.top_k,
            RENORMALISE=rule.renormalise,
            PADDED_GROUPS=triton.next_power_of_2(rule.n_groups),
            PADDED_MEMBERS=triton.next_power_of_2(members),
            PADDED_K=triton.next_power_of_2(rule.top_k),
            num_warps=1 if logits.shape[1] <= 128 else 4,
        )
    return ids, weights


def _check(logits: torch.Tensor, rule: GateRule, bias: torch.Tensor | None) -> int:
    """Experts per group."""
    if logits.dim() != 2 or not logits.is_contiguous():
        raise KernelError(
            f"logits: shape {list(logits.shape)}, expected contiguous [tokens, experts]"
        )
    n_experts = int(logits.shape[1])
    if n_experts == 0 or n_experts % rule.n_groups:
        raise KernelError(f"{n_experts} experts do not divide into {rule.n_groups} groups")
    members = n_experts // rule.n_groups
    if rule.top_k > members * rule.groups_kept:
        raise KernelError(f"top_k={rule.top_k}: only {members * rule.groups_kept} experts in reach")
    if bias is not None and bias.shape != (n_experts,):
        raise KernelError(f"bias: shape {list(bias.shape)}, expected [{n_experts}]")
    if bias is not None and members < 2 and rule.groups_kept < rule.n_groups:
        raise KernelError(f"groups of {members} expert have no two best scores to add")
    return members


def gate_reference(
    logits: torch.Tensor, rule: GateRule, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `gate` computes, in plain torch and float32."""
    members = _check(logits, rule, bias)
    logits = logits.float()
    scores = logits.sigmoid() if rule.scoring == "sigmoid" else logits.softmax(1)
    chosen = scores if bias is None else scores + bias.float()
    if rule.groups_kept < rule.n_groups:
        grouped = chosen.reshape(-1, rule.n_groups, members)
        best = grouped.topk(1 if bias is None else 2, dim=2).values.sum(2)
        losers = best.sort(dim=1, descending=True, stable=True).indices[:, rule.groups_kept :]
        grouped = grouped.scatter(1, losers[:, :, None].expand(-1, -1, members), float("-inf"))
        chosen = grouped.reshape(scores.shape)
    ids = chosen.sort(dim=1, descending=True, stable=True).indices[:, : rule.top_k]
    weights = scores.gather(1, ids)
    if rule.renormalise:
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-20)
    return ids.int(), weights * rule.scale
