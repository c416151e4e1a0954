"""Experts returned with answers: SGLang's bare bytes, vLLM's npy in base64, bare arrays."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.traces.format_files import (
    MOE_LAYERS,
    OUTPUTS,
    PROMPTS,
    all_layers,
    choices,
    model,
    npy_base64,
    trace,
    write_routed_npy,
    write_sglang_responses,
    write_vllm_responses,
)
from traces.errors import TraceError
from traces.formats.detect import ImportOptions, read_any
from traces.routing import RoutingTrace

WITH_MODEL = ImportOptions(model=model())


def read_trace(path: Path, options: ImportOptions = WITH_MODEL) -> RoutingTrace:
    found = read_any(path, options)
    assert isinstance(found, RoutingTrace)
    return found


def without_last_tokens() -> RoutingTrace:
    of = trace()
    last = np.flatnonzero(np.append(of.request[1:] != of.request[:-1], True))
    return of.rows(np.setdiff1d(np.arange(of.n_tokens), last))


def answer(folder: Path, **changes: Any) -> Path:
    """One SGLang answer of 5 prompt and 4 completion tokens."""
    rows = all_layers(choices(8)).astype("<i4")
    meta = {
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "routed_experts": base64.b64encode(rows.tobytes()).decode(),
        **changes,
    }
    path = folder / "answer.json"
    path.write_text(json.dumps({"text": "", "meta_info": meta}))
    return path


@pytest.mark.parametrize("write", [write_sglang_responses, write_vllm_responses])
def test_answers_give_back_choices_requests_positions_and_phases(
    write: Any, tmp_path: Path
) -> None:
    found, of = read_trace(write(tmp_path)), without_last_tokens()
    for field in ("topk", "request", "position", "phase"):
        np.testing.assert_array_equal(getattr(found, field), getattr(of, field))
    assert found.layers == MOE_LAYERS
    assert "last token of each request not captured" in found.capture


def test_vllm_answers_need_no_model_but_a_number_of_experts(tmp_path: Path) -> None:
    found = read_trace(write_vllm_responses(tmp_path), ImportOptions(n_experts=16))
    assert found.layers == MOE_LAYERS  # the all-zero dense layer went


def test_bytes_without_a_shape_ask_for_the_model(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="bytes without a shape; pass --model"):
        read_any(write_sglang_responses(tmp_path), ImportOptions(n_experts=16))


def test_a_start_behind_the_prompt_s_beginning_shifts_positions(tmp_path: Path) -> None:
    """routed_experts_start_len leaves out the first tokens; the lengths tell how many."""
    rows = all_layers(choices(8)).astype("<i4")[3:]
    found = read_trace(answer(tmp_path, routed_experts=base64.b64encode(rows.tobytes()).decode()))
    np.testing.assert_array_equal(found.position, range(3, 8))
    np.testing.assert_array_equal(found.phase, [0, 0, 1, 1, 1])


def test_more_rows_than_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="8 rows, expected at most 5 for 5 prompt and 1"):
        read_any(answer(tmp_path, completion_tokens=1), WITH_MODEL)


def test_bytes_that_do_not_divide_into_layers_are_refused(tmp_path: Path) -> None:
    short = base64.b64encode(b"\0" * 100).decode()
    with pytest.raises(TraceError, match="100 bytes, expected a multiple of 60"):
        read_any(answer(tmp_path, routed_experts=short), WITH_MODEL)


def test_text_that_is_not_base64_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="routed_experts: not base64"):
        read_any(answer(tmp_path, routed_experts="not*base64"), WITH_MODEL)


def test_missing_prompt_lengths_are_said_so(tmp_path: Path) -> None:
    found = read_trace(answer(tmp_path, prompt_tokens=None))
    assert not found.phase.any()
    assert "prompt length not in the file" in found.capture


def test_nested_lists_and_a_separate_prompt_part_are_joined(tmp_path: Path) -> None:
    rows = all_layers(choices(8))
    response = {
        "choices": [{"routed_experts": rows[5:].tolist()}],
        "prompt_routed_experts": rows[:5].tolist(),
        "usage": {"prompt_tokens": 5, "completion_tokens": 4},
    }
    path = tmp_path / "split.json"
    path.write_text(json.dumps(response))
    found = read_trace(path)
    np.testing.assert_array_equal(found.topk, choices(8))
    np.testing.assert_array_equal(found.phase, [0] * 5 + [1] * 3)


def test_sglang_s_openai_answers_are_read_from_sglext(tmp_path: Path) -> None:
    rows = all_layers(choices(8)).astype("<i4")
    response = {
        "choices": [{"index": 0}],
        "sglext": {"routed_experts": base64.b64encode(rows.tobytes()).decode()},
        "usage": {"prompt_tokens": 5, "completion_tokens": 4},
    }
    path = tmp_path / "openai.json"
    path.write_text(json.dumps(response))
    np.testing.assert_array_equal(read_trace(path).topk, choices(8))


def test_several_choices_are_several_requests(tmp_path: Path) -> None:
    rows = all_layers(choices(8)).astype(np.uint8)
    response = {
        "choices": [{"routed_experts": npy_base64(rows)}, {"routed_experts": npy_base64(rows[:6])}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 4},
    }
    path = tmp_path / "two.json"
    path.write_text(json.dumps(response))
    found = read_trace(path)
    np.testing.assert_array_equal(found.request, [0] * 8 + [1] * 6)


def test_a_bare_array_is_one_request(tmp_path: Path) -> None:
    found = read_trace(write_routed_npy(tmp_path))
    np.testing.assert_array_equal(found.topk, choices())
    assert set(found.request.tolist()) == {0}


def test_the_same_array_in_an_npz_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "routed.npz"
    np.savez(path, routed_experts=all_layers(choices()))
    np.testing.assert_array_equal(read_trace(path).topk, choices())


def test_an_array_of_moe_layers_only_takes_the_model_s_layers(tmp_path: Path) -> None:
    path = tmp_path / "routed.npy"
    np.save(path, choices())
    assert read_trace(path).layers == MOE_LAYERS


def test_an_array_of_another_depth_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "routed.npy"
    np.save(path, choices()[:, :3])
    with pytest.raises(TraceError, match=r"3 layers, expected 5 \(or 4 MoE layers\)"):
        read_any(path, WITH_MODEL)


def test_a_moe_layer_left_all_zero_is_refused(tmp_path: Path) -> None:
    rows = all_layers(choices())
    rows[:, 2] = 0
    path = tmp_path / "routed.npy"
    np.save(path, rows)
    with pytest.raises(TraceError, match=r"layer 2 repeats an id in its rows \(\[0, 0, 0\]\)"):
        read_any(path, WITH_MODEL)


def test_a_placement_matrix_is_not_taken_for_routed_experts(shared: Path) -> None:
    with pytest.raises(TraceError, match="expected distinct expert ids"):
        read_any(shared / "raw" / "omni-placement-58l-16r.npy", ImportOptions(n_experts=256))


def test_the_fixture_has_one_row_less_than_tokens() -> None:
    assert without_last_tokens().n_tokens == sum(PROMPTS) + sum(OUTPUTS) - 2
