"""SGLang's recorder: slots become experts, dense layers go, requests are told from positions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces.format_files import (
    MOE_LAYERS,
    counts,
    model,
    per_token_records,
    save_recorder,
    slots_map,
    trace,
    write_per_pass,
    write_per_token,
    write_stat,
    write_stat_json,
)
from traces.errors import TraceError
from traces.formats.detect import ImportOptions, read_any
from traces.formats.sglang_requests import RequestTracker
from traces.routing import ExpertCounts, RoutingTrace, expert_counts

WITH_MODEL = ImportOptions(model=model())
FUZZ = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def test_stat_sums_its_buffer_and_keeps_absolute_layers(tmp_path: Path) -> None:
    found = read_any(write_stat(tmp_path), WITH_MODEL)
    assert isinstance(found, ExpertCounts)
    assert found.layers == MOE_LAYERS
    np.testing.assert_array_equal(found.counts, 2 * counts())  # two of four rows were empty


def test_stat_as_json_says_the_same(tmp_path: Path) -> None:
    found = read_any(write_stat_json(tmp_path))
    assert isinstance(found, ExpertCounts)
    np.testing.assert_array_equal(found.counts, counts())


def test_per_pass_of_all_ranks_adds_up_through_the_slot_map(tmp_path: Path) -> None:
    found = read_any(write_per_pass(tmp_path), WITH_MODEL)
    assert isinstance(found, ExpertCounts)
    assert found.layers == MOE_LAYERS
    np.testing.assert_array_equal(found.counts, 3 * counts())
    assert "3 passes on 2 ranks" in found.capture


def test_replicas_of_an_expert_are_counted_together(tmp_path: Path) -> None:
    slots = np.zeros((5, 18), np.int32)
    slots[1, [15, 16]] = 4, 3  # slots 15 and 16 both hold expert 0
    record = {"forward_pass_id": 0, "rank": 0, "global_physical_count": torch.from_numpy(slots)}
    path = save_recorder(tmp_path / "expert_distribution_recorder_1_0.pt", [record])
    found = read_any(path)
    assert isinstance(found, ExpertCounts)
    assert found.layers == (1,)
    assert found.counts[0, 0] == 7


def test_per_token_gives_back_the_captured_choices(tmp_path: Path) -> None:
    found, of = read_any(write_per_token(tmp_path), WITH_MODEL), trace()
    assert isinstance(found, RoutingTrace)
    rows = np.lexsort((found.position, found.request))
    for field in ("topk", "request", "position", "phase"):
        np.testing.assert_array_equal(getattr(found, field)[rows], getattr(of, field))
    assert found.forward is not None
    np.testing.assert_array_equal(np.unique(found.forward), range(7))
    assert (np.diff(found.forward) >= 0).all()
    assert "requests derived from positions" in found.capture


def test_ranks_that_saw_the_same_batch_count_once(tmp_path: Path) -> None:
    for rank in (0, 1):
        save_recorder(
            tmp_path / f"expert_distribution_recorder_1.{rank}_{rank}.pt", per_token_records(rank)
        )
    found = read_any(tmp_path, WITH_MODEL)
    assert isinstance(found, RoutingTrace)
    assert found.n_tokens == trace().n_tokens
    assert "7 passes that were empty or copies" in found.capture


def test_ranks_that_saw_other_tokens_are_kept_apart(tmp_path: Path) -> None:
    first, second = per_token_records(0), per_token_records(1)
    for record in second:
        record["topk_ids_of_layer"] = record["topk_ids_of_layer"].flip(2).roll(1, 0).roll(-1, 0)
        record["topk_ids_of_layer"][1:, :, :3] = record["topk_ids_of_layer"][1:, :, 5:]
        record["topk_ids_of_layer"][:, :, 3:] = -1
    save_recorder(tmp_path / "expert_distribution_recorder_1_0.pt", first)
    save_recorder(tmp_path / "expert_distribution_recorder_2_1.pt", second)
    found = read_any(tmp_path, WITH_MODEL)
    assert isinstance(found, RoutingTrace)
    assert found.n_tokens == 2 * trace().n_tokens
    assert len(np.unique(found.request)) == 4


def test_top_k_is_the_width_that_was_used(tmp_path: Path) -> None:
    found = read_any(write_per_token(tmp_path))
    assert isinstance(found, RoutingTrace)
    assert found.top_k == 3
    assert found.n_experts == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forward_mode": 7}, "forward_mode: 7, expected 1"),
        ({"positions": [0, 1]}, r"topk_ids_of_layer: int32\[5, 8, 8\] for positions \[2\]"),
        ({"forward_pass_id": "x"}, "forward_pass_id: x, expected an integer"),
        ({"topk_ids_of_layer": torch.full((5, 8, 8), 18)}, "slots 18..18, expected -1..17"),
        ({"topk_ids_of_layer": torch.zeros((4, 8, 8), dtype=torch.int32)}, "4 layers, expected 5"),
        ({"extend_seq_lens": [0, 8]}, "extend_seq_lens: expected a list of lengths >= 1"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    records = per_token_records()
    records[0] = {**records[0], **change}
    path = save_recorder(tmp_path / "expert_distribution_recorder_1_0.pt", records)
    with pytest.raises(TraceError, match=message) as caught:
        read_any(path, WITH_MODEL)
    assert str(path) in str(caught.value)


def test_a_pass_of_one_rank_that_comes_twice_is_refused(tmp_path: Path) -> None:
    folder = write_per_pass(tmp_path)
    for file in sorted(folder.iterdir())[:1]:
        (folder / "expert_distribution_recorder_9.9_0.pt").write_bytes(file.read_bytes())
    with pytest.raises(TraceError, match="forward_pass_id 0 of rank 0 comes twice"):
        read_any(folder)


def test_a_map_with_more_experts_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"experts 0..15, expected 0..7"):
        read_any(write_per_token(tmp_path), ImportOptions(model=model(n_experts=8)))


def test_the_shared_recorder_dump_equals_the_shared_counts(shared: Path) -> None:
    dump = read_any(shared / "raw" / "sglang-logical-count-decode_in2000out100.json")
    npz = read_any(shared / "counts" / "deepseek-v3-decode_in2000out100.npz")
    assert isinstance(dump, ExpertCounts)
    assert isinstance(npz, ExpertCounts)
    assert dump.layers == npz.layers == tuple(range(3, 61))
    np.testing.assert_array_equal(dump.counts, npz.counts)


def test_counts_of_a_per_token_dump_equal_its_per_pass_dump(tmp_path: Path) -> None:
    tokens = read_any(write_per_token(tmp_path), WITH_MODEL)
    passes = read_any(write_per_pass(tmp_path), WITH_MODEL)
    assert isinstance(tokens, RoutingTrace)
    assert isinstance(passes, ExpertCounts)
    np.testing.assert_array_equal(3 * expert_counts(tokens).counts, passes.counts)


# --- requests from positions -----------------------------------------------------------------


def run_batch(
    jobs: list[tuple[int, int, int]], lengths_logged: bool
) -> tuple[list[int], list[int], list[int]]:
    """(true request, tracked request, position) of every token of a continuous batch.

    jobs  (prompt, outputs, arrival step); without a prefix cache each starts at position 0, and
          a batch keeps its order as members leave it
    """
    tracker, ids, truth, places = RequestTracker(), [], [], []
    running: list[tuple[int, int]] = []
    waiting = sorted(range(len(jobs)), key=lambda job: jobs[job][2])
    while waiting or running:
        step = min(jobs[job][2] for job in waiting) if waiting else 0
        arrived = [job for job in waiting if jobs[job][2] == step]
        waiting = [job for job in waiting if job not in arrived]
        if arrived:
            prompts = [jobs[job][0] for job in arrived]
            positions = np.concatenate([np.arange(n) for n in prompts])
            lengths = np.array(prompts) if lengths_logged else None
            ids += tracker.follow(0, positions, lengths, 1)[0].tolist()
            truth += np.repeat(arrived, prompts).tolist()
            places += positions.tolist()
            running += [(job, 0) for job in arrived]
        for _ in range(2):
            running = [(job, done) for job, done in running if done < jobs[job][1]]
            if running:
                positions = np.array([jobs[job][0] + done for job, done in running])
                ids += tracker.follow(0, positions, None, 2)[0].tolist()
                truth += [job for job, _ in running]
                places += positions.tolist()
                running = [(job, done + 1) for job, done in running]
    return truth, ids, places


@st.composite
def batches(draw: st.DrawFn, apart: int = 0) -> list[tuple[int, int, int]]:
    """Up to six requests; with `apart`, no two ever stand at the same position."""
    jobs = draw(
        st.lists(
            st.tuples(st.integers(1, 6), st.integers(0, 8), st.integers(0, 3)),
            min_size=1,
            max_size=6,
        )
    )
    return [(prompt + apart * i, n, step) for i, (prompt, n, step) in enumerate(jobs)]


@FUZZ
@given(batches(apart=20), st.booleans())
def test_requests_at_different_positions_are_told_apart_exactly(
    jobs: list[tuple[int, int, int]], lengths_logged: bool
) -> None:
    truth, ids, _ = run_batch(jobs, lengths_logged)
    assert len(set(zip(truth, ids, strict=True))) == len(set(truth)) == len(set(ids))


@FUZZ
@given(batches(), st.booleans())
def test_every_derived_request_runs_from_position_0_without_a_gap(
    jobs: list[tuple[int, int, int]], lengths_logged: bool
) -> None:
    truth, ids, places = run_batch(jobs, lengths_logged)
    assert len(set(ids)) == len(set(truth))
    for request in set(ids):
        positions = [place for place, i in zip(places, ids, strict=True) if i == request]
        assert positions == list(range(len(positions)))


def test_a_prompt_read_in_chunks_between_decode_passes_stays_one_request() -> None:
    tracker = RequestTracker()
    first, _ = tracker.follow(0, np.arange(4), np.array([4]), 1)
    chunk, _ = tracker.follow(0, np.arange(6), np.array([6]), 1)
    decoded, decodes = tracker.follow(0, np.array([4]), None, 2)
    rest, _ = tracker.follow(0, np.arange(6, 10), np.array([4]), 1)
    assert set(first) == set(decoded)
    assert set(chunk) == set(rest)
    assert set(first) != set(chunk)
    assert decodes.all()


def test_a_sequence_that_began_before_the_recording_is_a_request_of_its_own() -> None:
    tracker = RequestTracker()
    ids, _ = tracker.follow(0, np.array([50, 50, 7]), None, 2)
    again, _ = tracker.follow(0, np.array([51, 51, 8]), None, 2)
    assert len(set(ids)) == 3
    np.testing.assert_array_equal(ids, again)


def test_a_mixed_pass_tells_decoding_tokens_from_prompts() -> None:
    tracker = RequestTracker()
    tracker.follow(0, np.arange(5), np.array([5]), 1)
    ids, decodes = tracker.follow(0, np.array([0, 1, 2, 5]), np.array([3, 1]), 3)
    np.testing.assert_array_equal(ids, [1, 1, 1, 0])
    np.testing.assert_array_equal(decodes, [False, False, False, True])


def test_a_dump_that_is_no_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "expert_distribution_recorder_1.pt"
    torch.save([1, 2, 3], path)
    with pytest.raises(TraceError, match="holds a list, expected a dict"):
        read_any(path, ImportOptions(format="sglang-recorder"))


def test_a_ragged_json_count_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ragged.json"
    path.write_text(json.dumps({"logical_count": [[1, 2], [3]]}))
    with pytest.raises(TraceError, match="logical_count: not a rectangular array"):
        read_any(path)


def test_the_slot_map_of_the_fixture_has_replicas() -> None:
    assert Counter(slots_map()[0].tolist())[0] == 2
