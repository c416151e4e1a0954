"""Capture: what the hooks write down is what the model did, padding and batches aside."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.traces.tiny_moes import (
    CHOICE_FOLLOWS_LOGITS,
    FAMILIES,
    MOE_LAYERS,
    N_EXPERTS,
    ROUTERS_WITHOUT_IDS,
    TOP_K,
    VOCABULARY,
    one_thread,
    prompts,
    tiny_moe,
)
from traces.capture import CaptureError, Recorder, capture
from traces.errors import TraceError
from traces.routing import DECODE, PREFILL, RoutingTrace

NEW_TOKENS = 5
MODELS: dict[str, Any] = {}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def model_of(family: str) -> Any:
    """One model a family for the whole file; tests that change one make their own."""
    return MODELS.setdefault(family, tiny_moe(family))


def by_request(trace: RoutingTrace) -> RoutingTrace:
    return trace.rows(np.lexsort((trace.position, trace.request)))


def assert_same_routing(one: RoutingTrace, other: RoutingTrace) -> None:
    one, other = by_request(one), by_request(other)
    np.testing.assert_array_equal(one.request, other.request)
    np.testing.assert_array_equal(one.position, other.position)
    np.testing.assert_array_equal(one.phase, other.phase)
    np.testing.assert_array_equal(np.sort(one.topk), np.sort(other.topk))
    np.testing.assert_allclose(one.scores, other.scores, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_ids_weights_and_scores_of_its_moe_layers(family: str) -> None:
    trace = capture(model_of(family), prompts(), NEW_TOKENS)
    n_tokens = sum(map(len, prompts())) + (NEW_TOKENS - 1) * len(prompts())
    layers = MOE_LAYERS.get(family, (0, 1, 2))
    assert trace.layers == layers
    assert trace.topk.shape == (n_tokens, len(layers), TOP_K)
    assert trace.n_experts == N_EXPERTS
    assert trace.weights is not None
    assert (trace.weights > 0).all()
    assert trace.scores is not None
    assert trace.scores.shape == (n_tokens, len(layers), N_EXPERTS)
    assert type(model_of(family)).__name__ in trace.capture
    assert (np.diff(np.sort(trace.topk)) > 0).all()  # no expert twice


@pytest.mark.parametrize("family", [*CHOICE_FOLLOWS_LOGITS, *ROUTERS_WITHOUT_IDS])
def test_ids_are_the_experts_of_the_highest_scores(family: str) -> None:
    trace = capture(model_of(family), prompts(), NEW_TOKENS)
    scores = trace.scores.astype(np.float64)
    chosen = np.take_along_axis(scores, trace.topk.astype(np.int64), axis=2)
    highest = np.sort(scores, axis=2)[:, :, -TOP_K:]  # rounding to float16 keeps the order
    np.testing.assert_array_equal(np.sort(chosen), highest)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_that_the_experts_were_handed(family: str) -> None:
    model, handed = model_of(family), []

    def note_ids(experts: Any, args: tuple[Any, ...]) -> None:
        handed.append(next(part for part in args if part.dtype == torch.int64).numpy())

    experts = [m for name, m in model.named_modules() if name.endswith(".experts")]
    hooks = [module.register_forward_pre_hook(note_ids) for module in experts]
    trace = capture(model, [prompts()[1]], NEW_TOKENS)
    for hook in hooks:
        hook.remove()
    passes = [handed[i : i + trace.n_layers] for i in range(0, len(handed), trace.n_layers)]
    assert len(passes) == NEW_TOKENS
    np.testing.assert_array_equal(
        trace.topk, np.concatenate([np.stack(layers, axis=1) for layers in passes])
    )


def test_gates_beside_the_logits_become_weights() -> None:
    trace = capture(model_of("llama4_text"), prompts(), NEW_TOKENS)
    chosen = np.take_along_axis(trace.scores, trace.topk.astype(np.int64), axis=2)
    gate = 1 / (1 + np.exp(-chosen.astype(np.float64)))
    np.testing.assert_allclose(trace.weights, gate, atol=2e-3)


def deepseek_choice(logits: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Sorted ids by the rule of DeepSeek-V3: 2 of 4 groups, by their two best experts."""
    biased = 1 / (1 + np.exp(-logits)) + bias
    groups = biased.reshape(len(logits), 4, N_EXPERTS // 4)
    worth = np.sort(groups)[:, :, -2:].sum(axis=2)
    out = worth < np.sort(worth)[:, -2][:, None]
    biased[np.repeat(out, N_EXPERTS // 4, axis=1)] = -np.inf
    return np.sort(np.argsort(-biased)[:, :TOP_K])


def test_deepseek_ids_are_those_the_model_used_not_the_highest_logits() -> None:
    model = model_of("deepseek_v3")
    trace = capture(model, prompts(12), NEW_TOKENS)
    logits = trace.scores.astype(np.float64)
    plain = np.sort(np.argsort(-logits, axis=2)[:, :, :TOP_K])
    used = np.sort(trace.topk)
    assert (used != plain).any(axis=2).mean() > 0.2
    for column, layer in enumerate(trace.layers):
        bias = model.model.layers[layer].mlp.gate.e_score_correction_bias.double().numpy()
        expected = deepseek_choice(logits[:, column], bias)
        # float16 logits may turn a tie within 1e-3 the other way
        assert (expected == used[:, column]).all(axis=1).mean() > 0.97


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_scores_equal_the_router_logits_that_the_model_itself_returns(family: str) -> None:
    model, prompt = model_of(family), prompts()[1]
    with torch.no_grad():
        logits = model(torch.tensor([prompt]), output_router_logits=True).router_logits
    trace = capture(model, [prompt], n_new_tokens=1)
    expected = torch.stack(list(logits), dim=1).to(torch.float16).numpy()
    np.testing.assert_allclose(trace.scores, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_unequal_prompts_is_captured_as_one_by_one(family: str) -> None:
    model = model_of(family)
    together = capture(model, prompts(), NEW_TOKENS, batch_size=len(prompts()))
    alone = capture(model, prompts(), NEW_TOKENS, batch_size=1)
    assert_same_routing(together, alone)


def test_requests_positions_phases_and_passes_follow_generation() -> None:
    trace = capture(model_of("mixtral"), prompts(), NEW_TOKENS, batch_size=3)
    for request, prompt in enumerate(prompts()):
        mine = trace.rows(trace.request == request)
        n_tokens = len(prompt) + NEW_TOKENS - 1
        np.testing.assert_array_equal(mine.position, np.arange(n_tokens))
        phase = [PREFILL] * len(prompt) + [DECODE] * (NEW_TOKENS - 1)
        np.testing.assert_array_equal(mine.phase, phase)
        first_pass = NEW_TOKENS * (request // 3)
        passes = [first_pass] * len(prompt) + [first_pass + i for i in range(1, NEW_TOKENS)]
        np.testing.assert_array_equal(mine.forward, passes)
    assert (np.diff(trace.forward) >= 0).all()


def test_a_row_whose_text_has_ended_adds_no_tokens_while_others_go_on() -> None:
    model = tiny_moe("mixtral")
    plain = model.generate(
        torch.tensor([prompts()[1]]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    end = int(plain[0, len(prompts()[1]) + 2])  # the third token after prompt 1
    model.generation_config.eos_token_id = [end, VOCABULARY - 1]
    together = capture(model, prompts(), NEW_TOKENS, batch_size=len(prompts()))
    assert_same_routing(together, capture(model, prompts(), NEW_TOKENS, batch_size=1))
    lengths = np.bincount(together.request)
    assert lengths[1] <= len(prompts()[1]) + 2
    assert lengths.max() - lengths.min() > 0
    assert (lengths[[0, 2, 3, 4]] > [len(prompts()[i]) for i in (0, 2, 3, 4)]).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_not_recorded(side: str) -> None:
    model, width = model_of("olmoe"), max(map(len, prompts()))
    ids = torch.zeros(len(prompts()), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts()):
        here = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, here], mask[row, here] = torch.tensor(prompt), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with Recorder(model) as recorder, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=positions)
    assert_same_routing(recorder.trace(), capture(model, prompts(), 1, batch_size=1))


def test_a_prefill_in_pieces_is_one_request_and_stays_prefill() -> None:
    model, ids = model_of("mixtral"), torch.tensor([prompts()[1]])
    with Recorder(model) as recorder, torch.no_grad():
        first = model(ids[:, :4], use_cache=True)
        model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
        model(ids)
    trace = recorder.trace()
    np.testing.assert_array_equal(trace.forward, [0] * 4 + [1] * 5 + [2] * 9)
    np.testing.assert_array_equal(trace.request, [0] * 9 + [1] * 9)
    np.testing.assert_array_equal(trace.position, [*range(9), *range(9)])
    assert (trace.phase == PREFILL).all()
    np.testing.assert_array_equal(trace.topk[:9], trace.topk[9:])


def test_weights_are_the_softmax_of_the_chosen_scores_in_mixtral() -> None:
    trace = capture(model_of("mixtral"), prompts(), NEW_TOKENS)
    chosen = np.take_along_axis(trace.scores, trace.topk.astype(np.int64), axis=2)
    share = np.exp(chosen.astype(np.float64))
    share /= share.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(trace.weights, share, atol=2e-3)


def test_every_way_to_run_the_experts_is_captured_alike() -> None:
    plain = capture(model_of("qwen3_moe"), prompts(), NEW_TOKENS)
    for way in ("eager", "batched_mm", "grouped_mm"):
        model = tiny_moe("qwen3_moe")
        model.set_experts_implementation(way)
        assert_same_routing(capture(model, prompts(), NEW_TOKENS), plain)


def test_a_bfloat16_model_is_captured() -> None:
    model = tiny_moe("gpt_oss").to(torch.bfloat16)
    trace = capture(model, prompts(), NEW_TOKENS, scores=False)
    assert trace.scores is None
    assert trace.weights is not None
    assert trace.weights.dtype == np.float16
    assert trace.n_experts == N_EXPERTS


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_moe("mixtral").train()
    capture(model, prompts(), 1)
    assert model.training
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_done_is_told_of_every_batch() -> None:
    told: list[int] = []
    capture(model_of("mixtral"), prompts(5), 1, batch_size=2, done=told.append)
    assert told == [2, 2, 1]


def test_a_dense_model_is_refused_by_its_class() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **shape))
    with pytest.raises(CaptureError, match="LlamaForCausalLM: no router found"):
        capture(model, prompts())
    assert issubclass(CaptureError, TraceError)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"prompts": []}, "prompts: none"),
        ({"prompts": [[1], []]}, "prompt 1: empty"),
        ({"prompts": [[1], [VOCABULARY]]}, "prompt 1: token ids 64..64, expected 0..63"),
        ({"prompts": [[-1]]}, "token ids -1"),
        ({"n_new_tokens": 0}, "n_new_tokens: 0"),
        ({"batch_size": 0}, "batch_size: 0"),
    ],
)
def test_what_cannot_be_run_is_refused(wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(CaptureError, match=word):
        capture(model_of("mixtral"), **({"prompts": [[1]]} | wrong))


class Block(nn.Module):
    """A sparse block as older classes have it: a linear gate whose logits say everything."""

    def __init__(self, runs_gate: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(4, N_EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(N_EXPERTS))
        self.runs_gate = runs_gate
        if bias:
            self.register_buffer("e_score_correction_bias", torch.ones(N_EXPERTS))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.runs_gate:
            return hidden
        return hidden + self.gate(hidden.reshape(-1, 4)).mean()


class OldMoe(nn.Module):
    """Layers 0 (dense) and 1 (sparse)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        config = {"num_experts": N_EXPERTS, "num_experts_per_tok": TOP_K}
        self.config = SimpleNamespace(to_dict=lambda: config)
        self.embed = nn.Embedding(VOCABULARY, 4)
        self.layers = nn.ModuleList([nn.Identity(), block])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.embed(input_ids))


def test_a_linear_gate_beside_the_experts_is_a_router() -> None:
    model, ids = OldMoe(Block()), torch.tensor([[3, 5, 8]])
    with Recorder(model) as recorder:
        model(ids)
    trace = recorder.trace()
    logits = model.layers[1].gate(model.embed(ids[0])).detach()
    assert trace.layers == (1,)
    assert trace.weights is None
    np.testing.assert_array_equal(trace.topk[:, 0], logits.topk(TOP_K).indices.numpy())
    np.testing.assert_array_equal(trace.scores[:, 0], logits.half().numpy())


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (Block(bias=True), "layers.1.gate .* a bias or groups shape its choice"),
        (Block(runs_gate=False), "OldMoe: router .* did not run"),
        (
            nn.Sequential(Block(), Block()),
            "layer 1 has routers layers.1.0.gate and layers.1.1.gate",
        ),
    ],
)
def test_a_choice_that_cannot_be_known_is_refused(block: nn.Module, words: str) -> None:
    model = OldMoe(block)
    with pytest.raises(CaptureError, match=words), Recorder(model):
        model(torch.tensor([[3, 5, 8]]))


def test_a_mask_of_pairs_of_tokens_and_a_batch_that_shrinks_are_refused() -> None:
    model, ids = model_of("mixtral"), torch.tensor([[1, 2], [3, 4]])
    with Recorder(model), torch.no_grad():
        with pytest.raises(CaptureError, match=r"attention_mask: \[2, 1, 2, 2\]"):
            model(ids, attention_mask=torch.ones(2, 1, 2, 2))
        model(ids)
        with pytest.raises(CaptureError, match="a batch of 1 rows goes on with 2 requests"):
            model(ids[:1, :1], attention_mask=torch.ones(1, 3))


def test_a_recorder_that_saw_nothing_has_no_trace() -> None:
    with Recorder(model_of("mixtral")) as recorder:
        pass
    with pytest.raises(CaptureError, match="no forward pass"):
        recorder.trace()
