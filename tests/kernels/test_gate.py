"""The fused gate against plain torch, and against the laws of the rules it follows."""

from __future__ import annotations

import pytest
import torch
from moesim_kernels.errors import KernelError
from moesim_kernels.gate import GateRule, gate, gate_reference

RULES = {
    "mixtral": (8, GateRule(2), False),
    "olmoe": (64, GateRule(8, renormalise=False), False),
    "gpt-oss": (32, GateRule(4), False),
    "deepseek-v2": (160, GateRule(6, n_groups=8, groups_kept=3, renormalise=False, scale=16.0), 0),
    "deepseek-v3": (256, GateRule(8, "sigmoid", 8, 4, scale=2.5), True),
    "kimi-k2": (384, GateRule(8, "sigmoid", scale=2.827), True),
    "not powers of two": (21, GateRule(5, "sigmoid", 3, 2), True),
}


def _inputs(n_tokens: int, n_experts: int, biased: bool, device: str):
    draw = torch.Generator().manual_seed(n_experts)
    logits = torch.randn(n_tokens, n_experts, generator=draw)
    bias = torch.randn(n_experts, generator=draw) * 0.3 if biased else None
    return logits.to(device), bias if bias is None else bias.to(device)


@pytest.mark.parametrize("name", RULES)
def test_published_rules_equal_plain_torch(name: str, device: str) -> None:
    n_experts, rule, biased = RULES[name]
    logits, bias = _inputs(12, n_experts, bool(biased), device)
    ids, weights = gate(logits, rule, bias)
    expected_ids, expected_weights = gate_reference(logits, rule, bias)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-7)


def test_softmax_over_the_chosen_logits_is_renormalised_softmax(device: str) -> None:
    logits, _ = _inputs(10, 32, False, device)
    ids, weights = gate(logits, GateRule(4))
    chosen = logits.topk(4, 1)
    assert torch.equal(ids, chosen.indices.int())
    torch.testing.assert_close(weights, chosen.values.softmax(1), rtol=1e-5, atol=1e-7)


def test_a_bias_moves_the_choice_but_never_the_weights(device: str) -> None:
    logits = torch.zeros(1, 4, device=device)
    bias = torch.tensor([0.0, -1.0, 1.0, 0.0], device=device)
    ids, weights = gate(logits, GateRule(2, "sigmoid", renormalise=False), bias)
    assert ids.tolist() == [[2, 0]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_an_excluded_group_stays_out_when_all_kept_scores_are_negative(device: str) -> None:
    logits = torch.zeros(1, 8, device=device)
    bias = torch.tensor([-3.0, -3.0, -4.0, -4.0, -2.0, -2.0, -9.0, -9.0], device=device)
    ids, _ = gate(logits, GateRule(4, "sigmoid", n_groups=2, groups_kept=1), bias)
    # Sums of the two best: -6 + 1 against -4 + 1; the second group wins with its two -9s.
    assert ids.tolist() == [[4, 5, 6, 7]]


def test_a_group_is_judged_by_its_best_without_bias_and_by_two_with(device: str) -> None:
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0]], device=device)
    rule = GateRule(1, "sigmoid", n_groups=2, groups_kept=1)
    assert gate(logits, rule)[0].tolist() == [[0]]
    assert gate(logits, rule, torch.zeros(4, device=device))[0].tolist() == [[2]]


def test_equal_scores_go_to_the_lower_ids(device: str) -> None:
    ids, weights = gate(torch.zeros(2, 6, device=device), GateRule(3, n_groups=3, groups_kept=2))
    assert ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))


def test_a_group_limit_of_four_in_eight_holds_and_free_choice_touches_5_3(device: str) -> None:
    # 8 * (1 - C(224, 8) / C(256, 8)) = 5.29 groups for independent scores.
    logits, _ = _inputs(600, 256, False, device)
    bias = torch.zeros(256, device=device)
    limited, _ = gate_reference(logits, GateRule(8, "sigmoid", 8, 4), bias)
    free, _ = gate_reference(logits, GateRule(8, "sigmoid"), bias)
    groups = [sum(len(set(row)) for row in (ids // 32).tolist()) / 600 for ids in (limited, free)]
    assert 3.9 <= groups[0] <= 4.0
    assert groups[1] == pytest.approx(5.29, abs=0.1)
    found, _ = gate(logits[:20].contiguous(), GateRule(8, "sigmoid", 8, 4), bias)
    assert torch.equal(found, limited[:20])


def test_half_precision_logits_are_scored_in_float32(device: str) -> None:
    logits, _ = _inputs(5, 24, False, device)
    half = logits.half()
    ids, weights = gate(half, GateRule(3))
    expected_ids, expected = gate_reference(half, GateRule(3))
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)


def test_rules_that_cannot_be_met_are_refused(device: str) -> None:
    logits = torch.zeros(2, 6, device=device)
    with pytest.raises(KernelError, match="do not divide into 4 groups"):
        gate(logits, GateRule(1, n_groups=4))
    with pytest.raises(KernelError, match="only 2 experts in reach"):
        gate(logits, GateRule(3, n_groups=3))
    with pytest.raises(KernelError, match="scoring='relu'"):
        GateRule(2, "relu")
    with pytest.raises(KernelError, match="bias: shape"):
        gate(logits, GateRule(2), torch.zeros(5, device=device))
