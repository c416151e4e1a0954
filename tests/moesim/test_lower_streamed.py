"""Schedules of streamed weights against their laws and closed forms; requests against a twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moesim.engine import Timeline, run
from moesim.errors import SimulationError
from moesim.lower.streamed import (
    IterationLoad,
    MicroStep,
    MixedStep,
    cgopipe,
    iteration_time,
    micro_step,
    mixed_step,
    vslpipe,
    whole_batch,
    zigzag,
)
from moesim.lower.streamed_requests import Iterations, Scheduler, schedule
from moesim.program import Names, Program
from planners.streamed import (
    LayerShape,
    Lengths,
    StreamBox,
    StreamedPolicy,
    decode_layer,
    layer_shape,
    parallel_tokens_per_kv_token,
)
from tests.oracles.requests_plain import plain_schedule
from traces.models import load_model

MIXTRAL = layer_shape(load_model("mixtral-8x7b"))
BOX = StreamBox("box", 5e13, 5e11, 16e9, 20e9, 1e12, 150e9, 256e9, 4)
LENGTHS = Lengths(418, 128)
Lowered = Callable[[int], tuple[Program, Names]]

seconds = st.floats(1e-4, 0.05)
gigabytes = st.floats(1e6, 2e9)
cpu_steps = st.builds(
    MicroStep,
    n_micro=st.integers(1, 6),
    weight_bytes=gigabytes,
    before_s=seconds,
    after_s=seconds,
    cpu_bytes=gigabytes,
    cpu_s=seconds,
    down_bytes=st.floats(1e3, 1e7),
    up_bytes=st.floats(1e3, 1e7),
)
gpu_steps = st.builds(
    MicroStep,
    n_micro=st.integers(1, 6),
    weight_bytes=gigabytes,
    before_s=seconds,
    after_s=seconds,
    scores_s=seconds,
    kv_bytes=gigabytes,
    down_bytes=st.floats(1e3, 1e7),
)
mixed_steps = st.builds(
    MixedStep,
    weight_bytes=gigabytes,
    dense_bytes=st.floats(1e5, 1e6),
    before_s=seconds,
    after_s=seconds,
    cpu_bytes=gigabytes,
    cpu_s=seconds,
    down_bytes=st.floats(1e3, 1e7),
    up_bytes=st.floats(1e3, 1e7),
)


def makespan(lowered: tuple[Program, Names]) -> float:
    return run(lowered[0]).makespan_s


def tasks(names: Names, label: str) -> np.ndarray:
    return np.flatnonzero(names.label == names.labels.index(label))


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(cpu_steps, gpu_steps, mixed_steps), st.sampled_from(["first", "second"]),
    st.floats(1.0, 8.0),
)  # fmt: skip
def test_a_faster_link_never_makes_a_step_slower(
    step: MicroStep | MixedStep, kind: str, times: float
) -> None:
    def lower(box: StreamBox) -> tuple[Program, Names]:
        if isinstance(step, MixedStep):
            return vslpipe(step, box, 3)
        return cgopipe(step, box, 3) if kind == "first" else zigzag(step, box, 3)

    roomy = replace(BOX, dram_bytes_per_s=1e15)  # or copies would take from the CPU's attention
    faster = replace(roomy, link_bytes_per_s=times * roomy.link_bytes_per_s)
    assert makespan(lower(faster)) <= makespan(lower(roomy)) * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.one_of(cpu_steps, gpu_steps), st.integers(1, 5), st.floats(0, 5e9))
def test_a_step_takes_no_less_than_any_of_its_parts_and_no_more_than_all(
    step: MicroStep, n_layers: int, staging: float
) -> None:
    box = replace(BOX, staging_bytes_per_s=staging if staging > 1e8 else 0.0)
    n = n_layers * step.n_micro
    link = n_layers * step.weight_bytes + n * (step.kv_bytes + step.up_bytes)
    gpu = n * (step.before_s + step.scores_s + step.after_s)
    cpu = n * max(step.cpu_s, step.cpu_bytes / box.dram_bytes_per_s)
    slow = 20.0 + (2 * link + n * step.cpu_bytes * BOX.cpu_threads) / 1e8
    for schedule_ in (cgopipe, zigzag):
        took = makespan(schedule_(step, box, n_layers))
        assert max(link / box.link_bytes_per_s, gpu, cpu) <= took * (1 + 1e-9)
        assert took <= slow + gpu + cpu + n * step.cpu_s


@settings(max_examples=60, deadline=None)
@given(st.one_of(cpu_steps, gpu_steps))
def test_the_pipeline_is_never_slower_than_the_block_schedule(step: MicroStep) -> None:
    roomy = replace(BOX, dram_bytes_per_s=1e15)
    pipe = iteration_time(lambda n: cgopipe(step, roomy, n), 8).seconds
    block = iteration_time(lambda n: zigzag(step, roomy, n), 8).seconds
    assert pipe <= block * (1 + 1e-6)


def test_a_pipeline_in_balance_is_run_until_it_is_steady() -> None:
    # Eight layers were not enough here: the link catches up with the GPU for four of them.
    step = MicroStep(1, 405430709.0, 0.0390625, 0.001, 1e-4, kv_bytes=303269708.0, down_bytes=1e3)
    roomy = replace(BOX, dram_bytes_per_s=1e15)
    found = iteration_time(lambda n: cgopipe(step, roomy, n), 8)
    assert found.seconds == pytest.approx(8 * (step.before_s + step.scores_s + step.after_s))


@settings(max_examples=40, deadline=None)
@given(gpu_steps)
def test_a_block_layer_is_the_sum_over_micro_batches_of_the_slowest_part(step: MicroStep) -> None:
    box = replace(BOX, dram_bytes_per_s=1e15)
    compute = step.before_s + step.scores_s + step.after_s
    link = box.link_bytes_per_s
    each = [max(compute, step.kv_bytes / link, step.down_bytes / link)] * step.n_micro
    each[0] = max(each[0], (step.kv_bytes + step.weight_bytes) / link)
    found = iteration_time(lambda n: zigzag(step, box, n), 8)
    assert found.seconds == pytest.approx(8 * sum(each), rel=1e-6)
    assert not found.is_extrapolated


@pytest.mark.parametrize("staging", [0.0, 5e9])
def test_every_weight_crosses_the_link_once_and_the_staging_area_twice(staging: float) -> None:
    box = replace(BOX, staging_bytes_per_s=staging)
    step = micro_step(MIXTRAL, box, LENGTHS, StreamedPolicy(40, 8))
    mixed = mixed_step(MIXTRAL, box, IterationLoad(100, 1000, 2e9, 98))
    for program, names in (cgopipe(step, box, 3), zigzag(step, box, 3), vslpipe(mixed, box, 3)):
        expected = MIXTRAL.layer_bytes if program.n_streams and names is not None else 0.0
        weights = step.weight_bytes if "GB 0" not in names.labels else expected
        for layer in range(3):
            moved = program.bytes[tasks(names, f"weights of layer {layer}")].sum()
            assert moved == pytest.approx(weights)
            if staging:
                staged = program.bytes[tasks(names, f"stage weights of layer {layer}")].sum()
                assert staged == pytest.approx(2 * weights)


def _buffer_is_free(program: Program, names: Names, last: str) -> None:
    times: Timeline = run(program)
    for layer in range(2, 5):
        first = times.start_s[tasks(names, f"weights of layer {layer}")].min()
        assert first >= times.end_s[tasks(names, f"{last} {layer - 2}")].max()


def test_weights_enter_a_buffer_only_when_its_last_layer_is_done() -> None:
    step = micro_step(MIXTRAL, BOX, LENGTHS, StreamedPolicy(40, 8))
    _buffer_is_free(*cgopipe(step, BOX, 5), "after")
    mixed = mixed_step(MIXTRAL, BOX, IterationLoad(100, 1000, 2e9, 98))
    _buffer_is_free(*vslpipe(mixed, BOX, 5), "GB")


def test_the_cpu_attends_two_micro_batches_ahead() -> None:
    step = MicroStep(4, 1e6, 1e-3, 5e-2, cpu_bytes=1e6, cpu_s=4e-2, down_bytes=1e3, up_bytes=1e3)
    program, names = cgopipe(step, BOX, 1)
    times = run(program)
    threads = BOX.cpu_threads
    attended = times.start_s[tasks(names, "attention 0")].reshape(4, threads)[:, 0]
    after = times.end_s[tasks(names, "after 0")]
    assert attended[2] < after[0]  # runs while the GPU finishes the first
    assert attended[3] >= after[0]  # but no further ahead


def test_host_memory_shared_with_attention_slows_the_weights() -> None:
    box = replace(BOX, cpu_threads=20)
    load = IterationLoad(1000, 1000, 210e9, 98)
    quiet = mixed_step(MIXTRAL, box, replace(load, kv_bytes=0.0))
    busy = mixed_step(MIXTRAL, box, load)
    alone = iteration_time(lambda n: vslpipe(quiet, box, n), 32).seconds
    loaded = iteration_time(lambda n: vslpipe(busy, box, n), 32).seconds
    roomy = replace(box, dram_bytes_per_s=1e15)
    unshared = iteration_time(lambda n: vslpipe(busy, roomy, n), 32).seconds
    assert unshared == pytest.approx(alone, rel=0.01)
    assert loaded > 1.1 * alone


def test_extrapolated_layers_are_those_of_a_long_run() -> None:
    step = micro_step(MIXTRAL, BOX, LENGTHS, StreamedPolicy(504, 36))
    short = iteration_time(lambda n: cgopipe(step, BOX, n), 32)
    long = (makespan(cgopipe(step, BOX, 36)) - makespan(cgopipe(step, BOX, 4))) / 32 * 32
    assert short.is_extrapolated
    assert short.n_run == 16
    assert short.seconds == pytest.approx(long, rel=1e-3)
    closed = float(decode_layer(MIXTRAL, BOX, LENGTHS, StreamedPolicy(504, 36)).total_s) * 32
    assert closed <= short.seconds * 1.01


def test_what_a_schedule_cannot_express_is_refused() -> None:
    with pytest.raises(SimulationError, match="ffn_on_gpu=False"):
        micro_step(MIXTRAL, BOX, LENGTHS, StreamedPolicy(8, 4, ffn_on_gpu=False))
    with pytest.raises(SimulationError, match="n_micro=2"):
        whole_batch(micro_step(MIXTRAL, BOX, LENGTHS, StreamedPolicy(8, 4)), BOX, 2)
    with pytest.raises(SimulationError, match="n_micro=0"):
        MicroStep(0, 1.0, 1.0, 1.0)


requests = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=25)
schedulers = st.builds(
    Scheduler,
    n_pages=st.integers(10, 60),
    page_tokens=st.integers(1, 8),
    most_tokens=st.integers(50, 120),
    per_iteration=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    phases_apart=st.booleans(),
)


def _run(pairs: list[tuple[int, int]], scheduler: Scheduler) -> Iterations:
    needed = max(-(-(p + g) // scheduler.page_tokens) for p, g in pairs)
    assume(needed <= scheduler.n_pages)
    return schedule(*np.array(pairs).T, scheduler)


@settings(max_examples=150, deadline=None)
@given(requests, schedulers)
def test_the_compiled_scheduler_is_the_plain_one(
    pairs: list[tuple[int, int]], scheduler: Scheduler
) -> None:
    found = _run(pairs, scheduler)
    rows, ends, preempted = plain_schedule(*map(list, zip(*pairs, strict=True)), scheduler)  # type: ignore[arg-type]
    columns = (found.decoded, found.prefilled, found.pages, found.kv_tokens)
    assert [tuple(row) for row in np.column_stack(columns).tolist()] == rows
    assert found.finished_at.tolist() == ends
    assert found.n_preempted == preempted


@settings(max_examples=150, deadline=None)
@given(requests, schedulers)
def test_no_request_token_or_page_is_lost(
    pairs: list[tuple[int, int]], scheduler: Scheduler
) -> None:
    found = _run(pairs, scheduler)
    prompts, outputs = np.array(pairs).T
    assert found.decoded.sum() == outputs.sum()
    recomputed = found.prefilled.sum() - prompts.sum()
    assert recomputed >= 0
    assert (recomputed > 0) == (found.n_preempted > 0)
    assert found.pages.max() <= scheduler.n_pages
    assert (found.kv_tokens <= found.pages * scheduler.page_tokens).all()
    assert (found.decoded + found.prefilled).max() <= scheduler.most_tokens or (
        found.prefilled[found.decoded + found.prefilled > scheduler.most_tokens] == 0
    ).all()
    assert found.finished_at.max() == found.n_iterations - 1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 40), st.integers(1, 200), st.integers(1, 8),
    st.sampled_from([0.0, 1.0]), st.booleans(),
)  # fmt: skip
def test_no_schedule_beats_the_bound(
    prompt: int, output: int, n: int, page: int, pace: float, apart: bool
) -> None:
    scheduler = Scheduler(60, page, 400, pace, apart)
    found = _run([(prompt, output)] * n, scheduler)
    per_iteration = n * (prompt + output) / found.n_iterations
    bound = parallel_tokens_per_kv_token(Lengths(prompt, output)) * 60 * page
    assert per_iteration <= bound * (1 + 1e-9)


def test_requests_that_can_never_run_are_named() -> None:
    with pytest.raises(SimulationError, match="request 1 needs 4 KV pages, there are 3"):
        schedule([5, 30], [5, 30], Scheduler(3, 16, 100))
    with pytest.raises(SimulationError, match="request 0 needs 60 tokens in one iteration"):
        schedule([30], [30], Scheduler(30, 16, 50))
    with pytest.raises(SimulationError, match="prompt: expected whole numbers"):
        schedule([0], [3], Scheduler(30, 16, 50))
    with pytest.raises(SimulationError, match="2 prompts and 1 outputs"):
        schedule([1, 1], [3], Scheduler(30, 16, 50))
    with pytest.raises(SimulationError, match="page_tokens=0"):
        Scheduler(3, 0, 5)


def test_twenty_five_thousand_requests_of_a_published_workload_all_finish() -> None:
    n = 25_000
    scheduler = Scheduler(33_378, 16, 17_353)
    found = schedule(np.full(n, 98), np.full(n, 256), scheduler)
    assert found.decoded.sum() == n * 256
    assert found.n_preempted > 0


@pytest.fixture
def shape() -> LayerShape:
    return MIXTRAL


def test_attention_on_the_gpu_moves_the_cache_and_on_the_cpu_the_states(shape: LayerShape) -> None:
    on_cpu = micro_step(shape, BOX, LENGTHS, StreamedPolicy(64, 8))
    on_gpu = micro_step(shape, BOX, LENGTHS, StreamedPolicy(64, 8, attention_on_gpu=True))
    assert on_gpu.kv_bytes == on_cpu.cpu_bytes == 8 * 482 * 4096
    assert on_gpu.up_bytes == on_gpu.cpu_bytes == on_cpu.kv_bytes == 0.0
    assert on_cpu.up_bytes == 8 * 8192
    resident = micro_step(shape, BOX, LENGTHS, StreamedPolicy(64, 8, True, True, 0.25, 1.0))
    assert resident.kv_bytes == resident.down_bytes == 0.0
    assert resident.weight_bytes == 0.75 * shape.expert_bytes
