"""Which file a trace text means, and which model the trace is of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.cli.inputs import open_trace, phase_of, require_model, usual_tokens_per_rank
from moesim.errors import SimulationError
from tests.moesim.cli_case import config_file, small_trace, trace_file
from traces import parquet
from traces.errors import TraceError
from traces.models import load_model
from traces.routing import ExpertCounts, RoutingTrace, expert_counts


def of_model(name: str, model: str, n_layers: int = 0) -> RoutingTrace:
    """Choices that fit a catalogue model, or only its first layers."""
    spec = load_model(name)
    layers = spec.moe_layers[: n_layers or None]
    topk = np.tile(np.arange(spec.top_k, dtype=np.int16), (4, len(layers), 1))
    base = small_trace().rows(slice(0, 4))
    return replace(base, topk=topk, n_experts=spec.n_experts, layers=layers, model=model)


def stored(folder: Path, name: str, trace: RoutingTrace | ExpertCounts) -> str:
    parquet.write(trace, folder / name)
    return str(folder / name)


def test_the_model_asked_for_wins_over_the_name_of_the_file(tmp_path: Path) -> None:
    text = stored(tmp_path, "deepseek-v3-run.parquet", of_model("mixtral-8x7b", ""))
    trace, spec = open_trace(text, "mixtral-8x7b")
    assert spec == load_model("mixtral-8x7b")
    assert trace.model == "mixtral-8x7b"


def test_a_trace_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    text = stored(tmp_path, "run.parquet", of_model("mixtral-8x7b", ""))
    with pytest.raises(TraceError, match=r"run\.parquet: n_experts: 8, expected 256"):
        open_trace(text, "deepseek-v3")


def test_the_model_named_in_the_file_is_taken_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = stored(tmp_path, "deepseek-v3-run.parquet", of_model("mixtral-8x7b", "Mixtral-8x7B"))
    assert open_trace(text)[1] == load_model("mixtral-8x7b")
    assert capsys.readouterr() == ("", "")


def test_a_longer_name_in_the_file_is_taken_for_the_model_it_begins_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = stored(tmp_path, "x.parquet", of_model("mixtral-8x7b", "org/mixtral-8x7b-tuned-17"))
    assert open_trace(text)[1] == load_model("mixtral-8x7b")
    assert "taken for mixtral-8x7b" in capsys.readouterr().err


def test_a_name_in_the_file_is_never_a_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = str(config_file(tmp_path))
    text = stored(tmp_path, "x.parquet", small_trace(model=inside))
    assert open_trace(text)[1] is None
    assert "is not in the catalogue" in capsys.readouterr().err


def test_the_longest_catalogue_name_that_begins_the_file_name_is_assumed_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = stored(tmp_path, "deepseek_v2_lite-law.parquet", of_model("deepseek-v2-lite", ""))
    trace, spec = open_trace(text)
    assert spec == load_model("deepseek-v2-lite")
    assert trace.model == "deepseek-v2-lite"
    assert "model deepseek-v2-lite assumed from the file's name" in capsys.readouterr().err


def test_a_file_name_that_the_trace_contradicts_assumes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = stored(tmp_path, "deepseek-v3-run.parquet", small_trace())
    trace, spec = open_trace(text)
    assert spec is None
    assert trace.model == ""
    assert "not taken for a trace of deepseek-v3" in capsys.readouterr().err


def test_some_layers_of_a_model_are_a_trace_of_it(tmp_path: Path) -> None:
    text = stored(tmp_path, "mixtral-8x7b.parquet", of_model("mixtral-8x7b", "", n_layers=5))
    assert open_trace(text)[1] == load_model("mixtral-8x7b")


def test_counts_have_models_too(tmp_path: Path) -> None:
    counts = expert_counts(of_model("mixtral-8x7b", ""))
    text = stored(tmp_path, "mixtral-8x7b.parquet", counts)
    trace, spec = open_trace(text)
    assert isinstance(trace, ExpertCounts)
    assert spec == load_model("mixtral-8x7b")


def test_a_config_file_is_a_model(tmp_path: Path) -> None:
    spec = open_trace(str(trace_file(tmp_path)), str(config_file(tmp_path)))[1]
    assert spec is not None
    assert (spec.n_experts, spec.moe_layers) == (8, (0, 1))


def test_a_missing_model_is_named_by_what_needs_it() -> None:
    with pytest.raises(SimulationError, match="pricing needs the model: pass --model"):
        require_model(None, "pricing")


def test_the_bundled_trace_opens_by_its_word() -> None:
    trace, _ = open_trace("bundled")
    assert isinstance(trace, RoutingTrace)
    assert trace.n_tokens >= 20_000


def test_the_phase_is_decode_where_there_are_decode_tokens(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trace = small_trace()
    assert phase_of(trace, "x") == "decode"
    assert phase_of(trace.rows(trace.phase == 0), "x") == "prefill"
    assert capsys.readouterr() == ("", "")
    assert phase_of(expert_counts(trace), "a/prefill_in512.npz") == "prefill"
    assert phase_of(expert_counts(trace), "prefill/in512.npz") == "decode"
    assert capsys.readouterr().err.count("assumed for expert counts") == 2


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("n_ranks", [1, 4, 64])
def test_the_usual_step_shrinks_until_a_trace_fills_a_few(phase: str, n_ranks: int) -> None:
    trace = small_trace()
    tokens = usual_tokens_per_rank(trace, phase, n_ranks)
    of_phase = trace.n_tokens / 2
    assert tokens == 1 or tokens * n_ranks * 4 <= of_phase
    assert tokens in (128, 2048) or tokens * 2 * n_ranks * 4 > of_phase
