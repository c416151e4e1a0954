"""What must hold for every program, and sharing cases whose answer is known in closed form."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.builder import NONE, Draw, ProgramBuilder
from moesim.engine import Timeline, run
from moesim.program import Program
from tests.oracles.random_programs import (
    BYTES,
    MAX_RATES,
    RATES,
    SECONDS,
    pool_free_programs,
    programs,
    random_program,
    same,
)

INF = float("inf")
CLOSE = 1e-9
quick = settings(max_examples=50, deadline=None)


def predecessors(program: Program, task: int) -> list[int]:
    """The tasks that must have ended before a task starts."""
    earlier = np.flatnonzero(program.stream[:task] == program.stream[task])
    waits = program.wait_for[program.wait_start[task] : program.wait_start[task + 1]]
    return [*earlier[-1:], *waits]


def pools_of(program: Program, task: int) -> list[int]:
    """The pools a task draws from."""
    return list(program.draw_pool[program.draw_start[task] : program.draw_start[task + 1]])


def one_draw_each(
    draws: list[tuple[float, list[int], float]], pool_rate: list[float]
) -> npt.NDArray[np.float64]:
    """Ends of draws (bytes, pools, max_rate) that all start at 0 on streams of their own."""
    builder = ProgramBuilder()
    for rate in pool_rate:
        builder.pool("pool", rate)
    for n_bytes, pools, max_rate in draws:
        builder.append(builder.stream("one"), draw=Draw(n_bytes, pools, max_rate))
    return run(builder.build()).end_s


@quick
@given(programs())
def test_a_task_starts_exactly_when_its_last_predecessor_ends(program: Program) -> None:
    timeline = run(program)
    for task in range(program.n_tasks):
        ends = [timeline.end_s[other] for other in predecessors(program, task)]
        assert timeline.start_s[task] == max(ends, default=0.0)


@quick
@given(programs())
def test_a_task_takes_at_least_its_seconds_and_at_least_its_bytes_at_full_rate(
    program: Program,
) -> None:
    timeline = run(program)
    for task in range(program.n_tasks):
        rates = [program.max_rate[task], *program.pool_rate[pools_of(program, task)]]
        alone = max(program.seconds[task], program.bytes[task] / min(rates))
        assert timeline.end_s[task] >= timeline.start_s[task] + program.seconds[task]
        assert timeline.end_s[task] >= timeline.start_s[task] + alone * (1 - CLOSE) - CLOSE


@quick
@given(programs())
def test_no_pool_gives_more_in_any_span_of_time_than_its_rate_allows(program: Program) -> None:
    timeline = run(program)
    for pool in range(program.n_pools):
        users = [t for t in range(program.n_tasks) if pool in pools_of(program, t)]
        for begin in timeline.start_s[users]:
            for end in timeline.end_s[users]:
                inside = [
                    t for t in users if timeline.start_s[t] >= begin and timeline.end_s[t] <= end
                ]
                if inside:
                    needed = program.bytes[inside].sum() / program.pool_rate[pool]
                    assert needed <= (end - begin) * (1 + CLOSE) + CLOSE


@quick
@given(pool_free_programs())
def test_without_pools_a_task_takes_exactly_as_long_as_it_does_alone(program: Program) -> None:
    timeline = run(program)
    alone = np.maximum(program.seconds, program.bytes / program.max_rate)
    np.testing.assert_array_equal(timeline.end_s, timeline.start_s + alone)


@quick
@given(pool_free_programs(), st.data())
def test_without_pools_a_longer_task_makes_nothing_earlier(
    program: Program, data: st.DataObject
) -> None:
    if program.n_tasks:
        seconds = program.seconds.copy()
        seconds[data.draw(st.integers(0, program.n_tasks - 1))] += data.draw(SECONDS)
        longer = run(same(program, seconds=seconds))
        assert (longer.start_s >= run(program).start_s).all()


@quick
@given(pool_free_programs())
def test_without_pools_dropping_all_waits_makes_nothing_later(program: Program) -> None:
    no_waits = same(
        program,
        wait_start=np.zeros(program.n_tasks + 1, dtype=np.int64),
        wait_for=np.zeros(0, dtype=np.int32),
    )
    assert (run(no_waits).end_s <= run(program).end_s).all()


@quick
@given(programs(), programs())
def test_programs_that_share_nothing_do_not_feel_each_other(one: Program, two: Program) -> None:
    both = Program(
        stream=np.concatenate([one.stream, two.stream + np.int32(one.n_streams)]),
        seconds=np.concatenate([one.seconds, two.seconds]),
        bytes=np.concatenate([one.bytes, two.bytes]),
        max_rate=np.concatenate([one.max_rate, two.max_rate]),
        wait_start=np.concatenate([one.wait_start, two.wait_start[1:] + len(one.wait_for)]),
        wait_for=np.concatenate([one.wait_for, two.wait_for + np.int32(one.n_tasks)]),
        draw_start=np.concatenate([one.draw_start, two.draw_start[1:] + len(one.draw_pool)]),
        draw_pool=np.concatenate([one.draw_pool, two.draw_pool + np.int32(one.n_pools)]),
        pool_rate=np.concatenate([one.pool_rate, two.pool_rate]),
        n_streams=one.n_streams + two.n_streams,
    )
    together, first, second = run(both), run(one), run(two)
    np.testing.assert_array_equal(together.end_s, np.concatenate([first.end_s, second.end_s]))
    np.testing.assert_array_equal(together.start_s, np.concatenate([first.start_s, second.start_s]))


@quick
@given(programs(), st.sampled_from([0.125, 2.0, 1024.0]))
def test_scaling_all_seconds_and_bytes_by_a_power_of_two_scales_the_timeline_exactly(
    program: Program, factor: float
) -> None:
    timeline = run(program)
    scaled = run(same(program, seconds=program.seconds * factor, bytes=program.bytes * factor))
    np.testing.assert_array_equal(scaled.start_s, timeline.start_s * factor)
    np.testing.assert_array_equal(scaled.end_s, timeline.end_s * factor)


@quick
@given(programs())
def test_pools_that_are_never_full_change_nothing(program: Program) -> None:
    endless = same(program, pool_rate=np.full(program.n_pools, INF))
    no_pools = same(
        program,
        draw_start=np.zeros(program.n_tasks + 1, dtype=np.int64),
        draw_pool=np.zeros(0, dtype=np.int32),
    )
    np.testing.assert_array_equal(run(endless).end_s, run(no_pools).end_s)


def as_bytes(timeline: Timeline) -> bytes:
    return timeline.start_s.tobytes() + timeline.end_s.tobytes()


def test_equal_inputs_give_equal_bytes() -> None:
    program = random_program(np.random.default_rng(1), n_tasks=20_000, n_streams=16, n_pools=4)
    copy = random_program(np.random.default_rng(1), n_tasks=20_000, n_streams=16, n_pools=4)
    assert as_bytes(run(program)) == as_bytes(run(program)) == as_bytes(run(copy))


@quick
@given(
    st.lists(st.tuples(SECONDS, BYTES), min_size=1, max_size=12),
    st.floats(0.05, 20.0),
)
def test_one_pool_is_never_idle_while_somebody_wants_it(
    arrivals: list[tuple[float, float]], rate: float
) -> None:
    builder = ProgramBuilder()
    pool = builder.pool("pool", rate)
    for delay, n_bytes in arrivals:
        stream = builder.stream("one")
        builder.append(stream, delay)
        builder.append(stream, draw=Draw(n_bytes, pool))
    clear = 0.0  # when the pool has served all that came so far, in whatever order
    for delay, n_bytes in sorted(arrivals):
        clear = max(clear, delay) + n_bytes / rate
    assert run(builder.build()).makespan_s == pytest.approx(clear, rel=CLOSE)


FLOWS = st.lists(
    st.tuples(st.lists(st.integers(0, 3), unique=True, min_size=1), MAX_RATES),
    min_size=1,
    max_size=7,
)


@quick
@given(FLOWS, st.lists(RATES, min_size=4, max_size=4))
def test_every_draw_is_held_back_by_its_own_maximum_or_by_a_full_pool_where_none_is_faster(
    flows: list[tuple[list[int], float]], pool_rate: list[float]
) -> None:
    """The definition of max-min fairness, on rates measured from outside.

    A draw of a billionth of the others' bytes ends while all others are still drawing, so its
    duration tells its rate. Rates here are at least 0.05 / 7, so 1e-9 bytes end soon.
    """
    rate = np.empty(len(flows))
    for i in range(len(flows)):
        draws = [(1e-9 if i == j else 1.0, *flow) for j, flow in enumerate(flows)]
        end = one_draw_each(draws, pool_rate)[i]
        rate[i] = 1e-9 / end if end else INF
    for (pools, max_rate), mine in zip(flows, rate, strict=True):
        held_back = mine >= max_rate * (1 - CLOSE)
        for pool in pools:
            users = np.array([pool in other for other, _ in flows])
            used = rate[users].sum()
            assert used <= pool_rate[pool] * (1 + CLOSE)
            full = used >= pool_rate[pool] * (1 - CLOSE)
            held_back |= full and mine >= rate[users].max() * (1 - CLOSE)
        assert held_back


@pytest.mark.parametrize("n", [1, 2, 7, 16, 100])
def test_equal_draws_end_together_and_take_n_times_as_long(n: int) -> None:
    end = one_draw_each([(5.0, [0], INF)] * n, [2.0])
    assert len(set(end)) == 1
    assert end[0] == pytest.approx(n * 5.0 / 2.0, rel=1e-12)


def test_unequal_draws_speed_up_as_others_end() -> None:
    # all at 1/3 until the first has its 1 (t=3), then 1/2 until 2 (t=5), then alone until 3 (t=6)
    end = one_draw_each([(1.0, [0], INF), (2.0, [0], INF), (3.0, [0], INF)], [1.0])
    np.testing.assert_allclose(end, [3.0, 5.0, 6.0], rtol=1e-12)


def test_what_a_slow_draw_leaves_goes_to_the_others() -> None:
    # 10 bytes/s: one draw takes 1, the other two 4.5 each
    end = one_draw_each([(1.0, [0], 1.0), (4.5, [0], INF), (4.5, [0], INF)], [10.0])
    np.testing.assert_allclose(end, [1.0, 1.0, 1.0], rtol=1e-12)


@pytest.mark.parametrize("wide", [1.0001, 2.0, 50.0])
def test_a_draw_over_two_links_takes_the_fair_share_of_the_tighter_one(wide: float) -> None:
    # links of 1 and `wide` bytes/s: the long draw and the first short one get 0.5 each
    draws = [(0.5, [0, 1], INF), (0.5, [0], INF), (wide - 0.5, [1], INF)]
    np.testing.assert_allclose(one_draw_each(draws, [1.0, wide]), [1.0, 1.0, 1.0], rtol=1e-12)


def test_bytes_are_drawn_while_the_seconds_pass() -> None:
    end_of = {s: _one_kernel(seconds=s, n_bytes=6.0, rate=2.0) for s in (0.0, 2.0, 3.0, 5.0)}
    assert end_of == {0.0: 3.0, 2.0: 3.0, 3.0: 3.0, 5.0: 5.0}


def _one_kernel(seconds: float, n_bytes: float, rate: float) -> float:
    builder = ProgramBuilder()
    draw = Draw(n_bytes, builder.pool("memory", rate))
    builder.append(builder.stream("compute"), seconds, draw=draw)
    return run(builder.build()).makespan_s


def test_a_pool_is_free_again_when_the_bytes_are_drawn_though_the_task_goes_on() -> None:
    builder = ProgramBuilder()
    pool = builder.pool("memory", 1.0)
    builder.append(builder.stream("a"), 10.0, draw=Draw(1.0, pool))
    builder.append(builder.stream("b"), draw=Draw(2.0, pool))
    np.testing.assert_array_equal(run(builder.build()).end_s, [10.0, 3.0])


def test_draws_within_rounding_of_each_other_end_without_a_hang() -> None:
    n_bytes = np.nextafter(1.0, 2.0) ** np.arange(64)
    end = one_draw_each([(b, [0, 1], INF) for b in n_bytes], [1.0, 1.0])
    np.testing.assert_allclose(end, 64.0, rtol=1e-12)


def test_a_draw_too_short_for_the_clock_to_notice_ends_at_once() -> None:
    builder = ProgramBuilder()
    stream, pool = builder.stream("a"), builder.pool("memory", 1.0)
    builder.append(stream, 1e9)
    builder.extend(np.full(50, stream), draw=Draw(1e-12, pool))
    assert run(builder.build()).makespan_s == 1e9


def test_the_main_loop_and_the_pass_without_a_clock_agree_to_the_bit() -> None:
    plain = random_program(np.random.default_rng(5), n_tasks=5_000, n_streams=9, n_pools=0)
    one_draw = ProgramBuilder()
    one_draw.extend(plain.stream, plain.seconds, _padded_waits(plain), Draw(plain.bytes, (), 0.3))
    for stream in range(plain.n_streams + 1):
        one_draw.stream(f"stream {stream}")
    one_draw.append(plain.n_streams, draw=Draw(1.0, one_draw.pool("pool", 1.0)))
    no_clock = run(same(plain, max_rate=np.full(plain.n_tasks, 0.3)))
    np.testing.assert_array_equal(run(one_draw.build()).end_s[:-1], no_clock.end_s)


def _padded_waits(program: Program) -> npt.NDArray[np.int64]:
    waits = np.full((program.n_tasks, 2), NONE)
    for task in range(program.n_tasks):
        row = program.wait_for[program.wait_start[task] : program.wait_start[task + 1]]
        waits[task, : len(row)] = row
    return waits
