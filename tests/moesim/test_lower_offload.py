"""Programs of an offloaded model against timelines worked out by hand, and their laws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.box import Box, load_box
from hwmodels.device import Link
from moesim import engine
from moesim.lower import offload_kernel
from moesim.lower.offload import Extras, OffloadProgram, offload_program
from moesim.offload.decisions import (
    DEMAND,
    HIGH,
    LOADED,
    NO_LOAD,
    ON_CPU,
    ON_PIM,
    PREFETCH,
    RESIDENT,
    Decisions,
    Loads,
)
from moesim.offload.prices import Prices
from traces.layer_steps import ForwardPasses, LayerSteps

# One time unit is a second. An expert is 8 bytes: a copy lasts 8 s at 1 byte/s, the CPU reads it in
# 4 s. A layer's dense part lasts 2 s, an expert on the device 1 s, its arithmetic on the CPU 3 s.
EXPERT_BYTES = 8
N_EXPERTS = 16
seeds = st.integers(0, 10**6)


@cache
def catalogue_box() -> Box:
    return load_box("rtx-4090-xeon-6454s")


def box(copy: float = 1.0, dram: float = 100.0, drive: float | None = None) -> Box:
    return replace(
        catalogue_box(),
        copy_bytes_per_s=copy,
        copy_s=0.0,
        dram_bytes_per_s=dram,
        drive=None if drive is None else Link("drive", drive, 0.5),
        efficiency=replace(catalogue_box().efficiency, drive_share=1.0),
    )


def prices(n_passes: int, on: Box | None = None, **changes: object) -> Prices:
    tokens = np.arange(9, dtype=np.float64)
    base = Prices(
        box=on or box(),
        first_s=np.zeros(n_passes),
        before_s=np.full(n_passes, 2.0),
        after_s=np.zeros(n_passes),
        tail_s=np.zeros(n_passes),
        gpu_s=tokens,
        gpu_fixed_s=0.0,
        gpu_start_s=0.0,
        cpu_s=3.0 * tokens,
        cpu_fixed_s=0.0,
        cpu_bytes_per_s=2.0,
        expert_bytes=EXPERT_BYTES,
        unit_bytes=float(EXPERT_BYTES),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


Cell = tuple[int, int, int]  # expert, place, load
Load = tuple[int, int, int]  # object, layer-step, kind


def run_of(
    steps: Sequence[Sequence[Cell]], loads: Sequence[Load], n_layers: int
) -> tuple[LayerSteps, Decisions]:
    """Layer-steps of one token each, and what was decided for them."""
    cells = [cell for step in steps for cell in step]
    n_passes = len(steps) // n_layers
    passes = ForwardPasses(
        rows=np.arange(n_passes),
        start=np.arange(n_passes + 1),
        phase=np.ones(n_passes, np.int8),
        context=np.zeros(n_passes),
        requests=np.ones(n_passes, np.int32),
    )
    work = LayerSteps(
        start=np.cumsum([0, *map(len, steps)]).astype(np.int64),
        expert=np.array([cell[0] for cell in cells], np.int32),
        tokens=np.ones(len(cells), np.int32),
        gate=None,
        n_layers=n_layers,
        n_experts=N_EXPERTS,
        top_k=max(map(len, steps), default=1),
        passes=passes,
    )
    columns = np.array(loads, np.int64).reshape(-1, 3)
    decided = Decisions(
        place=np.array([cell[1] for cell in cells], np.int8),
        was_there=np.array([cell[1] == RESIDENT for cell in cells]),
        level=np.full(len(cells), HIGH, np.int8),
        load=np.array([cell[2] for cell in cells], np.int32),
        loads=Loads(
            columns[:, 0].astype(np.int32),
            columns[:, 1].copy(),
            columns[:, 2].astype(np.int8),
            np.ones(len(columns), np.int32),
        ),
        evictions=0,
        refused=0,
        wasted=0,
    )
    return work, decided


def here(expert: int) -> Cell:
    return expert, RESIDENT, NO_LOAD


def on_cpu(expert: int) -> Cell:
    return expert, ON_CPU, NO_LOAD


def clocked(
    steps: Sequence[Sequence[Cell]],
    loads: Sequence[Load] = (),
    n_layers: int = 2,
    priced: Prices | None = None,
    extras: Extras | None = None,
) -> tuple[OffloadProgram, engine.Timeline]:
    work, decided = run_of(steps, loads, n_layers)
    n_passes = work.passes.n_passes
    part = offload_program(work, decided, priced or prices(n_passes), (0, n_passes), extras)
    return part, engine.run(part.program)


def ends(part: OffloadProgram, timeline: engine.Timeline) -> list[float]:
    """End of every pass, seconds."""
    return [float(end) for end in timeline.end_s[part.pass_end]]


def ends_of(
    steps: Sequence[Sequence[Cell]],
    loads: Sequence[Load] = (),
    n_layers: int = 2,
    priced: Prices | None = None,
    extras: Extras | None = None,
) -> list[float]:
    return ends(*clocked(steps, loads, n_layers, priced, extras))


def kinds(part: OffloadProgram, kind: int) -> np.ndarray:
    return np.flatnonzero(part.kind == kind)


# --- hand-computed timelines ----------------------------------------------------------------------


def test_with_all_experts_there_a_pass_is_the_sum_of_its_parts() -> None:
    priced = prices(
        2,
        first_s=np.array([5.0, 5.0]),
        after_s=np.array([0.5, 0.5]),
        tail_s=np.array([4.0, 4.0]),
        gpu_fixed_s=0.25,
    )
    steps = [[here(0), here(1)], [here(0)]] * 2
    # 5 + (2 + 0.25 + 2 + 0.5) + (2 + 0.25 + 1 + 0.5) + 4
    assert ends_of(steps, priced=priced) == [17.5, 35.0]


def test_a_missing_expert_is_loaded_after_the_gate_and_computed_after_its_load() -> None:
    # gate at 2, copy until 10, expert until 11, then the second layer: 2 + 1
    assert ends_of([[(3, LOADED, 0)], [here(0)]], [(3, 0, DEMAND)]) == [14.0]


def test_what_is_there_is_computed_while_the_rest_is_loaded() -> None:
    steps = [[here(1), here(2), (3, LOADED, 0)], [here(0)]]
    assert ends_of(steps, [(3, 0, DEMAND)]) == [14.0]


def test_two_loads_of_a_layer_queue_on_one_copy_engine() -> None:
    steps = [[(3, LOADED, 0), (4, LOADED, 1)], [here(0)]]
    # copies until 10 and 18; experts until 11 and 19
    assert ends_of(steps, [(3, 0, DEMAND), (4, 0, DEMAND)]) == [22.0]


def test_experts_there_start_together_and_loaded_ones_each_alone() -> None:
    priced = prices(1, gpu_fixed_s=0.25, gpu_start_s=0.5)
    steps = [[here(1), here(2), (3, LOADED, 0), (4, LOADED, 1)], [here(0)]]
    # copies until 10 and 18; experts until 11.5 and 19.5; layer 1: 2 + 0.25 + 1
    loads = [(3, 0, DEMAND), (4, 0, DEMAND)]
    assert ends_of(steps, loads, priced=priced) == [22.75]


def test_each_copy_pays_its_fixed_seconds() -> None:
    slow = replace(box(), copy_s=0.5)
    steps = [[(3, LOADED, 0), (4, LOADED, 1)], [here(0)]]
    loads = [(3, 0, DEMAND), (4, 0, DEMAND)]
    assert ends_of(steps, loads, priced=prices(1, slow)) == [23.0]


@pytest.mark.parametrize(
    ("dense_s", "end_s"),
    [
        # known at the gate of layer 0; copied meanwhile; layer 1's gate at 2 * dense + 1
        (9.0, 9 + 1 + 9 + 1),  # copy ends at 17, before the gate at 19: in time
        (2.0, 10 + 1),  # copy ends at 10, gate at 5: late, but earlier than loaded by demand (14)
    ],
)
def test_a_load_ahead_arrives_in_time_or_late(dense_s: float, end_s: float) -> None:
    steps = [[here(1)], [(3, RESIDENT, 0)]]
    priced = prices(1, before_s=np.array([dense_s]))
    assert ends_of(steps, [(N_EXPERTS + 3, 0, PREFETCH)], priced=priced) == [end_s]


def test_a_load_by_demand_waits_behind_loads_ahead_issued_earlier() -> None:
    steps = [[here(1)], [(5, LOADED, 1)]]
    loads = [(N_EXPERTS + 3, 0, PREFETCH), (N_EXPERTS + 5, 1, DEMAND)]
    # ahead: 2 to 10, by demand: 10 to 18, expert until 19
    assert ends_of(steps, loads) == [19.0]


def test_a_load_ahead_by_demand_goes_before_those_ahead_of_the_same_gate() -> None:
    steps = [[(5, LOADED, 0)], [(3, RESIDENT, 1)]]
    loads = [(5, 0, DEMAND), (N_EXPERTS + 3, 0, PREFETCH)]
    # by demand: 2 to 10, expert until 11; ahead: 10 to 18; layer 1: gate at 13, expert 18 to 19
    assert ends_of(steps, loads) == [19.0]


def test_cpu_and_gpu_work_side_by_side_and_the_next_layer_waits_for_both() -> None:
    # CPU: each expert max(3, 8 / 2) = 4 s after the gate at 2; GPU: 1 s
    assert ends_of([[here(0), on_cpu(1)], [here(0)]]) == [2 + 4 + 2 + 1]
    assert ends_of([[here(0), on_cpu(1), on_cpu(2)], [here(0)]]) == [2 + 8 + 2 + 1]
    busy = [here(expert) for expert in range(6)]
    assert ends_of([[*busy, on_cpu(9)], [here(0)]]) == [2 + 6 + 2 + 1]


def test_an_expert_on_the_cpu_is_the_longer_of_reading_and_multiplying() -> None:
    slow = prices(1, cpu_s=5.0 * np.arange(9), cpu_fixed_s=0.5)
    assert ends_of([[on_cpu(1)], [here(0)]], priced=slow) == [2 + 0.5 + 5 + 2 + 1]
    fast = prices(1, cpu_s=np.zeros(9), cpu_fixed_s=0.5)
    assert ends_of([[on_cpu(1)], [here(0)]], priced=fast) == [2 + 0.5 + 4 + 2 + 1]


def test_deferred_experts_join_one_layer_later() -> None:
    layers = [[on_cpu(0), on_cpu(1)]] * 3
    # at once: every layer 2 + 8
    assert ends_of(layers, n_layers=3) == [30.0]
    # one deferred: now 2..6, late 6..10; gate at 8; now 10..14, late ..18; gate at 16; now 18..22,
    # late ..26, which the pass waits for
    assert ends_of(layers, n_layers=3, extras=Extras(deferred=1)) == [26.0]


def test_a_layer_without_experts_on_the_cpu_still_waits_for_deferred_ones() -> None:
    layers = [[on_cpu(0), on_cpu(1)], [here(0)], [here(0)]]
    # late until 10; layer 1 from 6 to 9; layer 2 waits until 10: 10 + 2 + 1
    assert ends_of(layers, n_layers=3, extras=Extras(deferred=1)) == [13.0]


def test_at_least_one_expert_of_a_layer_is_never_deferred() -> None:
    layers = [[on_cpu(0)]] * 2
    assert ends_of(layers, extras=Extras(deferred=8)) == ends_of(layers)


def test_a_cold_expert_is_read_from_the_drive_before_it_is_copied() -> None:
    cold = Extras(load_cold=np.array([True]))
    on = prices(1, box(drive=2.0))
    steps = [[(3, LOADED, 0)], [here(0)]]
    # gate at 2, latency 0.5, read 4 s, copy 8 s, expert 1 s, layer 1
    assert ends_of(steps, [(3, 0, DEMAND)], priced=on, extras=cold) == [2 + 0.5 + 4 + 8 + 1 + 3]
    warm = Extras(load_cold=np.array([False]))
    assert ends_of(steps, [(3, 0, DEMAND)], priced=on, extras=warm) == [14.0]


def test_reads_from_the_drive_run_ahead_of_the_cpu() -> None:
    cold = Extras(cpu_cold=np.array([True, True, False]))
    on = prices(1, box(drive=2.0))
    # reads until 6.5 and 11; CPU 6.5..10.5, 11..15
    assert ends_of([[on_cpu(1), on_cpu(2)], [here(0)]], priced=on, extras=cold) == [18.0]


def test_cpu_and_copies_share_host_memory() -> None:
    steps = [[(3, LOADED, 0), on_cpu(1)], [here(0)]]
    loads = [(3, 0, DEMAND)]
    # 1.5 byte/s for both, of which the copy may take 1 and the CPU 2: half each, so the CPU reads
    # 8 bytes in 10.67 s; the copy has 0 left then
    tight = prices(1, box(copy=1.0, dram=1.5), cpu_s=np.zeros(9))
    assert ends_of(steps, loads, priced=tight) == pytest.approx([2 + 16 / 1.5 + 1 + 3])
    wide = prices(1, box(copy=1.0, dram=3.0), cpu_s=np.zeros(9))
    assert ends_of(steps, loads, priced=wide) == [14.0]


def test_a_copy_is_no_faster_than_host_memory() -> None:
    steps, loads = [[(3, LOADED, 0)], [here(0)]], [(3, 0, DEMAND)]
    slow, fast = (prices(1, box(copy=8.0, dram=dram)) for dram in (1.0, 100.0))
    assert ends_of(steps, loads, priced=slow) == [14.0]
    assert ends_of(steps, loads, priced=fast) == [2 + 1 + 1 + 3]


def test_devices_with_layers_in_a_row_take_turns_and_have_copy_engines_of_their_own() -> None:
    two = prices(1, n_gpus=2)
    assert ends_of([[here(0)], [here(0)]], priced=two) == [6.0]
    steps = [[(5, LOADED, 0)], [(3, RESIDENT, 1)]]
    loads = [(5, 0, DEMAND), (N_EXPERTS + 3, 0, PREFETCH)]
    # one engine: 19 (above); two: both copies 2 to 10, layer 1's gate at 13, expert until 14
    assert ends_of(steps, loads, priced=two) == [14.0]
    part, timeline = clocked(steps, loads, priced=two)
    dense = kinds(part, offload_kernel.DENSE)
    assert part.program.stream[dense].tolist() == [0, 1]
    assert timeline.start_s[dense[1]] == 11.0


def test_pim_works_beside_the_device() -> None:
    pim = Extras(pim_s=6.0 * np.arange(9))
    steps = [[here(0), (1, ON_PIM, NO_LOAD)], [here(0)]]
    assert ends_of(steps, extras=pim) == [2 + 6 + 3]
    started = prices(1, gpu_fixed_s=0.25)
    assert ends_of(steps, extras=pim, priced=started) == [2 + 0.25 + 6 + 3.25]


def test_names_cover_every_stream_and_task() -> None:
    part, _ = clocked([[here(0)], [on_cpu(0)]], priced=prices(1, n_gpus=2))
    names = part.names()
    assert len(names.stream) == len(names.process) == part.program.n_streams == 7
    assert len(names.label) == part.program.n_tasks
    assert names.stream[2:] == ("copy 0", "copy 1", "cpu", "drive", "pim")


# --- laws -----------------------------------------------------------------------------------------


def random_run(seed: int, n_passes: int = 6, n_layers: int = 3) -> tuple[LayerSteps, Decisions]:
    """Experts anywhere; what is loaded ahead is used in the layer after."""
    rng = np.random.default_rng(seed)
    steps: list[list[Cell]] = []
    loads: list[Load] = []
    ahead: list[tuple[int, int]] = []
    for step in range(n_passes * n_layers):
        layer = step % n_layers
        chosen = rng.permutation(N_EXPERTS)[: rng.integers(1, 5)].tolist()
        cells: list[Cell] = [(expert, RESIDENT, load) for expert, load in ahead]
        ahead = []
        for expert in chosen:
            if expert in [cell[0] for cell in cells]:
                continue
            place = int(rng.choice([RESIDENT, LOADED, ON_CPU]))
            load = NO_LOAD
            if place == LOADED:
                load = len(loads)
                loads.append((layer * N_EXPERTS + expert, step, DEMAND))
            cells.append((expert, place, load))
        last = step == n_passes * n_layers - 1
        for expert in [] if last else rng.permutation(N_EXPERTS)[: rng.integers(0, 3)].tolist():
            ahead.append((expert, len(loads)))
            loads.append(((layer + 1) % n_layers * N_EXPERTS + expert, step, PREFETCH))
        steps.append(cells)
    return run_of(steps, loads, n_layers)


def cold_at_random(work: LayerSteps, decided: Decisions, seed: int) -> Extras:
    rng = np.random.default_rng(seed)
    return Extras(
        load_cold=rng.random(len(decided.loads.step)) < 0.3,
        cpu_cold=rng.random(len(work.expert)) < 0.3,
        deferred=int(rng.integers(0, 3)),
    )


def program_of(
    work: LayerSteps, decided: Decisions, priced: Prices, extras: Extras | None = None
) -> OffloadProgram:
    return offload_program(work, decided, priced, (0, work.passes.n_passes), extras)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_bytes_drawn_are_those_of_loads_reads_and_experts_on_the_cpu(seed: int) -> None:
    work, decided = random_run(seed)
    extras = cold_at_random(work, decided, seed)
    part = program_of(work, decided, prices(6, box(drive=2.0)), extras)
    drawn = np.bincount(part.kind, weights=part.program.bytes, minlength=9)
    n_cpu = int((decided.place == ON_CPU).sum())
    ahead = int((decided.loads.kind == PREFETCH).sum())
    assert extras.load_cold is not None
    assert extras.cpu_cold is not None
    n_cold = extras.load_cold.sum() + (extras.cpu_cold & (decided.place == ON_CPU)).sum()
    assert drawn[offload_kernel.COPY] == (len(decided.loads.kind) - ahead) * EXPERT_BYTES
    assert drawn[offload_kernel.COPY_AHEAD] == ahead * EXPERT_BYTES
    assert drawn[offload_kernel.CPU_EXPERTS] == n_cpu * EXPERT_BYTES
    assert drawn[offload_kernel.READ] == n_cold * EXPERT_BYTES


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from(["copy", "dram", "drive", "cpu"]), st.floats(1.0, 8.0))
def test_more_bandwidth_with_nothing_shared_is_never_slower(
    seed: int, which: str, factor: float
) -> None:
    work, decided = random_run(seed)
    extras = cold_at_random(work, decided, seed)
    rates = {"copy": 1.0, "dram": np.inf, "drive": 2.0, "cpu": 2.0}
    found = []
    for scale in (1.0, factor):
        now = rates | {which: rates[which] * scale}
        on = box(now["copy"], now["dram"], now["drive"])
        priced = prices(6, on, cpu_bytes_per_s=now["cpu"])
        part = program_of(work, decided, priced, extras)
        found.append(ends(part, engine.run(part.program)))
    assert all(after <= before * (1 + 1e-12) for before, after in zip(*found, strict=True))


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(1.0, 8.0))
def test_more_host_memory_bandwidth_is_never_slower_without_loads_ahead_or_deferral(
    seed: int, factor: float
) -> None:
    work, decided = random_run(seed)
    only = by_demand(decided)
    found = []
    for dram in (1.2, 1.2 * factor):
        part = program_of(work, only, prices(6, box(dram=dram)))
        found.append(ends(part, engine.run(part.program)))
    assert all(after <= before * (1 + 1e-9) for before, after in zip(*found, strict=True))


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 5))
def test_cutting_a_run_in_two_forgets_only_the_loads_in_flight_at_the_seam(
    seed: int, cut: int
) -> None:
    work, decided = random_run(seed)
    priced = prices(6)
    whole = program_of(work, decided, priced)
    expected = np.array(ends(whole, engine.run(whole.program)))
    first, second = (np.array(part_ends(work, decided, span)) for span in ((0, cut), (cut, 6)))
    assert first == pytest.approx(expected[:cut], rel=1e-12)
    in_flight = (decided.loads.step == cut * work.n_layers - 1) & (decided.loads.kind == PREFETCH)
    earlier = expected[cut:] - expected[cut - 1] - second
    assert (earlier >= -1e-9).all()
    assert (earlier <= in_flight.sum() * EXPERT_BYTES + 1e-9).all()


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 5))
def test_without_loads_ahead_a_cut_changes_nothing(seed: int, cut: int) -> None:
    work, decided = random_run(seed)
    only = by_demand(decided)
    lasted = np.diff([0.0, *part_ends(work, only, (0, 6))])
    halves = [np.diff([0.0, *part_ends(work, only, span)]) for span in ((0, cut), (cut, 6))]
    assert np.concatenate(halves) == pytest.approx(lasted, rel=1e-12)


def part_ends(work: LayerSteps, decided: Decisions, span: tuple[int, int]) -> list[float]:
    part = offload_program(work, decided, prices(6), span)
    return ends(part, engine.run(part.program))


def by_demand(decided: Decisions) -> Decisions:
    """The same without loads ahead: what they brought was there all along."""
    keep = decided.loads.kind == DEMAND
    moved = np.append(np.where(keep, np.cumsum(keep) - 1, NO_LOAD), NO_LOAD)
    fields = ("object", "step", "kind", "units")
    return replace(
        decided,
        load=moved[decided.load].astype(np.int32),
        loads=Loads(*(getattr(decided.loads, field)[keep] for field in fields)),
    )


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(0, 3))
def test_no_pass_is_faster_than_its_work_on_any_unit(seed: int, deferred: int) -> None:
    work, decided = random_run(seed)
    priced = prices(6)
    part = program_of(work, decided, priced, Extras(deferred=deferred))
    end = ends(part, engine.run(part.program))[-1]
    n_gpu = int((decided.place != ON_CPU).sum())
    n_cpu = int((decided.place == ON_CPU).sum())
    bound = max(2.0 * work.n_steps + n_gpu, 4.0 * n_cpu)
    assert end >= bound - 1e-9


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_tasks_fit_the_arrays_and_every_pass_ends_with_its_head(seed: int) -> None:
    work, decided = random_run(seed)
    extras = cold_at_random(work, decided, seed)
    part = program_of(work, decided, prices(6, box(drive=2.0)), extras)
    heads = kinds(part, offload_kernel.HEAD)
    assert part.pass_end.tolist() == heads.tolist()
    timeline = engine.run(part.program)
    end = timeline.end_s[heads]
    assert (np.diff(end) > 0).all()
    on_time = timeline.end_s[part.program.stream == 2].max(initial=0.0)  # CPU
    assert end[-1] >= on_time
