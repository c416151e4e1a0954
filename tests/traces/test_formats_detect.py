"""The door: every format is told from its content; what comes in can be stored and read back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.traces.format_files import COUNT_WRITERS, TRACE_WRITERS, model, trace, write_npz
from traces import parquet
from traces.errors import TraceError
from traces.formats.common import name_from_file
from traces.formats.detect import READERS, ImportOptions, detect, read_any
from traces.routing import ExpertCounts, RoutingTrace, content_hash

WITH_MODEL = ImportOptions(model=model())


@pytest.mark.parametrize("name", {**TRACE_WRITERS, **COUNT_WRITERS})
def test_an_import_survives_storing_unchanged(name: str, tmp_path: Path) -> None:
    """The round-trip law: import, write as Parquet, read back: equal content, equal words."""
    imported = read_any({**TRACE_WRITERS, **COUNT_WRITERS}[name](tmp_path), WITH_MODEL)
    stored = tmp_path / "stored.parquet"
    parquet.write(imported, stored)
    back = read_any(stored, WITH_MODEL)
    assert content_hash(back) == content_hash(imported)
    assert (back.layers, back.model, back.capture) == (
        imported.layers,
        imported.model,
        imported.capture,
    )


@pytest.mark.parametrize("name", TRACE_WRITERS)
def test_every_trace_format_gives_a_trace_of_the_model(name: str, tmp_path: Path) -> None:
    found = read_any(TRACE_WRITERS[name](tmp_path), WITH_MODEL)
    assert isinstance(found, RoutingTrace)
    assert (found.n_experts, found.top_k, found.layers) == (16, 3, (1, 2, 3, 4))
    assert found.model == "tiny-moe"


@pytest.mark.parametrize("name", {**TRACE_WRITERS, **COUNT_WRITERS})
def test_a_file_of_another_model_is_refused_by_name_and_number(name: str, tmp_path: Path) -> None:
    path = {**TRACE_WRITERS, **COUNT_WRITERS}[name](tmp_path)
    other = ImportOptions(model=model(name="other-moe", n_experts=15))
    with pytest.raises(TraceError, match=r"1[56]") as caught:
        read_any(path, other)
    assert path.name in str(caught.value)


def test_a_wrong_number_of_experts_is_named_with_file_field_value_and_expectation(
    tmp_path: Path,
) -> None:
    path = write_npz(tmp_path)
    with pytest.raises(TraceError) as caught:
        read_any(path, ImportOptions(model=model(n_experts=64)))
    assert str(caught.value) == (
        f"{path}: n_experts: 16 in the file, expected 64 as in model tiny-moe"
    )


def test_a_wrong_top_k_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="top_k: 3, expected 2 as in model tiny-moe"):
        read_any(write_npz(tmp_path), ImportOptions(model=model(top_k=2)))


def test_a_layer_that_the_model_keeps_dense_is_refused(tmp_path: Path) -> None:
    sparse = ImportOptions(model=model(moe_layers=(2, 3, 4)))
    with pytest.raises(TraceError, match="layers: 1 is no MoE layer of model tiny-moe"):
        read_any(write_npz(tmp_path), sparse)


def test_layers_that_count_from_1_are_recognised_and_can_be_told(tmp_path: Path) -> None:
    """As Megatron numbers them: a capture of layers 1-4 of a model whose MoE layers are 0-3."""
    path = write_npz(tmp_path)
    moved = model(n_layers=4, moe_layers=(0, 1, 2, 3))
    with pytest.raises(TraceError, match=r"layers: 4 is no MoE layer .*do they count from 1\?"):
        read_any(path, ImportOptions(model=moved))
    found = read_any(path, ImportOptions(model=moved, layers=(0, 1, 2, 3)))
    assert found.layers == (0, 1, 2, 3)


def test_experts_on_the_command_line_must_agree_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="n_experts: 16 in the file, expected 32 as in --experts"):
        read_any(write_npz(tmp_path), ImportOptions(n_experts=32))


def test_an_unknown_format_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="format 'hdf5' is unknown") as caught:
        read_any(write_npz(tmp_path), ImportOptions(format="hdf5"))
    assert all(name in str(caught.value) for name in READERS)


def test_unknown_content_lists_the_known_formats(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are no expert choices\n")
    with pytest.raises(TraceError, match="unknown format") as caught:
        detect(path)
    assert all(name in str(caught.value) for name in READERS)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file"):
        read_any(tmp_path / "nothing.npz")


def test_a_stored_trace_without_a_name_takes_the_model_s(tmp_path: Path) -> None:
    path = tmp_path / "nameless.parquet"
    parquet.write(replace(trace(), model=""), path)
    assert read_any(path, WITH_MODEL).model == "tiny-moe"
    assert read_any(path).model == ""


def test_stored_counts_are_held_against_the_model(tmp_path: Path) -> None:
    path = tmp_path / "counts.parquet"
    imported = read_any(COUNT_WRITERS["counts npz"](tmp_path))
    parquet.write(imported, path)
    assert isinstance(read_any(path, WITH_MODEL), ExpertCounts)
    with pytest.raises(TraceError, match="n_experts: 16, expected 8"):
        read_any(path, ImportOptions(model=model(n_experts=8)))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("deepseek-v3-decode_in2000out100.npz", "deepseek-v3"),
        ("qwen3-30b-a3b-arc-english.npz", "qwen3-30b-a3b"),
        ("Mixtral_8x7B-mtbench.npz", "mixtral-8x7b"),
        ("deepseek-v2-lite-law.npz", "deepseek-v2-lite"),
        ("unheard-of.npz", ""),
    ],
)
def test_a_model_is_recognised_by_the_longest_name_the_file_starts_with(
    file: str, name: str
) -> None:
    known = ["deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "mixtral-8x7b", "qwen3-30b-a3b"]
    assert name_from_file(Path("/data") / file, known) == name
