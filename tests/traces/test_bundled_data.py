"""The bundled trace keeps its promises, and the model that made it is a working one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traces import parquet, stats
from traces.data.corpus import Document, plain_man_page, plain_rst, without_repeats
from traces.data.tokenizer import train_tokenizer
from traces.routing import DECODE, PREFILL, RoutingTrace, content_hash, expert_counts

DATA = Path(str(resources.files("traces"))) / "data"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    read = parquet.read(DATA / "tiny-moe-32e.parquet")
    assert isinstance(read, RoutingTrace)
    return read


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((DATA / "tiny-moe-32e.json").read_text(encoding="utf-8"))


def test_trace_is_large_enough_and_small_enough(trace: RoutingTrace) -> None:
    assert trace.n_tokens >= 20_000
    assert (trace.n_layers, trace.n_experts, trace.top_k) == (8, 32, 4)
    files = [path for path in DATA.iterdir() if path.suffix in {".parquet", ".json"}]
    assert sum(path.stat().st_size for path in files) < 4 * MEGABYTE


def test_each_request_is_a_prefill_then_a_decode(trace: RoutingTrace) -> None:
    for request in np.unique(trace.request):
        rows = np.flatnonzero(trace.request == request)
        phase = trace.phase[rows]
        assert (np.diff(rows) == 1).all()
        assert (trace.position[rows] == np.arange(len(rows))).all()
        assert (np.diff(phase) >= 0).all()
        assert (phase == PREFILL).sum() >= 64
        assert (phase == DECODE).sum() >= 32


def test_no_token_chooses_an_expert_twice(trace: RoutingTrace) -> None:
    chosen = np.sort(trace.topk, axis=2)
    assert chosen.min() >= 0
    assert (np.diff(chosen, axis=2) > 0).all()


def test_gate_weights_are_best_first_and_sum_to_one(trace: RoutingTrace) -> None:
    assert trace.weights is not None
    weights = trace.weights.astype(np.float64)
    assert (np.diff(weights, axis=2) <= 0).all()
    np.testing.assert_allclose(weights.sum(axis=2), 1.0, atol=2e-3)


def test_every_request_has_one_of_at_least_five_domains(
    trace: RoutingTrace, record: dict[str, Any]
) -> None:
    domains = record["requests"]["by_domain"]
    assert len(domains) >= 5
    labelled = [r["first"] + r["step"] * i for r in domains.values() for i in range(r["count"])]
    assert sorted(labelled) == list(range(record["requests"]["count"]))
    assert sorted(labelled) == np.unique(trace.request).tolist()


def test_provenance_belongs_to_the_trace(trace: RoutingTrace, record: dict[str, Any]) -> None:
    assert record["content_sha256"] == content_hash(trace)
    assert record["tokens"]["total"] == trace.n_tokens
    assert record["tokens"]["decode"] == int((trace.phase == DECODE).sum())
    config = json.loads((DATA / "tiny-moe-32e-config.json").read_text(encoding="utf-8"))
    assert config["num_experts"] == trace.n_experts
    assert config["num_experts_per_tok"] == trace.top_k


def test_router_is_balanced_and_has_no_dead_expert(trace: RoutingTrace) -> None:
    counts = expert_counts(trace).counts
    relative = counts / counts.mean(axis=1, keepdims=True)
    assert relative.max() < 2
    assert relative.min() > 0.5


def test_routing_is_far_from_random(trace: RoutingTrace, record: dict[str, Any]) -> None:
    reuse, segments = stats.reuse_ratio(trace).mean(), stats.srp(trace, 16)
    assert reuse >= 1.2
    assert segments.floor == pytest.approx(0.321, abs=1e-3)
    assert segments.srp >= segments.floor + 0.1
    assert record["statistics"]["reuse_ratio"] == pytest.approx(reuse, abs=1e-3)
    assert record["statistics"]["srp"] == pytest.approx(segments.srp, abs=1e-3)


def test_man_page_keeps_words_and_drops_roff() -> None:
    page = '.TH LS 1\n.SH NAME\nls \\- list\n.TP\n.BR \\-a ", " \\-\\-all\ndo \\fBnot\\fP hide\n'
    assert " ".join(plain_man_page(page).split()) == "NAME ls - list -a, --all do not hide"


def test_rst_roles_leave_their_words() -> None:
    assert plain_rst("see :func:`~os.open` and :ref:`this page <label>`\n") == (
        "see os.open and this page\n"
    )


def test_repeated_and_licence_paragraphs_are_dropped() -> None:
    own = ["one " * 400, "two " * 400]
    shared = "this paragraph is in every document of the package"
    texts = [f"{shared}\n\nCopyright 1999 Someone\n\n{text}" for text in own]
    documents = without_repeats(Document("d", str(i), text) for i, text in enumerate(texts))
    assert [shared in document.text for document in documents] == [True, False]
    assert not any("Copyright" in document.text for document in documents)


def test_tokenizer_returns_the_text_and_shortens_it() -> None:
    text = "the cat, das Mädchen, 日本語: def f(x):\n    return x_1 + 23\n" * 20
    tokenizer = train_tokenizer([text], vocab_size=300)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode()) / 2


@pytest.fixture
def small() -> Iterator[tuple[Any, Any, Any]]:
    """Shape, training plan and two domains of a model that trains in a second."""
    torch = pytest.importorskip("torch")
    from traces.data.model import TinyMoeConfig
    from traces.data.training import TrainingPlan

    shape = TinyMoeConfig(
        vocab_size=16, hidden=32, n_layers=2, n_experts=8, top_k=2, expert_hidden=16
    )
    plan = TrainingPlan(steps=30, window=64, short_window=32, warmup_steps=4, learning_rate=0.01)
    domains = {f"stride {i}": [np.arange(200) * i % 16] for i in (1, 3)}
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield shape, plan, domains
    torch.set_num_threads(n_threads)


def test_training_lowers_the_loss_and_repeats_itself(small: tuple[Any, Any, Any]) -> None:
    shape, plan, domains = small
    from traces.data.training import train

    _, result, _ = train(shape, plan, domains, domains)
    _, again, _ = train(shape, plan, domains, domains)
    assert result.validation_loss < 0.8 * np.log(shape.vocab_size)
    assert again.validation_loss == result.validation_loss


def test_capture_routes_validly_and_cache_equals_recomputation(
    small: tuple[Any, Any, Any],
) -> None:
    shape, plan, domains = small
    import torch

    from traces.data.capture import CapturePlan, RouterRecorder, capture
    from traces.data.training import train

    model, *_ = train(shape, plan, domains, domains)
    requests = CapturePlan(2, prompt_tokens=(10, 12), decode_tokens=(3, 5))
    trace, names = capture(model, domains, requests, "test")
    assert names == list(domains) * 2
    assert trace.topk.min() >= 0
    assert trace.topk.max() < shape.n_experts
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    past, recorder = model.empty_past(), RouterRecorder(model)
    with torch.no_grad():
        whole = model(tokens)[0]
        recorder.take()
        parts = [model(tokens[:, :5], past)[0]]
        parts += [model(tokens[:, i : i + 1], past)[0] for i in range(5, 8)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-4)


def test_even_routing_has_balance_loss_one() -> None:
    torch = pytest.importorskip("torch")
    from traces.data.model import load_balance

    ids = torch.arange(64).view(16, 4) % 32
    assert load_balance(torch.full((16, 32), 1 / 32), ids).item() == pytest.approx(1.0)
    one_expert = torch.zeros(16, 32)
    one_expert[:, 3] = 1
    assert load_balance(one_expert, torch.full((16, 1), 3)).item() == pytest.approx(32.0)
