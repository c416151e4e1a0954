"""Decisions of an offloading runtime and their prices -> Program, some forward passes at a time.

One layer of one pass becomes, in order of issue:

    device   dense part up to the gate          waits for the CPU's part of the layer before
    copy     a load for every missing expert    after the gate, before loads ahead still queued
    CPU      the experts dispatched to it       after the gate; reads weights from the DRAM pool
    device   resident experts and shared ones, then each expert that waits for its load
    copy     loads ahead, for a later layer     after the gate, while the engine has nothing else

A load by demand overtakes loads ahead that have not started, as the queues of runtimes do, and a
load ahead whose expert is needed before it started becomes one by demand; one whose slot was given
away before it started is dropped. Which have started is estimated as the program is written: from
the same prices, without contention.

With a drive under the host memory a load (or an expert on the CPU) that is not in host memory waits
for a read on the drive's stream. Copies, the CPU and the drive share the DRAM pool. A load still in
flight where a program ends counts as done in the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError
from moesim.lower.offload_kernel import LOAD, TASK, PriceTables, Tasks, Work, emit, next_leaving
from moesim.offload.decisions import ON_CPU, Decisions, Loads
from moesim.offload.prices import Prices
from moesim.program import Names, Program
from traces.layer_steps import LayerSteps

Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]
Doubles = npt.NDArray[np.float64]
Records = npt.NDArray[Any]

LABELS = (
    ("dense part", "compute"),
    ("resident experts", "compute"),
    ("expert after its load", "compute"),
    ("load", "copy"),
    ("load ahead", "copy"),
    ("experts on the CPU", "compute"),
    ("read", "drive"),
    ("head", "compute"),
    ("experts on PIM", "compute"),
)
_TASKS_A_STEP, _TASKS_A_CELL, _TASKS_A_LOAD = 5, 3, 4  # at most


@dataclass(frozen=True, slots=True)
class OffloadProgram:
    """A program of some passes, and where each of them ends.

    kind       int8[tasks], which of LABELS a task is
    pass_end   int64[passes], the last task on the device of each pass
    dropped    bool[loads of these passes], loads ahead that never started
    n_gpus     device streams 0..n_gpus - 1, their copy engines after them, then CPU, drive, PIM
    """

    program: Program
    kind: npt.NDArray[np.int8]
    pass_end: Longs
    dropped: npt.NDArray[np.bool_]
    n_gpus: int

    def names(self) -> Names:
        """Names of streams, pools and tasks, for pictures and trace viewers."""
        gpus = [f"gpu {g}" for g in range(self.n_gpus)]
        streams = [*gpus, *(f"copy {g}" for g in range(self.n_gpus)), "cpu", "drive", "pim"]
        process = [*gpus, *gpus, "host", "host", "pim"]
        return Names(
            stream=tuple(streams),
            process=tuple(process),
            pool=("dram",),
            label=self.kind.astype(np.int32),
            labels=tuple(name for name, _ in LABELS),
            categories=tuple(category for _, category in LABELS),
        )


@dataclass(frozen=True, slots=True)
class Extras:
    """What only some systems have.

    load_cold  bool[loads], the expert is on the drive when its load is issued; None: all in DRAM
    cpu_cold   bool[cells], the same for experts on the CPU
    pim_s      float64[most tokens + 1], one expert on the PIM unit by token copies
    deferred   experts of a layer on the CPU whose results join one layer later (KTransformers)
    in_order   copies run in order of issue: nothing overtakes, nothing is dropped
    """

    load_cold: npt.NDArray[np.bool_] | None = None
    cpu_cold: npt.NDArray[np.bool_] | None = None
    pim_s: Doubles | None = None
    deferred: int = 0
    in_order: bool = False


def offload_program(
    work: LayerSteps,
    decided: Decisions,
    prices: Prices,
    passes: tuple[int, int],
    extras: Extras | None = None,
) -> OffloadProgram:
    """The program of forward passes `passes[0]` to `passes[1]`, exclusive.

    raises  SimulationError when experts lie on a drive and the box has none
    """
    more = extras or Extras()
    _check_drive(prices, more)
    first, end = passes[0] * work.n_layers, passes[1] * work.n_layers
    part = slice(*np.searchsorted(decided.loads.step, [first, end]).tolist())
    n_cells = int(work.start[end] - work.start[first])
    n_tasks = (end - first) * _TASKS_A_STEP + passes[1] - passes[0]
    n_tasks += _TASKS_A_CELL * n_cells + _TASKS_A_LOAD * (part.stop - part.start)
    tasks = _empty(n_tasks, passes[1] - passes[0], prices.n_gpus)
    arrays = _arrays(work, decided, prices, more, part)
    numbers = _numbers(prices, more, _shares_dram(prices, decided, more))
    emit(arrays, numbers, tasks, (passes[0], passes[1]), work.n_layers)
    n, n_waits, n_draws = tasks.total[:3].tolist()
    done = tasks.tasks[:n]
    program = Program(
        stream=np.ascontiguousarray(done["stream"]),
        seconds=np.ascontiguousarray(done["seconds"]),
        bytes=np.ascontiguousarray(done["bytes"]),
        max_rate=np.ascontiguousarray(done["max_rate"]),
        wait_start=np.append(0, done["wait_end"]),
        wait_for=tasks.wait_for[:n_waits],
        draw_start=np.append(0, done["draw_end"]),
        draw_pool=tasks.draw_pool[:n_draws],
        pool_rate=np.array([prices.box.dram_bytes_per_s]),
        n_streams=2 * prices.n_gpus + 3,
    )
    kind, dropped = (np.ascontiguousarray(c) for c in (done["kind"], arrays.loads["dropped"]))
    return OffloadProgram(program, kind, tasks.pass_end, dropped, prices.n_gpus)


def _check_drive(prices: Prices, more: Extras) -> None:
    cold = (more.load_cold, more.cpu_cold)
    if prices.box.drive is None and any(flags is not None and flags.any() for flags in cold):
        raise SimulationError(
            f"{prices.box.system.name}: experts outside host memory, but no drive to hold them"
        )


def _shares_dram(prices: Prices, decided: Decisions, more: Extras) -> bool:
    """Whether two streams may draw on host memory at once; else rates need no pool."""
    box = prices.box
    from_drive = any(
        cold is not None and bool(cold.any()) for cold in (more.load_cold, more.cpu_cold)
    )
    readers = [bool(len(decided.loads.step)), bool((decided.place == ON_CPU).any()), from_drive]
    many_copies = prices.n_gpus > 1 and prices.n_gpus * box.copy_bytes_per_s > box.dram_bytes_per_s
    return sum(readers) > 1 or many_copies


def _arrays(
    work: LayerSteps, decided: Decisions, prices: Prices, more: Extras, part: slice
) -> Work:
    loads = decided.loads
    gpu_of_layer = (np.arange(work.n_layers) * prices.n_gpus // work.n_layers).astype(np.int32)
    rows = np.zeros(part.stop - part.start, LOAD)
    rows["bytes"] = loads.units[part].astype(np.float64) * prices.unit_bytes
    rows["step"] = loads.step[part]
    rows["gpu"] = gpu_of_layer[loads.object[part] // work.n_experts]
    rows["ahead"] = loads.kind[part] != 0
    rows["task"] = rows["gate"] = -1
    any_ahead = bool(rows["ahead"].any()) and not more.in_order
    if any_ahead:
        rows["left"] = _left_at(loads, part, work.n_objects)
    if more.load_cold is not None:
        rows["cold"] = more.load_cold[part]
    return Work(
        work.start,
        work.tokens,
        decided.place,
        decided.load,
        rows,
        np.zeros(0, np.bool_) if more.cpu_cold is None else more.cpu_cold,
        gpu_of_layer,
        part.start,
        any_ahead,
        bool((decided.place == ON_CPU).any()),
    )


def _left_at(loads: Loads, part: slice, n_objects: int) -> Longs:
    """int64[loads]: layer-step at which each copy left its slot again; far off where not noted."""
    if loads.victim is None:
        return np.full(part.stop - part.start, np.iinfo(np.int64).max)
    return next_leaving(loads.object[part], loads.step[part], loads.victim[part], n_objects)


def _numbers(prices: Prices, more: Extras, shared: bool) -> PriceTables:
    box = prices.box
    copy_rate = box.copy_bytes_per_s * prices.links
    drive = box.drive
    share = box.efficiency.drive_share
    pim_s = np.zeros(1) if more.pim_s is None else more.pim_s
    return PriceTables(
        np.column_stack([prices.first_s, prices.before_s, prices.after_s, prices.tail_s]),
        _side_by_side(prices.gpu_s, prices.cpu_s, pim_s),
        prices.gpu_fixed_s,
        prices.gpu_start_s,
        prices.cpu_fixed_s,
        box.copy_s,
        copy_rate if shared else min(copy_rate, box.dram_bytes_per_s),
        prices.cpu_bytes_per_s,
        0.0 if drive is None else drive.latency_s,
        1.0 if drive is None else drive.bytes_per_s * share,
        float(prices.expert_bytes),
        more.deferred,
        shared,
        more.pim_s is not None,
    )


def _side_by_side(*tables: Doubles) -> Doubles:
    """The tables as columns; a shorter one ends in infinities, which no unit can take."""
    most = max(len(table) for table in tables)
    columns = np.full((most, len(tables)), np.inf)
    for column, table in enumerate(tables):
        columns[: len(table), column] = table
    return columns


def _empty(n_tasks: int, n_passes: int, n_gpus: int) -> Tasks:
    return Tasks(
        np.empty(n_tasks, TASK),
        np.empty(2 * n_tasks + 4, np.int32),
        np.empty(n_tasks, np.int32),
        np.empty(n_passes, np.int64),
        np.zeros(2 * n_gpus + 3),
        np.zeros(3 + n_gpus, np.int64),
    )
