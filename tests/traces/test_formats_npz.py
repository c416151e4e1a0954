"""Our npz form: what index.json adds, what is derived, and the development data as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.traces.format_files import MOE_LAYERS, choices, counts, model, trace
from traces.errors import TraceError
from traces.formats.common import running_index
from traces.formats.detect import ImportOptions, read_any
from traces.routing import ExpertCounts, RoutingTrace, expert_counts


def save(folder: Path, **arrays: Any) -> Path:
    path = folder / "tiny-moe-run.npz"
    np.savez_compressed(path, **arrays)
    return path


def index(folder: Path, **changes: Any) -> None:
    entry = {
        "file": "tiny-moe-run.npz",
        "model": "Tiny-MoE",
        "num_experts": 16,
        "top_k": 3,
        "layers": list(MOE_LAYERS),
        "note": "for the test",
        **changes,
    }
    (folder / "index.json").write_text(json.dumps([{"file": "another.npz"}, entry]))


def test_index_json_beside_the_file_says_model_experts_and_layers(tmp_path: Path) -> None:
    index(tmp_path)
    found = read_any(save(tmp_path, topk=choices(), seq=trace().request, phase=trace().phase))
    assert isinstance(found, RoutingTrace)
    assert (found.model, found.n_experts, found.layers) == ("tiny-moe", 16, MOE_LAYERS)
    assert "for the test" in found.capture
    np.testing.assert_array_equal(found.topk, choices())


def test_all_fields_come_in_with_their_types(tmp_path: Path) -> None:
    weights = np.full((18, 4, 3), 0.25)
    path = save(
        tmp_path,
        topk=choices().astype(np.int64),
        seq=trace().request.astype(np.int64),
        phase=trace().phase.astype(np.uint8),
        pos=trace().position + 100,
        fwd=np.arange(18, dtype=np.int16),
        weights=weights,
        layers=MOE_LAYERS,
        n_experts=16,
    )
    found = read_any(path)
    assert isinstance(found, RoutingTrace)
    assert found.topk.dtype == np.int16
    assert found.position.dtype == np.int32
    assert found.position[0] == 100
    assert found.forward is not None
    assert found.forward.dtype == np.int64
    assert found.weights is not None
    assert found.weights.dtype == np.float16


def test_positions_count_within_each_request_even_when_requests_interleave() -> None:
    request = np.array([4, 9, 4, 4, 9, 0])
    np.testing.assert_array_equal(running_index(request), [0, 0, 1, 2, 1, 0])


def test_without_experts_the_user_is_told_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="n_experts is not in the file; pass --model or --experts"):
        read_any(save(tmp_path, topk=choices()))


def test_the_model_supplies_layers_and_experts(tmp_path: Path) -> None:
    found = read_any(save(tmp_path, topk=choices()), ImportOptions(model=model()))
    assert found.layers == MOE_LAYERS
    assert "requests not logged" in found.capture


def test_fewer_layers_than_the_model_need_to_be_told_which(tmp_path: Path) -> None:
    path = save(tmp_path, topk=choices()[:, :2])
    with pytest.raises(TraceError, match=r"topk: 2 layers, expected 4 .*pass --layers"):
        read_any(path, ImportOptions(model=model()))
    found = read_any(path, ImportOptions(model=model(), layers=(2, 4)))
    assert found.layers == (2, 4)


def test_assumed_layer_indices_are_said_so(tmp_path: Path) -> None:
    found = read_any(save(tmp_path, topk=choices()), ImportOptions(n_experts=16))
    assert found.layers == (0, 1, 2, 3)
    assert "layer indices assumed" in found.capture


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 2}, "top_k: 3, expected 2 as in index.json"),
        ({"num_experts": -1}, "index.json: entry tiny-moe-run.npz: field num_experts"),
        ({"num_experts": "16"}, "field num_experts"),
        ({"layers": [1, 2, 3]}, "topk: 4 layers, expected 3"),
        ({"layers": [1, 2, 4, 3]}, "expected increasing indices"),
        ({"num_experts": 8}, "expert id"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    index(tmp_path, **changes)
    with pytest.raises(TraceError, match=message):
        read_any(save(tmp_path, topk=choices()))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"topk": choices().astype(np.float32)}, r"topk: float32\[18, 4, 3\], expected integers"),
        ({"topk": choices()[0]}, r"topk: int16\[4, 3\], expected integers of 3 dimensions"),
        ({"topk": choices(), "seq": np.arange(17)}, "request: 17 values, expected 18"),
        ({"topk": choices(), "phase": np.full(18, 2)}, "phase: values 2..2, expected 0..1"),
        ({"topk": choices(), "pos": np.full(18, -1)}, "position: values -1..-1, expected 0.."),
        ({"topk": choices(), "weights": np.zeros((18, 4))}, r"weights: .* \[18, 4, 3\]"),
        ({"topk": choices(), "weights": np.full((18, 4, 3), np.nan)}, "weights: not finite"),
        ({"topk": np.where(choices() == 5, -2, choices())}, "expert id -2 at token"),
        ({"other": np.zeros(3)}, "arrays .*other.*, expected topk, counts or expected_selections"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_field_value_and_expectation(
    arrays: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = save(tmp_path, **arrays)
    with pytest.raises(TraceError, match=message) as caught:
        read_any(path, ImportOptions(n_experts=16))
    assert str(path) in str(caught.value)


def test_missing_cells_are_kept_and_need_no_weight(tmp_path: Path) -> None:
    ids = choices()
    ids[3, 1] = -1
    weights = np.where(ids < 0, np.nan, 0.5)
    found = read_any(save(tmp_path, topk=ids, weights=weights, n_experts=16))
    assert isinstance(found, RoutingTrace)
    assert (found.topk[3, 1] == -1).all()


def test_counts_keep_their_layers_and_may_be_fractions(tmp_path: Path) -> None:
    path = save(tmp_path, expected_selections=counts() / 7, layers=MOE_LAYERS)
    found = read_any(path)
    assert isinstance(found, ExpertCounts)
    assert found.layers == MOE_LAYERS
    np.testing.assert_allclose(found.counts, counts() / 7)


def test_counts_of_a_model_know_its_top_k_and_drop_its_dense_layers(tmp_path: Path) -> None:
    with_dense = np.concatenate([np.zeros((1, 16)), counts()])
    found = read_any(save(tmp_path, counts=with_dense), ImportOptions(model=model()))
    assert isinstance(found, ExpertCounts)
    assert (found.layers, found.top_k) == (MOE_LAYERS, 3)
    assert "1 all-zero rows dropped" in found.capture


def test_a_negative_count_is_named_with_layer_and_expert(tmp_path: Path) -> None:
    bad = counts().astype(float)
    bad[2, 7] = -3
    with pytest.raises(TraceError, match=r"counts: -3.0 at layer 3, expert 7"):
        read_any(save(tmp_path, counts=bad, layers=MOE_LAYERS))


def test_loads_per_rank_are_not_taken_for_counts(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="array tokens holds loads per rank"):
        read_any(save(tmp_path, tokens=np.zeros((4, 3, 8), np.int64)))


# --- the development data --------------------------------------------------------------------


def test_all_shared_captures_come_in_as_their_index_says(shared: Path) -> None:
    for entry in json.loads((shared / "traces" / "index.json").read_text()):
        found = read_any(shared / "traces" / entry["file"])
        assert isinstance(found, RoutingTrace)
        assert found.model == entry["model"].lower()
        assert list(found.layers) == entry["layers"]
        assert found.n_experts == entry["num_experts"]
        assert found.topk.shape == (entry["tokens"], len(entry["layers"]), entry["top_k"])
        assert len(np.unique(found.request)) == entry["sequences"]
        assert int(found.phase.sum()) == entry["decode_tokens"]


def test_a_capture_that_logs_positions_keeps_them(shared: Path) -> None:
    found = read_any(shared / "traces" / "gpt-oss-20b-decode.npz")
    assert isinstance(found, RoutingTrace)
    assert found.position[0] == 97  # decode only: the prompt's 97 tokens were not captured


def test_shared_counts_come_in_with_and_without_layers(shared: Path) -> None:
    files = sorted((shared / "counts").glob("*.npz"))
    found = {file.name: read_any(file) for file in files if "rank-loads" not in file.name}
    assert all(isinstance(counts, ExpertCounts) for counts in found.values())
    deepseek = found["deepseek-v3-decode_in2000out100.npz"]
    assert (deepseek.n_experts, deepseek.layers) == (256, tuple(range(3, 61)))
    qwen = found["qwen3-30b-a3b-arc-english.npz"]
    assert (qwen.n_experts, qwen.n_layers) == (128, 48)
    assert "quant_loss, weight" in found["mixtral-8x7b-c4-bits.npz"].capture


def test_shared_rank_loads_are_refused_as_such(shared: Path) -> None:
    files = sorted((shared / "counts").glob("ep-rank-loads-*.npz"))
    assert files
    for file in files:
        with pytest.raises(TraceError, match="loads per rank"):
            read_any(file)


def test_counts_of_a_shared_trace_add_up(shared: Path) -> None:
    found = read_any(shared / "traces" / "flame-moe-290m.npz")
    assert isinstance(found, RoutingTrace)
    np.testing.assert_array_equal(expert_counts(found).counts.sum(axis=1), 2048 * 6)
