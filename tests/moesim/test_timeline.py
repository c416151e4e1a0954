"""The trace file, the shares and the critical path of a timeline."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from moesim.builder import Draw, ProgramBuilder
from moesim.engine import run
from moesim.errors import SimulationError
from moesim.program import Names, Program
from moesim.timeline import (
    Counter,
    busy_share,
    critical_path,
    pool_share,
    pool_users,
    write_chrome_trace,
)
from tests.oracles.random_programs import programs, random_program


def small() -> tuple[Program, Names]:
    """Two ranks: rank 0 computes 2 s then 1 s, rank 1 copies 6 bytes at 2 bytes/s in between."""
    builder = ProgramBuilder()
    compute = builder.stream("compute", "rank 0")
    copy = builder.stream("copy", "rank 1")
    link = builder.pool("link", 2.0)
    gemm, send = builder.label("gemm", "compute"), builder.label("send", "copy")
    first = builder.append(compute, 2.0, label=gemm)
    sent = builder.append(copy, 0.0, [first], Draw(6.0, link), send)
    builder.append(compute, 1.0, [sent], label=gemm)
    return builder.build(), builder.names()


def events_of(path: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == kind]


def test_trace_has_one_complete_event_per_task_with_its_name_and_time(tmp_path: Path) -> None:
    program, names = small()
    write_chrome_trace(program, run(program), tmp_path / "t.json", names)
    seen = [(e["name"], e["cat"], e["ts"], e["dur"]) for e in events_of(tmp_path / "t.json", "X")]
    assert seen == [
        ("gemm", "compute", 0.0, 2e6),
        ("gemm", "compute", 5e6, 1e6),
        ("send", "copy", 2e6, 3e6),
    ]


def test_trace_names_processes_and_threads(tmp_path: Path) -> None:
    program, names = small()
    write_chrome_trace(program, run(program), tmp_path / "t.json", names)
    named = {
        (e["name"], e["pid"], e.get("tid")): e["args"]["name"]
        for e in events_of(tmp_path / "t.json", "M")
        if e["name"] in ("process_name", "thread_name")
    }
    assert named == {
        ("process_name", 0, None): "rank 0",
        ("process_name", 1, None): "rank 1",
        ("thread_name", 0, 0): "compute",
        ("thread_name", 1, 1): "copy",
    }


def test_events_of_a_thread_are_in_order_and_do_not_overlap_in_whole_nanoseconds(
    tmp_path: Path,
) -> None:
    program = random_program(np.random.default_rng(3), n_tasks=3000, n_streams=5, n_pools=2)
    names = Names(
        stream=tuple("abcde"),
        process=("x", "y", "x", "y", "y"),
        pool=("p", "q"),
        label=np.zeros(program.n_tasks, dtype=np.int32),
        labels=("task",),
        categories=("",),
    )
    write_chrome_trace(program, run(program), tmp_path / "t.json", names)
    events = events_of(tmp_path / "t.json", "X")
    assert len(events) == program.n_tasks
    for thread in range(5):
        mine = [e for e in events if e["tid"] == thread]
        assert len({e["pid"] for e in mine}) == 1
        for one, two in pairwise(mine):
            assert round(one["ts"] * 1000) + round(one["dur"] * 1000) <= round(two["ts"] * 1000)


def test_counters_are_written_under_their_process(tmp_path: Path) -> None:
    program, names = small()
    full = Counter("rank 1", "cache", np.array([0.0, 1.5]), np.array([3.0, 4.0]))
    timeline = run(program)
    users = pool_users(program, timeline, 0, "tasks on link")
    write_chrome_trace(program, timeline, tmp_path / "t.json", names, [full, users])
    seen = [
        (e["pid"], e["name"], e["ts"], e["args"]["value"])
        for e in events_of(tmp_path / "t.json", "C")
    ]
    assert seen == [
        (1, "cache", 0.0, 3.0),
        (1, "cache", 1.5e6, 4.0),
        (2, "tasks on link", 2e6, 1.0),
        (2, "tasks on link", 5e6, 0.0),
    ]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, names = small()
    target = tmp_path / "t.json"
    target.write_text("old")

    def full_disk(*_: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr("moesim.timeline.json.dumps", full_disk)
    with pytest.raises(OSError, match="disk full"):
        write_chrome_trace(program, run(program), target, names)
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]
    assert target.read_text() == "old"


def test_names_of_another_program_are_refused(tmp_path: Path) -> None:
    program, names = small()
    builder = ProgramBuilder()
    builder.stream("only")
    with pytest.raises(SimulationError, match=r"names.stream: 1, expected 2"):
        write_chrome_trace(program, run(program), tmp_path / "t.json", builder.names())
    assert not list(tmp_path.iterdir())
    assert names.stream == ("compute", "copy")


def test_a_counter_that_runs_backwards_is_refused() -> None:
    with pytest.raises(SimulationError, match="counter cache"):
        Counter("", "cache", np.array([1.0, 0.5]), np.array([1.0, 2.0]))


def test_shares_of_the_small_example() -> None:
    program, _ = small()
    timeline = run(program)
    np.testing.assert_allclose(busy_share(program, timeline), [3 / 6, 3 / 6])
    np.testing.assert_allclose(pool_share(program, timeline), [6 / 12])


@settings(max_examples=40, deadline=None)
@given(programs())
def test_shares_lie_between_none_and_all(program: Program) -> None:
    timeline = run(program)
    for share in (busy_share(program, timeline), pool_share(program, timeline)):
        assert ((share >= 0) & (share <= 1 + 1e-9)).all()


def test_critical_path_of_the_small_example_is_all_of_it() -> None:
    program, _ = small()
    np.testing.assert_array_equal(critical_path(program, run(program)), [0, 1, 2])


@settings(max_examples=40, deadline=None)
@given(programs())
def test_critical_path_runs_from_zero_to_the_makespan_without_a_gap(program: Program) -> None:
    timeline = run(program)
    path = critical_path(program, timeline)
    assert bool(len(path)) == bool(program.n_tasks)
    if len(path):
        assert timeline.start_s[path[0]] == 0.0
        assert timeline.end_s[path[-1]] == timeline.makespan_s
        np.testing.assert_array_equal(timeline.start_s[path[1:]], timeline.end_s[path[:-1]])


@settings(max_examples=40, deadline=None)
@given(programs())
def test_pool_users_never_go_below_none_and_end_at_none(program: Program) -> None:
    timeline = run(program)
    for pool in range(program.n_pools):
        users = pool_users(program, timeline, pool, "users")
        assert (users.value >= 0).all()
        assert not len(users.value) or users.value[-1] == 0
