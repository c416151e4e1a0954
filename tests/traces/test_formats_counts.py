"""Popularity from CSV and TensorRT-LLM, and choices from Hugging Face logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.traces.format_files import (
    MOE_LAYERS,
    choices,
    counts,
    logits,
    model,
    write_csv,
    write_logits_npz,
    write_logits_pt,
    write_matrix_csv,
    write_safetensors,
    write_tensorrt,
)
from traces.errors import TraceError
from traces.formats.detect import ImportOptions, read_any
from traces.routing import ExpertCounts, RoutingTrace

WITH_MODEL = ImportOptions(model=model())


@pytest.mark.parametrize("write", [write_csv, write_matrix_csv])
def test_both_csv_forms_give_the_counts_by_absolute_layer(write: Any, tmp_path: Path) -> None:
    found = read_any(write(tmp_path))
    assert isinstance(found, ExpertCounts)
    assert found.layers == MOE_LAYERS
    np.testing.assert_array_equal(found.counts, counts())


def test_pairs_left_out_of_the_long_form_count_zero(tmp_path: Path) -> None:
    path = tmp_path / "sparse.csv"
    path.write_text("Layer, Expert, Count\n4,15,2.5\n1,0,1\n\n")
    found = read_any(path, WITH_MODEL)
    assert isinstance(found, ExpertCounts)
    assert found.layers == (1, 4)
    assert found.counts.sum() == 3.5
    assert found.counts[1, 15] == 2.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer,expert,count\n1,0,5\n1,0,5\n", "row 3: layer 1, expert 0 comes twice"),
        ("layer,expert,count\n1,-2,5\n", "row 2: expert: '-2', expected an integer >= 0"),
        ("layer,expert,count\n1,2\n", "row 2: 2 cells, expected 3"),
        ("layer,expert,count\n1,2,many\n", "row 2: count: 'many', expected a number"),
        ("layer,expert,count\n1,2,-4\n", "counts: -4.0 at layer 1, expert 2"),
        ("layer,expert,count\n1,2,nan\n", "counts: nan at layer 1"),
        ("layer,expert,count\n", "1 lines, expected a header and counts"),
        ("layer,0,2\n1,5,5\n", r"header: experts \[0, 2\], expected 0,1,2"),
        ("layer,0,1\n1,5\n", "row 2: 2 cells, expected 3"),
        ("layer,0,1\n1,5,5\n1,6,6\n", "row 3: layer 1 comes twice"),
        ("layer,expert,count\n1,2,0\n", "all zero"),
    ],
)
def test_a_csv_that_does_not_fit_is_refused_with_its_row(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_any(path)


def test_tensorrt_statistics_add_up_over_ranks_and_iterations(tmp_path: Path) -> None:
    found = read_any(write_tensorrt(tmp_path))
    assert isinstance(found, ExpertCounts)
    assert (found.layers, found.top_k) == (MOE_LAYERS, 3)
    np.testing.assert_array_equal(found.counts, 4 * counts())
    assert "2 ranks, iterations 10..11" in found.capture


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"10_1": counts()[0], "12_1": counts()[0]}, r"iterations \[10, 12\], expected contiguous"),
        ({"10_1": counts()[0], "11_2": counts()[0]}, "iterations differ in their layers"),
        ({"10_1": counts()[0][:8]}, r"tensor 10_1: int64\[8\], expected iteration_layer: int.*16"),
        ({"layer1": counts()[0]}, "tensor layer1"),
        ({"10_1": -counts()[0]}, "counts: -"),
    ],
)
def test_tensorrt_statistics_that_do_not_fit_are_refused(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    (tmp_path / "meta_info.json").write_text(
        json.dumps({"num_experts": 16, "num_experts_per_token": 3})
    )
    write_safetensors(tmp_path / "rank0.safetensors", arrays)
    with pytest.raises(TraceError, match=message):
        read_any(tmp_path)


def test_tensorrt_without_rank_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "meta_info.json").write_text('{"num_experts": 16, "num_experts_per_token": 3}')
    with pytest.raises(TraceError, match="no rank.*safetensors"):
        read_any(tmp_path)


# --- router logits ---------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_logits_npz, write_logits_pt])
def test_logits_give_the_choices_largest_first_and_stay_as_scores(
    write: Any, tmp_path: Path
) -> None:
    found = read_any(write(tmp_path), WITH_MODEL)
    assert isinstance(found, RoutingTrace)
    np.testing.assert_array_equal(found.topk, choices())
    assert found.scores is not None
    np.testing.assert_allclose(found.scores, logits().swapaxes(0, 1), atol=0.01)


def test_a_bare_tuple_of_tensors_is_read_when_the_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bare.pt"
    torch.save(tuple(torch.from_numpy(layer.copy()) for layer in logits()), path)
    options = ImportOptions(model=model(), format="hf-router-logits")
    found = read_any(path, options)
    assert isinstance(found, RoutingTrace)
    np.testing.assert_array_equal(found.topk, choices())


def test_numbered_arrays_are_layers_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "numbered.npz"
    np.savez(path, **{f"router_logits_{i}": layer for i, layer in enumerate(logits())})
    found = read_any(path, WITH_MODEL)
    assert isinstance(found, RoutingTrace)
    np.testing.assert_array_equal(found.topk, choices())


def test_ties_go_to_the_lower_expert(tmp_path: Path) -> None:
    path = tmp_path / "ties.npz"
    np.savez(path, router_logits=np.zeros((4, 5, 16), np.float32))
    found = read_any(path, WITH_MODEL)
    assert isinstance(found, RoutingTrace)
    assert (found.topk == [0, 1, 2]).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"router": "sigmoid+bias(noaux_tc), group top-4 of 8"},
        {"router": "softmax", "n_groups": 4, "topk_groups": 2},
        {"router": "softmax + bias correction top-k"},
    ],
)
def test_routers_that_logits_alone_do_not_decide_are_refused(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(TraceError, match="which the logits alone do not decide"):
        read_any(write_logits_npz(tmp_path), ImportOptions(model=model(**changes)))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"router_logits": logits()}, "top_k is not in the file; pass --model"),
        ({"router_logits": logits(), "top_k": 17}, "top_k: 17, expected 1..16"),
        ({"router_logits": logits()[0]}, r"layers of shapes .*expected \[tokens, experts\]"),
        ({"router_logits": logits() * np.nan, "top_k": 3}, "expected finite floats"),
        ({"router_logits": logits().astype(int), "top_k": 3}, "expected finite floats"),
        ({"router_logits": logits(), "top_k": 3, "layers": np.zeros(4)}, "layers: float64"),
    ],
)
def test_logits_that_do_not_fit_are_refused(
    arrays: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(TraceError, match=message):
        read_any(path)
