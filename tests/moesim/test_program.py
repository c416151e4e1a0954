"""Programs refuse what the engine could not run; the builder makes what was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.builder import NONE, Draw, ProgramBuilder
from moesim.engine import run
from moesim.errors import SimulationError
from moesim.program import Program
from tests.oracles.random_programs import same


def valid() -> Program:
    """Three tasks on two streams, two pools."""
    builder = ProgramBuilder()
    a, b = builder.stream("a"), builder.stream("b")
    fast, slow = builder.pool("fast", 2.0), builder.pool("slow", 1.0)
    first = builder.append(a, 1.0)
    builder.append(b, 0.5, [first], Draw(3.0, [fast, slow], 4.0))
    builder.append(a, 0.25, [first], Draw(1.0, slow))
    return builder.build()


@pytest.mark.parametrize(
    ("field", "at", "value", "message"),
    [
        ("stream", 1, 2, r"task 1: stream=2, expected a stream in 0\.\.1"),
        ("stream", 0, -1, r"task 0: stream=-1, expected a stream in 0\.\.1"),
        ("seconds", 2, -1.0, r"task 2: seconds=-1\.0, expected a finite number >= 0"),
        ("seconds", 0, np.nan, r"task 0: seconds=nan"),
        ("seconds", 0, np.inf, r"task 0: seconds=inf"),
        ("bytes", 1, -3.0, r"task 1: bytes=-3\.0, expected a finite number >= 0"),
        ("bytes", 1, np.inf, r"task 1: bytes=inf"),
        ("max_rate", 1, 0.0, r"task 1: max_rate=0\.0, expected a rate > 0"),
        ("max_rate", 1, np.nan, r"task 1: max_rate=nan"),
        ("pool_rate", 1, 0.0, r"pool 1: pool_rate=0\.0, expected a rate > 0"),
        ("wait_for", 0, 1, r"task 1: waits for task 1, expected an earlier task"),
        ("wait_for", 1, 2, r"task 2: waits for task 2, expected an earlier task"),
        ("wait_for", 1, -1, r"task 2: waits for task -1, expected an earlier task"),
        ("draw_pool", 1, 2, r"task 1: draws from pool 2, expected a pool in 0\.\.1"),
        ("draw_pool", 2, -1, r"task 2: draws from pool -1, expected a pool in 0\.\.1"),
        ("draw_pool", 0, 1, r"task 1: draws from pool 1 and then from pool 1"),
        ("wait_start", 0, 1, r"wait_start: runs from 1 to 2, expected 0 to 2"),
        ("wait_start", 3, 1, r"wait_start: runs from 0 to 1, expected 0 to 2"),
        ("draw_start", 1, 9, r"task 1: draw_start falls from 9 to 2"),
    ],
)
def test_one_wrong_value_is_refused_by_name(
    field: str, at: int, value: float, message: str
) -> None:
    array = getattr(valid(), field).copy()
    array[at] = value
    with pytest.raises(SimulationError, match=message):
        same(valid(), **{field: array})


@pytest.mark.parametrize(
    ("field", "array", "message"),
    [
        ("seconds", np.zeros(2), r"seconds: float64\[2\], expected float64\[3\]"),
        ("seconds", np.zeros(3, dtype=np.float32), r"seconds: float32\[3\], expected float64\[3\]"),
        ("stream", np.zeros((3, 1), dtype=np.int32), r"stream: int32\[3, 1\], expected int32\[3\]"),
        ("wait_start", np.zeros(3, dtype=np.int64), r"wait_start: int64\[3\], expected int64\[4\]"),
        ("wait_for", np.zeros(2, dtype=np.int64), r"wait_for: int64\[2\], expected int32\[2\]"),
    ],
)
def test_a_wrong_shape_or_dtype_is_refused_by_name(
    field: str, array: np.ndarray, message: str
) -> None:
    with pytest.raises(SimulationError, match=message):
        same(valid(), **{field: array})


def test_a_negative_number_of_streams_is_refused() -> None:
    with pytest.raises(SimulationError, match=r"n_streams=-1, expected >= 0"):
        same(ProgramBuilder().build(), n_streams=-1)


def test_an_end_beyond_the_largest_number_is_refused_instead_of_inf() -> None:
    builder = ProgramBuilder()
    stream, pool = builder.stream("a"), builder.pool("pool", 1e-300)
    builder.append(stream, 1.0)
    builder.append(stream, draw=Draw(1e300, pool))
    with pytest.raises(SimulationError, match="task 1: ends beyond"):
        run(builder.build())
    builder = ProgramBuilder()
    builder.extend(np.full(3, builder.stream("a")), 1.7e308)
    with pytest.raises(SimulationError, match="task 1: ends beyond"):
        run(builder.build())


def test_an_empty_program_ends_at_zero() -> None:
    timeline = run(ProgramBuilder().build())
    assert timeline.makespan_s == 0.0
    assert len(timeline.end_s) == 0


def test_arrays_that_are_read_only_or_strided_run_as_well() -> None:
    program = valid()
    strided = np.repeat(program.seconds, 2)[::2]
    read_only = program.bytes.copy()
    read_only.flags.writeable = False
    again = same(program, seconds=strided, bytes=read_only)
    np.testing.assert_array_equal(run(again).end_s, run(program).end_s)


def arrays(program: Program) -> dict[str, list[float]]:
    return {f: list(getattr(program, f)) for f in Program.__slots__ if f != "n_streams"}


def test_tasks_added_at_once_equal_tasks_added_one_by_one() -> None:
    one, many = ProgramBuilder(), ProgramBuilder()
    for builder in (one, many):
        for name in "ab":
            builder.stream(name)
            builder.pool(name, 1.0)
        builder.append(0, 7.0)
    one.append(0, 1.0, [0], Draw(5.0, [1, 0], 2.0), label=1)
    one.append(1, 1.0, [0, 1], Draw(6.0, [1]), label=2)
    one.append(1, 1.0, [], Draw(0.0), label=3)
    ids = many.extend(
        [0, 1, 1],
        1.0,
        [[0, NONE], [0, 1], [NONE, NONE]],
        Draw([5.0, 6.0, 0.0], [[1, 0], [NONE, 1], [NONE, NONE]], [2.0, np.inf, np.inf]),
        [1, 2, 3],
    )
    assert list(ids) == [1, 2, 3]
    assert one.n_tasks == many.n_tasks == 4
    assert arrays(one.build()) == arrays(many.build())
    np.testing.assert_array_equal(one.names().label, many.names().label)


def test_one_value_serves_all_tasks_of_a_block_and_bytes_alone_say_how_many() -> None:
    builder = ProgramBuilder()
    stream, pool = builder.stream("copy"), builder.pool("link", 1.0)
    gate = builder.append(builder.stream("gate"), 2.0)
    ids = builder.extend(stream, 0.0, gate, Draw([1.0, 2.0, 3.0], pool))
    assert list(ids) == [1, 2, 3]
    np.testing.assert_array_equal(run(builder.build()).end_s, [2.0, 3.0, 5.0, 8.0])
    assert list(builder.extend(np.zeros(0, dtype=np.int64), 1.0)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stream": [0, 0], "seconds": [1.0] * 3}, r"seconds: shape \(3,\), expected .* \(2,\)"),
        ({"stream": [0.5]}, r"stream: float64 0.5..0.5, expected whole numbers"),
        ({"stream": [2**32]}, r"stream: int64 4294967296..4294967296, expected whole numbers"),
        ({"stream": [0, 0], "waits": [[0]]}, r"waits: shape \(1, 1\), expected \(2,\) or \(2, m"),
        ({"stream": [0, 0], "draw": Draw(1.0, [0] * 3)}, r"pools: shape \(3,\), expected .* \(2,"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_by_name(
    arguments: dict[str, object], message: str
) -> None:
    builder = ProgramBuilder()
    builder.stream("a")
    with pytest.raises(SimulationError, match=message):
        builder.extend(**arguments)


def test_a_label_used_twice_has_one_number_and_zero_is_unnamed() -> None:
    builder = ProgramBuilder()
    gate = builder.label("gate", "compute")
    assert builder.label("gate", "compute") == gate != builder.label("gate", "copy")
    assert builder.names().labels == ("task", "gate", "gate")
    assert builder.names().categories == ("", "compute", "copy")
