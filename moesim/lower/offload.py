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
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError
from moesim.offload.decisions import Decisions, Loads
from moesim.offload.prices import Prices
from moesim.program import Names, Program
from traces.compiled import compiled, inlined
from traces.layer_steps import LayerSteps

Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]
Doubles = npt.NDArray[np.float64]
Records = npt.NDArray[Any]

DENSE, RESIDENT_EXPERTS, LOADED_EXPERT, COPY, COPY_AHEAD, CPU_EXPERTS, READ, HEAD, PIM = range(9)
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
DRAM = 0
_RESIDENT, _LOADED, _ON_CPU, _ON_PIM = 0, 1, 2, 3
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


_LOAD = np.dtype(
    [
        ("bytes", np.float64),
        ("step", np.int64),
        ("left", np.int64),  # layer-step at which the copy left its slot again
        ("gpu", np.int32),
        ("task", np.int32),  # its copy, -1 while it has not started
        ("gate", np.int32),  # the gate it was issued at
        ("ahead", np.bool_),
        ("cold", np.bool_),
        ("dropped", np.bool_),
    ],
    align=True,
)
_TASK = np.dtype(
    [
        ("seconds", np.float64),
        ("bytes", np.float64),
        ("max_rate", np.float64),
        ("start_s", np.float64),  # estimates, without contention
        ("end_s", np.float64),
        ("wait_end", np.int64),
        ("draw_end", np.int64),
        ("stream", np.int32),
        ("kind", np.int8),
    ],
    align=True,
)
# What costs in the compiled loop is the number of arrays that calls pass on: hence few, of records.


class _Work(NamedTuple):
    start: Longs
    tokens: Ints
    place: npt.NDArray[np.int8]
    load: Ints
    loads: Records  # of these passes
    cpu_cold: npt.NDArray[np.bool_]
    gpu_of_layer: Ints
    first_load: int
    any_ahead: bool
    any_cpu: bool


class _Prices(NamedTuple):
    passes: Doubles  # [n_passes, 4] first, before, after and tail seconds
    experts: Doubles  # [most tokens + 1, 3] seconds on device, CPU and PIM
    gpu_fixed_s: float
    gpu_start_s: float
    cpu_fixed_s: float
    copy_s: float
    copy_rate: float
    cpu_rate: float
    drive_s: float
    drive_rate: float
    expert_bytes: float
    deferred: int
    shared_dram: bool
    any_pim: bool


class _Tasks(NamedTuple):
    tasks: Records
    wait_for: Ints
    draw_pool: Ints
    pass_end: Longs
    free_s: Doubles  # when each stream is free, by estimate
    total: Longs  # tasks, waits, draws so far, then the first load not started of each device


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
    _emit(arrays, numbers, tasks, (passes[0], passes[1]), work.n_layers)
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
    readers = [bool(len(decided.loads.step)), bool((decided.place == _ON_CPU).any()), from_drive]
    many_copies = prices.n_gpus > 1 and prices.n_gpus * box.copy_bytes_per_s > box.dram_bytes_per_s
    return sum(readers) > 1 or many_copies


def _arrays(
    work: LayerSteps, decided: Decisions, prices: Prices, more: Extras, part: slice
) -> _Work:
    loads = decided.loads
    gpu_of_layer = (np.arange(work.n_layers) * prices.n_gpus // work.n_layers).astype(np.int32)
    rows = np.zeros(part.stop - part.start, _LOAD)
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
    return _Work(
        work.start,
        work.tokens,
        decided.place,
        decided.load,
        rows,
        np.zeros(0, np.bool_) if more.cpu_cold is None else more.cpu_cold,
        gpu_of_layer,
        part.start,
        any_ahead,
        bool((decided.place == _ON_CPU).any()),
    )


def _left_at(loads: Loads, part: slice, n_objects: int) -> Longs:
    """int64[loads]: layer-step at which each copy left its slot again; far off where not noted."""
    if loads.victim is None:
        return np.full(part.stop - part.start, np.iinfo(np.int64).max)
    return _next_leaving(loads.object[part], loads.step[part], loads.victim[part], n_objects)


@compiled
def _next_leaving(objects: Ints, steps: Longs, victims: Ints, n_objects: int) -> Longs:
    left = np.full(len(objects), np.iinfo(np.int64).max)
    leaves = np.full(n_objects, np.iinfo(np.int64).max)
    for load in range(len(objects) - 1, -1, -1):
        left[load] = leaves[objects[load]]
        if victims[load] >= 0:
            leaves[victims[load]] = steps[load]
    return left


def _numbers(prices: Prices, more: Extras, shared: bool) -> _Prices:
    box = prices.box
    copy_rate = box.copy_bytes_per_s * prices.links
    drive = box.drive
    share = box.efficiency.drive_share
    pim_s = np.zeros(1) if more.pim_s is None else more.pim_s
    return _Prices(
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


def _empty(n_tasks: int, n_passes: int, n_gpus: int) -> _Tasks:
    return _Tasks(
        np.empty(n_tasks, _TASK),
        np.empty(2 * n_tasks + 4, np.int32),
        np.empty(n_tasks, np.int32),
        np.empty(n_passes, np.int64),
        np.zeros(2 * n_gpus + 3),
        np.zeros(3 + n_gpus, np.int64),
    )


@compiled
def _emit(
    work: _Work, prices: _Prices, tasks: _Tasks, passes: tuple[int, int], n_layers: int
) -> None:
    """All tasks of the passes, in order of issue."""
    n_gpus = len(tasks.total) - 3
    issued = 0
    on_device = due = late = -1  # last task on a device; CPU tasks the next layers wait for
    for p in range(passes[0], passes[1]):
        for layer in range(n_layers):
            step = p * n_layers + layer
            gpu = work.gpu_of_layer[layer]
            seconds = prices.passes[p, 1] + (prices.passes[p, 0] if layer == 0 else 0.0)
            gate = _task(tasks, gpu, DENSE, seconds)
            if on_device >= 0 and tasks.tasks[on_device].stream != gpu:
                _wait(tasks, on_device)
            if due >= 0:
                _wait(tasks, due)
            if work.any_ahead:
                _start_queued(work, prices, tasks, issued, step, tasks.tasks[gate].end_s)
                _promote(work, prices, tasks, step)
            while issued < len(work.loads) and work.loads[issued].step == step:
                work.loads[issued].gate = gate
                if not (work.any_ahead and work.loads[issued].ahead):
                    _copy(work.loads, prices, tasks, issued)
                issued += 1
            now = later = -1
            if work.any_cpu:
                now, later = _on_cpu(work, prices, tasks, step, gate, 2 * n_gpus)
            due, late = (now if now >= 0 else late), later
            beside = -1
            if prices.any_pim:
                beside = _on_pim(work, prices, tasks, step, gate, 2 * n_gpus + 2)
            last = _on_gpu(work, prices, tasks, step, gpu, prices.passes[p, 2])
            on_device = last if last >= 0 else gate
            if beside >= 0:
                on_device = _task(tasks, gpu, RESIDENT_EXPERTS, 0.0)
                _wait(tasks, beside)
        on_device = _task(tasks, work.gpu_of_layer[n_layers - 1], HEAD, prices.passes[p, 3])
        if due >= 0:
            _wait(tasks, due)
        if late >= 0:
            _wait(tasks, late)
        due = late = -1
        tasks.pass_end[p - passes[0]] = on_device
    if work.any_ahead:
        _start_queued(work, prices, tasks, issued, passes[1] * n_layers, np.inf)


@inlined
def _start_queued(
    work: _Work, prices: _Prices, tasks: _Tasks, issued: int, step: int, now_s: float
) -> None:
    """Loads ahead that, by estimate, start before now; those whose slot has gone are dropped."""
    loads, n_gpus = work.loads, len(tasks.total) - 3
    for gpu in range(n_gpus):
        load = tasks.total[3 + gpu]
        while load < issued:
            if loads[load].ahead and loads[load].task < 0 and loads[load].gpu == gpu:
                if loads[load].left < step:
                    loads[load].dropped = True
                elif tasks.free_s[n_gpus + gpu] >= now_s:
                    break
                else:
                    _copy(loads, prices, tasks, load)
            load += 1
        tasks.total[3 + gpu] = load


@inlined
def _promote(work: _Work, prices: _Prices, tasks: _Tasks, step: int) -> None:
    """Loads ahead that this layer-step needs and that have not started start now."""
    for cell in range(work.start[step], work.start[step + 1]):
        if work.place[cell] != _RESIDENT or work.load[cell] < work.first_load:
            continue
        load = work.load[cell] - work.first_load
        if work.loads[load].task < 0:
            _copy(work.loads, prices, tasks, load)


@inlined
def _task(tasks: _Tasks, stream: int, kind: int, seconds: float) -> int:
    """One more task, without waits or draws yet."""
    at = int(tasks.total[0])
    rows = tasks.tasks
    rows[at].stream = stream
    rows[at].kind = kind
    rows[at].seconds = seconds
    rows[at].bytes = 0.0
    rows[at].max_rate = np.inf
    rows[at].wait_end = tasks.total[1]
    rows[at].draw_end = tasks.total[2]
    rows[at].start_s = tasks.free_s[stream]
    rows[at].end_s = rows[at].start_s + seconds
    tasks.free_s[stream] = rows[at].end_s
    tasks.total[0] = at + 1
    return at


@inlined
def _wait(tasks: _Tasks, for_task: int) -> None:
    """The newest task waits for an earlier one; it has drawn nothing yet."""
    at, rows = tasks.total[0] - 1, tasks.tasks
    tasks.wait_for[tasks.total[1]] = for_task
    tasks.total[1] += 1
    rows[at].wait_end = tasks.total[1]
    rows[at].start_s = max(rows[at].start_s, rows[for_task].end_s)
    rows[at].end_s = rows[at].start_s + rows[at].seconds
    tasks.free_s[rows[at].stream] = rows[at].end_s


@inlined
def _draw(tasks: _Tasks, n_bytes: float, rate: float, shared_dram: bool) -> None:
    """The newest task draws bytes more, from the DRAM pool where that is shared."""
    at, rows = tasks.total[0] - 1, tasks.tasks
    if shared_dram and rows[at].bytes == 0.0:
        tasks.draw_pool[tasks.total[2]] = DRAM
        tasks.total[2] += 1
        rows[at].draw_end = tasks.total[2]
    rows[at].bytes += n_bytes
    rows[at].max_rate = rate
    rows[at].end_s = rows[at].start_s + max(rows[at].seconds, rows[at].bytes / rate)
    tasks.free_s[rows[at].stream] = rows[at].end_s


@inlined
def _copy(loads: Records, prices: _Prices, tasks: _Tasks, load: int) -> None:
    """A load: read from the drive first when the expert is not in host memory."""
    n_gpus = len(tasks.total) - 3
    engine, n_bytes = n_gpus + loads[load].gpu, loads[load].bytes
    kind = COPY_AHEAD if loads[load].ahead else COPY
    after = loads[load].gate
    if loads[load].cold:
        after = _read(prices, tasks, n_bytes, after, 2 * n_gpus + 1)
    if not prices.shared_dram:
        task = _task(tasks, engine, kind, prices.copy_s + n_bytes / prices.copy_rate)
        _wait(tasks, after)
    else:
        _task(tasks, engine, kind, prices.copy_s)
        _wait(tasks, after)
        task = _task(tasks, engine, kind, 0.0)
        _draw(tasks, n_bytes, prices.copy_rate, True)
    loads[load].task = task


@inlined
def _read(prices: _Prices, tasks: _Tasks, n_bytes: float, gate: int, drive: int) -> int:
    """A read from the drive into host memory, its latency first."""
    _task(tasks, drive, READ, prices.drive_s)
    _wait(tasks, gate)
    task = _task(tasks, drive, READ, 0.0)
    _draw(tasks, n_bytes, prices.drive_rate, prices.shared_dram)
    return task


@inlined
def _on_cpu(
    work: _Work, prices: _Prices, tasks: _Tasks, step: int, gate: int, cpu: int
) -> tuple[int, int]:
    """Experts on the CPU, one after the other: the task the next layer waits for, and the last of
    those that may join one layer later; -1 for none.
    """
    n_cpu = 0
    for cell in range(work.start[step], work.start[step + 1]):
        n_cpu += work.place[cell] == _ON_CPU
    if n_cpu == 0:
        return -1, -1
    _task(tasks, cpu, CPU_EXPERTS, prices.cpu_fixed_s)
    _wait(tasks, gate)
    on_time = max(1, n_cpu - prices.deferred)
    now, seen, same, task = -1, 0, 0, -1
    for cell in range(work.start[step], work.start[step + 1]):
        if work.place[cell] != _ON_CPU:
            continue
        tokens, cold = work.tokens[cell], len(work.cpu_cold) > 0 and work.cpu_cold[cell]
        if same == tokens and not cold and seen != on_time:  # equal experts in a row are one task
            tasks.tasks[task].seconds += prices.experts[tokens, 1]
        else:
            read = _read(prices, tasks, prices.expert_bytes, gate, cpu + 1) if cold else -1
            task = _task(tasks, cpu, CPU_EXPERTS, prices.experts[tokens, 1])
            if cold:
                _wait(tasks, read)
        _draw(tasks, prices.expert_bytes, prices.cpu_rate, prices.shared_dram)
        same = 0 if cold else tokens
        seen += 1
        if seen == on_time:
            now = task
    return now, (task if n_cpu > on_time else -1)


@inlined
def _on_pim(work: _Work, prices: _Prices, tasks: _Tasks, step: int, gate: int, pim: int) -> int:
    """Experts on the PIM unit, one after the other, started as on the device; -1 for none."""
    seconds = 0.0
    for cell in range(work.start[step], work.start[step + 1]):
        if work.place[cell] == _ON_PIM:
            seconds += prices.experts[work.tokens[cell], 2]
    if seconds == 0.0:
        return -1
    task = _task(tasks, pim, PIM, prices.gpu_fixed_s + seconds)
    _wait(tasks, gate)
    return task


@inlined
def _on_gpu(
    work: _Work, prices: _Prices, tasks: _Tasks, step: int, gpu: int, after_s: float
) -> int:
    """Experts that wait for nothing together with the shared ones, then each other after its load.

    returns  the last task, -1 when there is no work
    """
    seconds, n_waiting, last = 0.0, 0, -1
    for cell in range(work.start[step], work.start[step + 1]):
        if work.place[cell] <= _LOADED and work.load[cell] >= work.first_load:
            n_waiting += 1
        elif work.place[cell] == _RESIDENT:
            seconds += prices.experts[work.tokens[cell], 0]
    if seconds > 0.0:
        seconds += prices.gpu_fixed_s
    if seconds + after_s > 0.0:
        last = _task(tasks, gpu, RESIDENT_EXPERTS, seconds + after_s)
    if n_waiting == 0:
        return last
    for place in (_RESIDENT, _LOADED):  # what was fetched ahead arrives before what is missing
        for cell in range(work.start[step], work.start[step + 1]):
            if work.place[cell] == place and work.load[cell] >= work.first_load:
                own_s = prices.gpu_start_s + prices.experts[work.tokens[cell], 0]
                last = _task(tasks, gpu, LOADED_EXPERT, own_s)
                _wait(tasks, work.loads[work.load[cell] - work.first_load].task)
    return last
