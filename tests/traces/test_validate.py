"""Every way a capture goes wrong is named; sound captures, made and real, are left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.formats.detect import read_any
from traces.routing import DECODE, PREFILL, RoutingTrace
from traces.validate import Finding, check_ids, first_bad_id, validate


def sound(tokens: int = 512, layers: int = 4, top_k: int = 4, n_experts: int = 16) -> RoutingTrace:
    """A trace with nothing wrong: independent draws with uneven popularity, two requests."""
    rng = np.random.default_rng(7)
    heat = rng.gumbel(size=(tokens, layers, n_experts)) + rng.normal(0, 0.5, (layers, n_experts))
    request = np.arange(tokens) // (tokens // 2)
    position = np.arange(tokens) % (tokens // 2)
    return RoutingTrace(
        topk=np.argsort(-heat, axis=2)[:, :, :top_k].astype(np.int16),
        n_experts=n_experts,
        layers=tuple(range(3, 3 + layers)),
        request=request.astype(np.int32),
        position=position.astype(np.int32),
        phase=np.where(position < 100, PREFILL, DECODE).astype(np.int8),
    )


def with_ids(change: Callable[[np.ndarray], None]) -> RoutingTrace:
    """The sound trace after a change to its ids."""
    trace = sound()
    ids = trace.topk.copy()
    change(ids)
    return replace(trace, topk=ids)


def named(findings: list[Finding], what: str) -> Finding:
    """The one finding of that kind; fails with all findings when there is none."""
    fitting = [finding for finding in findings if what in finding.what]
    assert fitting, [str(finding) for finding in findings]
    return fitting[0]


def errors(trace: RoutingTrace) -> list[str]:
    return [str(finding) for finding in validate(trace) if finding.severity == "error"]


def test_a_sound_capture_has_no_findings() -> None:
    assert validate(sound()) == []


def test_a_copied_layer_is_named_with_its_source() -> None:
    def copy(ids: np.ndarray) -> None:
        ids[:, 2] = ids[:, 0, ::-1]  # the same experts in another order
        ids[0, 2] = [0, 1, 2, 3]

    finding = named(validate(with_ids(copy)), "copy of layer 3")
    assert (finding.severity, finding.where) == ("error", "layer 5")
    assert finding.value == "the same experts in 99.8% of the tokens"


def test_padding_logged_as_tokens_is_named_with_its_run() -> None:
    def pad(ids: np.ndarray) -> None:
        ids[200:260] = ids[200]

    finding = named(validate(with_ids(pad)), "runs of identical tokens")
    assert (finding.severity, finding.where) == ("error", "longest from token 200")
    assert finding.value.startswith("60 tokens, 11.5% of all")


def test_many_short_runs_are_an_error_by_their_share() -> None:
    def repeat(ids: np.ndarray) -> None:
        ids[1::2] = ids[::2]

    assert named(validate(with_ids(repeat)), "identical tokens").severity == "error"


def test_a_few_repeated_tokens_are_only_a_warning() -> None:
    def repeat(ids: np.ndarray) -> None:
        ids[200:210] = ids[200]

    trace = with_ids(repeat)
    assert named(validate(trace), "identical tokens").severity == "warning"
    assert errors(trace) == []


def test_one_layer_of_a_top_1_router_may_repeat_itself() -> None:
    trace = sound(layers=1, top_k=1, n_experts=4)
    assert errors(trace) == []


@pytest.mark.parametrize(("fill", "name"), [([0, 1, 2, 3], "0..3"), ([0, 0, 0, 0], "only 0")])
def test_a_buffer_that_was_never_filled_is_named(fill: list[int], name: str) -> None:
    def blank(ids: np.ndarray) -> None:
        ids[:, 1] = fill

    finding = named(validate(with_ids(blank)), "placeholder")
    assert (finding.severity, finding.where) == ("error", "layer 4")
    assert finding.value == f"{name} in 100.0% of the tokens"


def test_an_expert_twice_in_a_row_is_named_with_layer_and_token() -> None:
    def double(ids: np.ndarray) -> None:
        ids[[77, 90], 3] = [5, 1, 9, 5]

    finding = named(validate(with_ids(double)), "2 tokens choose an expert twice")
    assert (finding.severity, finding.where) == ("error", "layer 6, first at token 77")
    assert finding.value == "[5, 1, 9, 5]"


def sorted_layers(trace: RoutingTrace) -> list[str]:
    return [f.where for f in validate(trace) if f.what == "tokens sorted by expert"]


def test_one_pass_in_dispatch_order_is_named() -> None:
    def dispatch(ids: np.ndarray) -> None:
        ids[:, 1] = ids[np.argsort(ids[:, 1, 0], kind="stable"), 1]

    assert sorted_layers(with_ids(dispatch)) == ["layer 4"]


def test_many_passes_each_in_dispatch_order_are_named() -> None:
    trace = sound(tokens=4096, layers=2, top_k=2, n_experts=64)
    ids = trace.topk.copy()
    for start in range(0, 4096, 512):
        part = ids[start : start + 512]
        part[:] = part[np.argsort(part[:, 1, 0], kind="stable")]
    assert sorted_layers(replace(trace, topk=ids)) == ["layer 4"]


def test_a_collapsed_router_is_named_with_its_effective_experts() -> None:
    def collapse(ids: np.ndarray) -> None:
        ids[:, 0] = [9, 2, 4, 11]
        ids[::50, 0, 0] = 1

    finding = named(validate(with_ids(collapse)), "collapsed router")
    assert (finding.severity, finding.where) == ("error", "layer 3")
    assert finding.value.startswith("4.1")
    assert finding.expected == "at least 6.0"


def test_one_hot_expert_among_many_is_a_warning() -> None:
    def heat(ids: np.ndarray) -> None:
        ids[:, 2, 0] = np.where((ids[:, 2, 1:] == 6).any(axis=1), ids[:, 2, 0], 6)

    trace = with_ids(heat)
    finding = named(validate(trace), "expert 6 takes most tokens")
    assert (finding.severity, finding.where) == ("warning", "layer 5")
    assert errors(trace) == []


def test_missing_cells_are_counted_by_layer() -> None:
    def drop(ids: np.ndarray) -> None:
        ids[:51, 1] = -1
        ids[:, 3] = -1

    findings = [f for f in validate(with_ids(drop)) if f.what == "missing expert ids"]
    assert [(f.severity, f.where, f.value) for f in findings] == [
        ("error", "layer 6", "100.0% of the cells"),
        ("warning", "layer 4", "10.0% of the cells"),
    ]


def test_positions_that_jump_or_go_back_are_warned_of() -> None:
    trace = sound()
    position = trace.position.copy()
    position[300:] += 5
    position[20] = 3
    findings = validate(replace(trace, position=position))
    assert named(findings, "positions jump").where == "request 0, first at token 21"
    assert named(findings, "positions repeat or go back").where == "request 0, first at token 20"
    assert all(finding.severity == "warning" for finding in findings)


def test_positions_are_followed_through_interleaved_requests() -> None:
    trace = sound()
    rng = np.random.default_rng(1)
    order = np.lexsort((rng.random(trace.n_tokens), trace.position))
    shuffled = trace.rows(order)
    assert [f for f in validate(shuffled) if "positions" in f.what] == []


def test_prefill_after_decode_is_warned_of() -> None:
    trace = sound()
    phase = trace.phase.copy()
    phase[200:220] = PREFILL
    finding = named(validate(replace(trace, phase=phase)), "decode before prefill")
    assert (finding.severity, finding.where) == ("warning", "request 0, first at token 200")


def test_requests_that_were_not_logged_show_in_the_forward_passes() -> None:
    trace = sound()
    forward = np.arange(trace.n_tokens) // 8
    finding = named(validate(replace(trace, forward=forward)), "requests not told apart")
    assert finding.value == "up to 8 of one request in one forward pass"


def test_ids_out_of_range_are_found_before_a_trace_exists() -> None:
    ids = np.zeros((6, 2, 3), dtype=np.int64)
    assert first_bad_id(ids, 16) is None
    ids[4, 1, 2], ids[5, 0, 0] = 16, -2
    assert first_bad_id(ids, 16) == (4, 1, 16)
    finding = check_ids(ids, 16, (8, 9))[0]
    assert str(finding) == (
        "error: 2 expert ids out of range (token 4, layer 9): id 16,"
        " expected 0..15, or -1 where missing"
    )


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.tuples(st.integers(1, 70), st.integers(1, 3), st.integers(1, 3)),
    st.integers(0, 2**32),
    st.integers(0, 4),
)
def test_any_trace_can_be_validated_and_every_finding_is_one_line(
    shape: tuple[int, int, int], seed: int, extra: int
) -> None:
    rng = np.random.default_rng(seed)
    n_experts = shape[2] + extra
    trace = RoutingTrace(
        topk=rng.integers(-1, n_experts, shape).astype(np.int16),
        n_experts=n_experts,
        layers=tuple(range(shape[1])),
        request=rng.integers(0, 3, shape[0]).astype(np.int32),
        position=rng.integers(0, 9, shape[0]).astype(np.int32),
        phase=rng.integers(0, 2, shape[0]).astype(np.int8),
        forward=rng.integers(0, 5, shape[0]),
    )
    findings = validate(trace)
    for finding in findings:
        assert len(str(finding).splitlines()) == 1
    severities = [finding.severity for finding in findings]
    assert severities == sorted(severities)  # "error" before "warning"


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32), st.sampled_from([(8, 2), (16, 4), (64, 6), (32, 1)]))
def test_independent_draws_never_look_like_an_error(seed: int, shape: tuple[int, int]) -> None:
    n_experts, top_k = shape
    rng = np.random.default_rng(seed)
    heat = rng.gumbel(size=(300, 6, n_experts)) + rng.normal(0, 0.5, (6, n_experts))
    trace = replace(
        sound(tokens=300, layers=6, top_k=top_k, n_experts=n_experts),
        topk=np.argsort(-heat, axis=2)[:, :, :top_k].astype(np.int16),
    )
    assert errors(trace) == []


# --- real captures ---------------------------------------------------------------------------


def test_the_seven_shared_captures_have_no_errors(shared: Path) -> None:
    names = [entry["file"] for entry in json.loads((shared / "traces/index.json").read_text())]
    assert len(names) == 7
    for name in names:
        trace = read_any(shared / "traces" / name)
        assert isinstance(trace, RoutingTrace)
        assert errors(trace) == [], name


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("qwen1.5-moe-a2.7b-5-layers.npz", "requests not told apart"),
        ("mixtral-8x7b-mtbench.npz", "decode before prefill in one request"),
        ("deepseek-v2-lite-law.npz", "expert 0 takes most tokens"),
    ],
)
def test_what_is_unusual_in_the_shared_captures_is_said(file: str, what: str, shared: Path) -> None:
    trace = read_any(shared / "traces" / file)
    assert isinstance(trace, RoutingTrace)
    assert [finding.what for finding in validate(trace)] == [what]
