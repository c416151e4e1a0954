"""A trace refuses what cannot be, and its file gives back what was put in or says what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces import parquet
from traces.errors import TraceError
from traces.routing import (
    MISSING,
    ExpertCounts,
    RoutingTrace,
    content_hash,
    expert_counts,
    require_tokens,
)


def _trace(n_tokens: int = 50, seed: int = 0, optional: bool = True) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    topk = np.argsort(rng.random((n_tokens, 3, 8)), axis=2)[:, :, :2].astype(np.int16)
    tokens = np.arange(n_tokens)
    return RoutingTrace(
        topk=topk,
        n_experts=8,
        layers=(1, 2, 4),
        request=(tokens // 10).astype(np.int32),
        position=(tokens % 10).astype(np.int32),
        phase=(tokens % 10 > 4).astype(np.int8),
        forward=tokens.astype(np.int64) // 5 if optional else None,
        weights=rng.random(topk.shape).astype(np.float16) if optional else None,
        scores=rng.random((n_tokens, 3, 8)).astype(np.float16) if optional else None,
        model="example",
        capture="made by a test",
    )


@given(st.integers(0, 60), st.integers(0, 99), st.booleans())
@settings(max_examples=20, deadline=None)
def test_what_is_written_is_read_back_to_the_byte(
    tmp_path_factory: pytest.TempPathFactory, n_tokens: int, seed: int, optional: bool
) -> None:
    trace = _trace(n_tokens, seed, optional)
    path = tmp_path_factory.mktemp("trace") / "trace.parquet"
    parquet.write(trace, path)
    again = parquet.read(path)
    assert isinstance(again, RoutingTrace)
    assert content_hash(again) == content_hash(trace)
    assert (again.model, again.capture, again.layers) == ("example", "made by a test", (1, 2, 4))
    assert (again.forward is None) == (not optional)


@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
def test_chunks_joined_are_the_whole_whatever_their_size(tmp_path: Path, rows: int) -> None:
    trace = _trace()
    parquet.write(trace, tmp_path / "trace.parquet", rows_per_group=16)
    chunks = list(parquet.iter_chunks(tmp_path / "trace.parquet", rows))
    assert max(chunk.n_tokens for chunk in chunks) <= rows
    joined = np.concatenate([chunk.topk for chunk in chunks])
    assert (joined == trace.topk).all()


def test_counts_are_a_first_class_weaker_kind(tmp_path: Path) -> None:
    counts = expert_counts(_trace())
    parquet.write(counts, tmp_path / "counts.parquet")
    again = parquet.read(tmp_path / "counts.parquet")
    assert isinstance(again, ExpertCounts)
    assert (again.counts == counts.counts).all()
    with pytest.raises(TraceError, match="a cache replay needs token order"):
        require_tokens(again, "a cache replay")
    with pytest.raises(TraceError, match="expected a routing trace"):
        list(parquet.iter_chunks(tmp_path / "counts.parquet"))


def test_every_choice_is_counted_once_and_missing_ones_are_not() -> None:
    trace = _trace()
    assert expert_counts(trace).counts.sum() == 50 * 3 * 2
    topk = trace.topk.copy()
    topk[0, 0, 0] = MISSING
    assert expert_counts(replace(trace, topk=topk)).counts.sum() == 50 * 3 * 2 - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_experts": 7}, r"expert ids 0\.\.7, expected 0\.\.6"),
        ({"layers": (2, 1, 4)}, "increasing"),
        ({"layers": (1, 2)}, "expected 3"),
        ({"phase": np.full(50, 2, np.int8)}, "expected 0 or 1"),
        ({"request": np.zeros(49, np.int32)}, r"request: shape \(49,\), expected \(50,\)"),
        ({"topk": np.zeros((50, 3, 2))}, "float64"),
        ({"topk": np.full((50, 3, 2), -2, np.int16)}, "-2"),
    ],
)
def test_a_trace_that_cannot_be_is_refused_by_field_and_value(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        replace(_trace(), **change)


def test_negative_and_infinite_counts_are_refused() -> None:
    for value in (-1.0, np.inf, np.nan):
        with pytest.raises(TraceError, match="expected >= 0"):
            ExpertCounts(np.full((1, 4), value), (0,))


def test_a_file_that_was_cut_altered_or_is_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.parquet"
    parquet.write(_trace(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceError, match="truncated or damaged"):
        parquet.read(path)
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"a": [1]}), plain)
    with pytest.raises(TraceError, match="no trace metadata"):
        parquet.read(plain)
    with pytest.raises(TraceError, match="no such file"):
        parquet.read(tmp_path / "missing.parquet")


def test_a_value_changed_behind_the_hash_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "trace.parquet"
    parquet.write(_trace(), path)
    table = pq.read_table(path)
    request = table["request"].to_numpy().copy()
    request[0] += 1
    changed = table.set_column(0, "request", pa.array(request))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(TraceError, match="was altered"):
        parquet.read(path)


def test_writing_leaves_nothing_half_done(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        parquet.write(_trace(), tmp_path / "missing" / "trace.parquet")
    assert not list(tmp_path.iterdir())
