"""The two formats of JSON lines: Megatron's router trace and the preplay captures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.traces.format_files import (
    MOE_LAYERS,
    choices,
    megatron_line,
    model,
    preplay_records,
    trace,
    write_megatron,
    write_preplay,
)
from traces.errors import TraceError
from traces.formats.detect import ImportOptions, read_any
from traces.routing import RoutingTrace

WITH_MODEL = ImportOptions(model=model())


def read_trace(path: Path, options: ImportOptions = WITH_MODEL) -> RoutingTrace:
    found = read_any(path, options)
    assert isinstance(found, RoutingTrace)
    return found


# --- Megatron --------------------------------------------------------------------------------


def rank_file(folder: Path, rank: int, text: str) -> Path:
    path = folder / f"router_trace_rank{rank}.jsonl"
    path.write_text(text)
    return path


def test_a_rank_s_file_gives_choices_steps_and_one_request_a_batch(tmp_path: Path) -> None:
    found = read_trace(write_megatron(tmp_path))
    np.testing.assert_array_equal(found.topk, choices())
    np.testing.assert_array_equal(found.request, [0] * 9 + [1] * 9)
    np.testing.assert_array_equal(found.forward, [0] * 9 + [1] * 9)
    assert found.layers == MOE_LAYERS
    assert "sequences not logged" in found.capture


def test_ranks_with_the_same_layers_saw_different_tokens(tmp_path: Path) -> None:
    for rank in (0, 1):
        ids = choices(5, seed=rank)
        lines = [megatron_line(0, n, ids[:, c], rank) for c, n in enumerate(MOE_LAYERS)]
        rank_file(tmp_path, rank, "".join(lines))
    found = read_trace(tmp_path)
    np.testing.assert_array_equal(found.topk, np.concatenate([choices(5, 0), choices(5, 1)]))


def test_pipeline_stages_of_the_same_tokens_are_joined_in_rank_order(tmp_path: Path) -> None:
    """Two stages of two ranks: ranks 0 and 1 hold layers 1-2, ranks 2 and 3 layers 3-4."""
    for rank in range(4):
        ids, stage = choices(5, seed=rank % 2), rank // 2
        columns = (2 * stage, 2 * stage + 1)
        lines = [megatron_line(0, MOE_LAYERS[c], ids[:, c], rank) for c in columns]
        rank_file(tmp_path, rank, "".join(lines))
    found = read_trace(tmp_path)
    assert found.layers == MOE_LAYERS
    np.testing.assert_array_equal(found.topk, np.concatenate([choices(5, 0), choices(5, 1)]))


def test_microbatches_of_one_step_follow_each_other(tmp_path: Path) -> None:
    lines = [
        megatron_line(7, layer, choices(4, seed=batch)[:, column])
        for batch in (0, 1)
        for column, layer in enumerate(MOE_LAYERS)
    ]
    found = read_trace(rank_file(tmp_path, 0, "".join(lines)))
    np.testing.assert_array_equal(found.topk, np.concatenate([choices(4, 0), choices(4, 1)]))
    np.testing.assert_array_equal(found.forward, [7] * 8)
    np.testing.assert_array_equal(found.request, [0] * 4 + [1] * 4)


def test_blocks_other_than_the_decoder_are_skipped_and_counted(tmp_path: Path) -> None:
    path = write_megatron(tmp_path)
    extra = megatron_line(0, 1, choices()[:, 0], block="mtp", mtp_idx=0)
    path.write_text(path.read_text() + extra)
    assert "1 lines of mtp/pre_dispatch skipped" in read_trace(path).capture


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "step 1: 3 layers, expected 4 as in other steps"),
        (lambda lines: [*lines[:-1], lines[-1][:40]], "line 8: JSON truncated or damaged"),
        (lambda lines: [lines[0].replace('"layer"', '"lair"')], "field layer: Field required"),
        (
            lambda lines: [lines[0].replace('"num_tokens": 9', '"num_tokens": 8')],
            r"top_indices \[9, 3\], expected \[num_tokens=8, topk=3\]",
        ),
        (lambda lines: [lines[0].replace("[[", "[[[")], "line 1: JSON truncated"),
        (lambda lines: [line.replace("decoder", "mtp") for line in lines], "no lines of block dec"),
    ],
)
def test_a_router_trace_that_does_not_fit_is_refused_with_its_line(
    change: Callable[[list[str]], list[str]], message: str, tmp_path: Path
) -> None:
    path = write_megatron(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")
    with pytest.raises(TraceError, match=message):
        read_any(path, ImportOptions(n_experts=16))


def test_stages_of_unequal_rank_numbers_are_refused(tmp_path: Path) -> None:
    ids = choices(5)
    for rank, columns in enumerate([(0, 1), (0, 1), (2, 3)]):
        lines = [megatron_line(0, MOE_LAYERS[c], ids[:, c], rank) for c in columns]
        rank_file(tmp_path, rank, "".join(lines))
    with pytest.raises(TraceError, match="ranks hold layers"):
        read_any(tmp_path, WITH_MODEL)


# --- preplay ---------------------------------------------------------------------------------


def save_preplay(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "preplay.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_preplay_file_says_all_there_is_without_any_option(tmp_path: Path) -> None:
    found, of = read_trace(write_preplay(tmp_path), ImportOptions()), trace()
    for field in ("topk", "request", "position", "phase"):
        np.testing.assert_array_equal(getattr(found, field), getattr(of, field))
    assert (found.model, found.n_experts, found.layers) == ("tiny-moe", 16, MOE_LAYERS)
    assert found.weights is not None
    np.testing.assert_array_equal(found.weights[0, 0], np.float16([0.5, 0.3, 0.2]))


def changed(number: int, **fields: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Records with some fields of one of them replaced."""
    return lambda records: [
        {**record, **fields} if i == number else record for i, record in enumerate(records)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda records: records[:-1], "no footer, .*the file was cut short"),
        (lambda records: records[1:], "line 1: row_type request, expected the header first"),
        (lambda records: records[:5] + records[6:], "prefill_forward_token_count=8, but 7"),
        (lambda records: [*records, records[2]], "line 23: forward-token after the footer"),
        (changed(2, request_id="r9"), "line 3: request_id r9, expected one announced"),
        (changed(2, token_id=8), "token_id 8 at prefill index 0 is not that of request r0"),
        (changed(2, token_index=99), "token_id 7 at prefill index 99"),
        (changed(2, phase="training"), "line 3: field phase"),
        (changed(2, surprise=1), "line 3: field surprise: Extra inputs are not permitted"),
        (changed(2, routing=[]), r"line 3: layer_index \[\], expected those of the header"),
        (changed(2, row_type="thought"), "line 3: row_type thought is unknown"),
        (changed(0, schema="simllm-preplay-trace-v9"), "schema simllm-preplay-trace-v9, expected"),
        (changed(0, provenance={"top_k": 3}), "line 1: field expert_count: Field required"),
    ],
)
def test_a_preplay_file_that_does_not_fit_is_refused_with_its_line(
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TraceError, match=message):
        read_any(save_preplay(tmp_path, change(preplay_records())))


def test_a_layer_with_too_few_experts_is_refused(tmp_path: Path) -> None:
    records = preplay_records()
    records[3]["routing"][1]["expert_ids"] = [1, 2]
    with pytest.raises(TraceError, match="line 4: layer 2: 2 expert_ids, 3 gate_weights"):
        read_any(save_preplay(tmp_path, records))


def test_an_id_beyond_the_header_s_experts_is_refused(tmp_path: Path) -> None:
    records = preplay_records()
    records[3]["routing"][1]["expert_ids"] = [1, 2, 16]
    with pytest.raises(TraceError, match="expert id 16 at token 1, layer 2, expected 0..15"):
        read_any(save_preplay(tmp_path, records))


def test_the_shared_granite_prompt_comes_in_whole(shared: Path) -> None:
    found = read_trace(shared / "raw" / "granite_length_cap.jsonl", ImportOptions())
    assert found.topk.shape == (22, 24, 8)
    assert found.model == "granite-3.0-1b-a400m-instruct"
    assert not found.phase.any()
    np.testing.assert_array_equal(found.topk[0, 0], [18, 13, 11, 14, 29, 23, 12, 22])
    assert found.weights is not None
    np.testing.assert_allclose(found.weights.sum(axis=2, dtype=float), 1, atol=2e-3)


def test_the_shared_sglang_run_comes_in_with_decode_behind_its_prompts(shared: Path) -> None:
    found = read_trace(shared / "raw" / "routing-trace.jsonl", ImportOptions())
    assert found.topk.shape == (216, 24, 8)
    assert found.weights is None
    for request in range(8):
        rows = found.request == request
        np.testing.assert_array_equal(found.position[rows], range(27))
        np.testing.assert_array_equal(found.phase[rows], [0] * 8 + [1] * 19)
    assert "186 kv-event lines not imported" in found.capture


def test_two_engines_agree_on_the_hot_expert_of_granite(shared: Path) -> None:
    """Independent captures (transformers and SGLang) of one model: expert 8 leads layer 1."""
    for name in ("granite_length_cap.jsonl", "routing-trace.jsonl"):
        found = read_trace(shared / "raw" / name, ImportOptions())
        assert (found.topk[:, 1] == 8).any(axis=1).mean() > 0.9
