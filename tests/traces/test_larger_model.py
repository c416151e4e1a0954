"""The larger model's three steps, small and on the CPU: each writes what the next one reads."""

# ruff: noqa: E402 (torch may be absent)

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from traces import parquet
from traces.data import encoded, larger, provenance, training
from traces.data.capture import CapturePlan, RouterRecorder, capture_together, draw_requests
from traces.data.corpus import Corpus, Document
from traces.data.encoded import read_arrays, read_corpus, write_arrays, write_corpus
from traces.data.finish import finish
from traces.data.model import (
    Experts,
    Routes,
    TinyMoe,
    TinyMoeConfig,
    flop_per_token,
    grouping_works,
)
from traces.data.training import Run, TrainingPlan, train
from traces.errors import TraceError
from traces.routing import DECODE, PREFILL, RoutingTrace, content_hash

SMALL = larger.Scale(
    name="small",
    config=TinyMoeConfig(
        vocab_size=300, hidden=32, n_layers=2, n_experts=8, top_k=2, expert_hidden=16
    ),
    plan=TrainingPlan(steps=6, window=40, short_window=40, short_share=0.0, warmup_steps=2),
    rows=5,
    requests=CapturePlan(2, prompt_tokens=(8, 24), decode_tokens=(3, 9)),
)
WORDS = {"one": "red green blue grey", "two": "uno dos tres cuatro"}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def documents(n: int, seed: int) -> tuple[Document, ...]:
    rng = np.random.default_rng(seed)
    return tuple(
        Document(domain, str(i), " ".join(rng.choice(words.split(), 300)))
        for domain, words in WORDS.items()
        for i in range(n)
    )


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    corpus = Corpus(documents(3, seed=1), documents(2, seed=2), {"words": "1.0"})
    write_corpus(larger.encode_corpus(corpus, SMALL), tmp_path / "corpus.npz")
    return tmp_path / "corpus.npz"


@pytest.fixture
def routing_file(corpus_file: Path) -> Path:
    path = corpus_file.with_name("routing.npz")
    larger.train_and_capture(corpus_file, path, SMALL, Run())
    return path


def test_three_steps_give_a_trace_with_its_provenance_and_config(
    routing_file: Path, tmp_path: Path
) -> None:
    finish(routing_file, tmp_path / "out", trace_bytes=4e6)
    trace = parquet.read(tmp_path / "out/small.parquet")
    record = json.loads((tmp_path / "out/small.json").read_text())
    config = json.loads((tmp_path / "out/small-config.json").read_text())
    assert isinstance(trace, RoutingTrace)
    assert (trace.n_layers, trace.n_experts, trace.top_k) == (2, 8, 2)
    assert record["content_sha256"] == content_hash(trace)
    assert record["requests"]["by_domain"] == {
        "one": {"first": 0, "step": 2, "count": 2},
        "two": {"first": 1, "step": 2, "count": 2},
    }
    assert record["corpus"]["sources"] == {"words": "1.0"}
    assert record["training"]["tokens_seen"] == 6 * 5 * 40
    assert record["training"]["steps"] == 6
    assert record["model"]["parameters"] == parameters(TinyMoe(SMALL.config))
    assert (config["num_experts"], config["max_position_embeddings"]) == (8, 40)


def test_provenance_has_every_field_of_the_bundled_trace(
    routing_file: Path, tmp_path: Path
) -> None:
    finish(routing_file, tmp_path, trace_bytes=4e6)
    made = json.loads((tmp_path / "small.json").read_text())
    bundled = json.loads((Path(larger.__file__).parent / "tiny-moe-32e.json").read_text())
    assert set(made) == {*bundled, "device"}
    for part in ("model", "corpus", "requests", "tokens", "statistics"):
        assert set(made[part]) == set(bundled[part])


def test_each_request_is_a_prefill_then_a_decode_of_the_lengths_drawn(
    corpus_file: Path, routing_file: Path
) -> None:
    arrays = dict(np.load(routing_file, allow_pickle=False))
    requests = draw_requests(read_corpus(corpus_file).held_out, SMALL.requests)
    for index, request in enumerate(requests):
        rows = np.flatnonzero(arrays["request"] == index)
        assert (np.diff(rows) == 1).all()
        assert arrays["position"][rows].tolist() == list(range(request.n_tokens))
        phase = [PREFILL] * len(request.prompt) + [DECODE] * request.n_decode
        assert arrays["phase"][rows].tolist() == phase


def test_requests_side_by_side_are_routed_as_if_each_ran_alone(corpus_file: Path) -> None:
    requests = draw_requests(read_corpus(corpus_file).held_out, SMALL.requests)
    torch.manual_seed(3)
    model = TinyMoe(SMALL.config)
    together = capture_together(model, requests, SMALL.requests)
    for index, request in enumerate(requests):
        recorder = RouterRecorder(model)
        with torch.no_grad():
            model(torch.from_numpy(request.prompt)[None])
        topk, weights = recorder.take()
        recorder.remove()
        rows = (together["request"] == index) & (together["phase"] == PREFILL)
        np.testing.assert_array_equal(together["topk"][rows], topk)
        np.testing.assert_allclose(together["weights"][rows], weights, atol=2e-3)


def test_a_second_run_takes_the_trained_model_and_gives_the_same_routing(
    corpus_file: Path, routing_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dict(np.load(routing_file, allow_pickle=False))
    monkeypatch.setattr(larger, "train", lambda *_: pytest.fail("trained again"))
    larger.train_and_capture(corpus_file, routing_file, SMALL, Run())
    again = dict(np.load(routing_file, allow_pickle=False))
    for name in set(first) - {encoded.RECORD}:  # which has the seconds spent
        np.testing.assert_array_equal(first[name], again[name])


def test_an_interrupted_training_goes_on_where_it_was_saved(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(unfinished=corpus_file.with_name("unfinished.pt"), save_every_s=0.0)
    routing, steps, real = corpus_file.with_name("r.npz"), [], training.train_step

    def cut_off(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(training, "train_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        larger.train_and_capture(corpus_file, routing, SMALL, run)
    larger.train_and_capture(corpus_file, routing, SMALL, run)
    assert len(steps) == 5 + 2  # four were saved, two were left
    assert run.unfinished is not None
    assert not run.unfinished.exists()
    _, record = read_arrays(routing, types_of(routing))
    assert record["training"]["tokens_seen"] == 6 * 5 * 40


def test_another_corpus_does_not_go_on_with_an_interrupted_training(corpus_file: Path) -> None:
    corpus = read_corpus(corpus_file)
    unfinished = corpus_file.with_name("unfinished.pt")
    rows = {"one": 2, "two": 3}
    run = Run(unfinished=unfinished, save_every_s=0.0, rows=rows, made_from={"corpus": "a"})
    _, first, _ = train(SMALL.config, SMALL.plan, corpus.train, corpus.held_out, run)
    assert unfinished.exists()
    other = replace(run, made_from={"corpus": "b"})
    _, second, _ = train(SMALL.config, SMALL.plan, corpus.train, corpus.held_out, other)
    assert second.tokens_seen == first.tokens_seen
    assert second.validation_loss == first.validation_loss


def test_the_clock_ends_a_training_and_its_cosine(corpus_file: Path) -> None:
    corpus, plan = read_corpus(corpus_file), replace(SMALL.plan, steps=10**6)
    run = Run(limit_s=0.4, rows={"one": 2, "two": 3})
    _, result, _ = train(SMALL.config, plan, corpus.train, corpus.held_out, run)
    assert 0 < result.tokens_seen < 10**6 * 5 * 40
    assert 0.4 <= result.wall_s < 5
    assert plan.rate(99, done=0.0) == pytest.approx(plan.learning_rate)
    assert plan.rate(99, done=1.0) == pytest.approx(plan.learning_rate / 20)


def test_prepare_fetches_once_and_refuses_a_file_too_large_to_carry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def gather(*_: Any, **__: Any) -> Corpus:
        calls.append(1)
        return Corpus(documents(3, seed=1), documents(2, seed=2), {})

    monkeypatch.setattr(larger, "gather", gather)
    larger.prepare(tmp_path / "c.npz", SMALL, tmp_path)
    larger.prepare(tmp_path / "c.npz", SMALL, tmp_path)
    assert len(calls) == 1
    monkeypatch.setattr(larger, "MAX_CORPUS_BYTES", 100)
    with pytest.raises(TraceError, match="at most 100; lower DOMAIN_BYTES"):
        larger.prepare(tmp_path / "d.npz", SMALL, tmp_path)


def test_training_step_needs_torch_numpy_and_the_standard_library_only() -> None:
    absent = ("pydantic", "pyarrow", "numba", "scipy", "pandas", "networkx", "typer", "rich")
    code = (
        f"import sys\nfor name in {absent!r}: sys.modules[name] = None\nimport traces.data.larger\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(larger.__file__).parents[2])


# --- files from elsewhere ------------------------------------------------------------------------


def types_of(path: Path) -> dict[str, tuple[str, int]]:
    arrays = np.load(path, allow_pickle=False)
    return {name: (str(arrays[name].dtype), arrays[name].ndim) for name in arrays}


def rewritten(path: Path, **changed: np.ndarray) -> Path:
    arrays = dict(np.load(path, allow_pickle=False))
    np.savez_compressed(path, **{**arrays, **changed})
    return path


def test_corpus_file_gives_back_what_was_written(tmp_path: Path) -> None:
    corpus = Corpus(documents(3, seed=1), documents(2, seed=2), {"words": "1.0"})
    made = larger.encode_corpus(corpus, SMALL)
    write_corpus(made, tmp_path / "c.npz")
    read = read_corpus(tmp_path / "c.npz")
    assert read.record == made.record
    np.testing.assert_array_equal(read.merges, made.merges)
    for before, after in ((made.train, read.train), (made.held_out, read.held_out)):
        assert list(before) == list(after)
        for name in before:
            assert [d.tolist() for d in before[name]] == [d.tolist() for d in after[name]]


def test_corpus_too_large_is_refused_before_it_is_unpacked(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "MAX_UNPACKED_BYTES", 1000)
    monkeypatch.setattr(encoded, "npz_array", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(TraceError, match="unpacks to .* expected at most 1000"):
        read_corpus(corpus_file)


def test_pickled_arrays_are_refused(corpus_file: Path) -> None:
    rewritten(corpus_file, tokens=np.array([{"a": 1}], dtype=object))
    with pytest.raises(TraceError, match="tokens: dtype object"):
        read_corpus(corpus_file)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": np.zeros(9, dtype=np.int64)}, "tokens: int64"),
        ({"ends": np.array([5, 3, 9])}, "differ in length"),
        ({"extra": np.zeros(3)}, "arrays .*extra"),
        ({"record": np.frombuffer(b"[1]", dtype=np.uint8)}, "record: list"),
        ({"record": np.frombuffer(b"{", dtype=np.uint8)}, "record: not JSON"),
        ({"merges": np.zeros((1, 2), dtype=np.int32)}, "not in the vocabulary"),
        ({"held_out": np.ones(10, dtype=np.bool_)}, "both sides"),
        ({"domain": np.full(10, 7, dtype=np.int16)}, "domain: expected 0 to 1"),
    ],
)
def test_damaged_corpus_is_refused_by_field(
    corpus_file: Path, changed: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        read_corpus(rewritten(corpus_file, **changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"topk": np.full((4, 2, 2), 9, dtype=np.int16)}, "topk: 9 to 9, expected 0 to 7"),
        ({"topk": np.zeros((4, 3, 2), dtype=np.int16)}, "topk: .4, 3, 2., expected"),
        ({"domain": np.zeros(9, dtype=np.int16)}, "request: expected each of 0 to 8"),
        ({"domain": np.full(4, 5, dtype=np.int16)}, "domain: expected 0 to 1"),
        ({"record": np.frombuffer(b"{}", dtype=np.uint8)}, "record: field name"),
    ],
)
def test_damaged_routing_file_is_refused_and_nothing_is_written(
    routing_file: Path, tmp_path: Path, changed: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        finish(rewritten(routing_file, **changed), tmp_path / "out", trace_bytes=4e6)
    assert not (tmp_path / "out").exists()


def test_name_in_a_routing_file_cannot_leave_the_folder(routing_file: Path, tmp_path: Path) -> None:
    arrays, record = read_arrays(routing_file, types_of(routing_file))
    write_arrays(routing_file, arrays, {**record, "name": "../elsewhere"})
    with pytest.raises(TraceError, match="field name"):
        finish(routing_file, tmp_path / "out", trace_bytes=4e6)


# --- parts ---------------------------------------------------------------------------------------


def parameters(model: TinyMoe) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_larger_model_is_the_size_its_readme_says() -> None:
    with torch.device("meta"):
        model = TinyMoe(larger.LARGER.config)
    assert parameters(model) == 424_165_888
    assert max(larger.LARGER.requests.prompt_tokens) + max(
        larger.LARGER.requests.decode_tokens
    ) == (larger.LARGER.plan.window)


@given(tokens=st.lists(st.integers(1, 10**7), min_size=1, max_size=20), extra=st.integers(0, 200))
def test_rows_of_a_batch_add_up_and_every_domain_has_one(tokens: list[int], extra: int) -> None:
    named = {str(i): n for i, n in enumerate(tokens)}
    rows = larger.domain_rows(named, len(tokens) + extra)
    assert sum(rows.values()) == len(tokens) + extra
    assert min(rows.values()) >= 1
    largest, smallest = max(named, key=lambda k: named[k]), min(named, key=lambda k: named[k])
    assert rows[largest] >= rows[smallest] - 1


def test_fewer_rows_than_domains_are_refused() -> None:
    with pytest.raises(TraceError, match="rows=1"):
        larger.domain_rows({"a": 5, "b": 5}, 1)


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**31))
def test_gathering_is_the_adjoint_of_spreading(n_tokens: int, top_k: int, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    ids = torch.rand(n_tokens, 6, generator=made).argsort(dim=1)[:, :top_k]
    routes = Routes.of(ids, torch.ones(n_tokens, top_k), 6)
    x = torch.randn(n_tokens, 3, generator=made)
    rows = torch.randn(n_tokens * top_k, 3, generator=made)
    spread, gathered = routes.spread(x), routes.gather(rows)
    torch.testing.assert_close((spread * rows).sum(), (x * gathered).sum(), atol=1e-4, rtol=1e-4)
    ends = torch.bincount(ids.flatten(), minlength=6).cumsum(0)
    assert routes.ends.tolist() == ends.tolist()


def test_grouped_experts_agree_with_one_after_another() -> None:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip(f"torch {torch.__version__} has no grouped_mm")
    assert grouping_works("cpu", hidden=64, expert_hidden=32)


def test_a_wrong_grouped_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(rows: Any, matrices: Any, offs: Any) -> Any:
        return torch.cat([part @ matrices[0] for part in rows.split(7)])

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", shifted, raising=False)
    assert not grouping_works("cpu", hidden=64, expert_hidden=32)


def test_model_with_grouped_experts_learns_as_well(corpus_file: Path) -> None:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip(f"torch {torch.__version__} has no grouped_mm")
    corpus = read_corpus(corpus_file)
    batch = next(training.batches(corpus.train, SMALL.plan, {"one": 2, "two": 3}))
    losses = []
    for grouped in (False, True):
        torch.manual_seed(0)
        model = TinyMoe(SMALL.config)
        model.group_experts(grouped)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        steps = [training.train_step(model, optimizer, batch, SMALL.plan) for _ in range(8)]
        losses.append([float(loss) for loss in steps])
    assert losses[1][-1] < losses[1][0] - 0.8
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)


def test_a_loss_that_is_not_finite_ends_the_training(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, run = read_corpus(corpus_file), Run(rows={"one": 2, "two": 3})
    monkeypatch.setattr(training, "train_step", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(ArithmeticError, match="step 0: loss is nan"):
        train(SMALL.config, SMALL.plan, corpus.train, corpus.held_out, run)


def test_operations_of_a_token_are_six_for_each_active_parameter_and_attention() -> None:
    config = larger.LARGER.config
    active = provenance.model_record(TinyMoe(SMALL.config))["active_parameters"]
    norms = SMALL.config.hidden * (2 * SMALL.config.n_layers + 1)
    assert flop_per_token(SMALL.config, 0) == 6 * (active - norms)
    per_position = flop_per_token(config, 512) - flop_per_token(config, 511)
    assert per_position == 6 * config.n_layers * config.hidden


def test_router_decides_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    model = TinyMoe(SMALL.config)
    x = torch.randn(64, SMALL.config.hidden)
    plain = model.blocks[0].router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model.blocks[0].router(x)
    assert torch.equal(plain.weights, cast.weights)


def test_experts_loop_and_groups_have_the_same_parameters() -> None:
    assert set(Experts(SMALL.config).state_dict()) == {"gate_up", "down"}
