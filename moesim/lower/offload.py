"""Decisions of an offloading runtime and their prices -> Program, some forward passes at a time.

One layer of one pass becomes, in order of issue:

    device   dense part up to the gate          waits for the CPU's part of the layer before
    copy     a load for every missing expert    after the gate, behind loads issued earlier
    CPU      the experts dispatched to it       after the gate; reads weights from the DRAM pool
    device   resident experts and shared ones, then each expert that waits for its load
    copy     loads ahead, for a later layer     after the gate

With a drive under the host memory a load (or an expert on the CPU) that is not in host memory waits
for a read on the drive's stream. Copies, the CPU and the drive share the DRAM pool. A load still in
flight where a program ends counts as done in the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moesim.offload.decisions import Decisions
from moesim.offload.prices import Prices
from moesim.program import Names, Program
from traces.compiled import compiled, inlined
from traces.layer_steps import LayerSteps

Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]
Doubles = npt.NDArray[np.float64]

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
    n_gpus     device streams 0..n_gpus - 1, their copy engines after them, then CPU, drive, PIM
    """

    program: Program
    kind: npt.NDArray[np.int8]
    pass_end: Longs
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


class _Work(NamedTuple):
    start: Longs
    tokens: Ints
    place: npt.NDArray[np.int8]
    load: Ints
    load_step: Longs
    load_gpu: Ints
    load_ahead: npt.NDArray[np.bool_]
    load_bytes: Doubles
    load_cold: npt.NDArray[np.bool_]
    cpu_cold: npt.NDArray[np.bool_]
    gpu_of_layer: Ints


class _Prices(NamedTuple):
    first_s: Doubles
    before_s: Doubles
    after_s: Doubles
    tail_s: Doubles
    gpu_s: Doubles
    cpu_s: Doubles
    pim_s: Doubles
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


class _Tasks(NamedTuple):
    stream: Ints
    kind: npt.NDArray[np.int8]
    seconds: Doubles
    bytes: Doubles
    max_rate: Doubles
    wait_start: Longs
    wait_for: Ints
    draw_start: Longs
    draw_pool: Ints
    pass_end: Longs
    total: Longs  # tasks, waits, draws so far


@dataclass(frozen=True, slots=True)
class Extras:
    """What only some systems have.

    load_cold  bool[loads], the expert is on the drive when its load is issued; None: all in DRAM
    cpu_cold   bool[cells], the same for experts on the CPU
    pim_s      float64[most tokens + 1], one expert on the PIM unit by token copies
    deferred   experts of a layer on the CPU whose results join one layer later (KTransformers)
    """

    load_cold: npt.NDArray[np.bool_] | None = None
    cpu_cold: npt.NDArray[np.bool_] | None = None
    pim_s: Doubles | None = None
    deferred: int = 0


def offload_program(
    work: LayerSteps,
    decided: Decisions,
    prices: Prices,
    passes: tuple[int, int],
    extras: Extras | None = None,
) -> OffloadProgram:
    """The program of forward passes `passes[0]` to `passes[1]`, exclusive."""
    more = extras or Extras()
    first, end = passes[0] * work.n_layers, passes[1] * work.n_layers
    steps_of_loads = decided.loads.step
    load_first, load_end = np.searchsorted(steps_of_loads, [first, end]).tolist()
    n_cells = int(work.start[end] - work.start[first])
    n_tasks = (end - first) * _TASKS_A_STEP + passes[1] - passes[0]
    n_tasks += _TASKS_A_CELL * n_cells + _TASKS_A_LOAD * (load_end - load_first)
    tasks = _empty(n_tasks, passes[1] - passes[0])
    shared = _shares_dram(prices, decided, more)
    arrays = _arrays(work, decided, prices, more)
    _emit(arrays, _numbers(prices, more, shared), tasks, (passes[0], passes[1]), work.n_layers,
          (load_first, load_end), prices.n_gpus)  # fmt: skip
    n, n_waits, n_draws = tasks.total[:3].tolist()
    program = Program(
        stream=tasks.stream[:n],
        seconds=tasks.seconds[:n],
        bytes=tasks.bytes[:n],
        max_rate=tasks.max_rate[:n],
        wait_start=tasks.wait_start[: n + 1],
        wait_for=tasks.wait_for[:n_waits],
        draw_start=tasks.draw_start[: n + 1],
        draw_pool=tasks.draw_pool[:n_draws],
        pool_rate=np.array([prices.box.dram_bytes_per_s]),
        n_streams=2 * prices.n_gpus + 3,
    )
    return OffloadProgram(program, tasks.kind[:n], tasks.pass_end, prices.n_gpus)


def _shares_dram(prices: Prices, decided: Decisions, more: Extras) -> bool:
    """Whether two streams may draw on host memory at once; else rates need no pool."""
    box = prices.box
    from_drive = any(
        cold is not None and bool(cold.any()) for cold in (more.load_cold, more.cpu_cold)
    )
    readers = [bool(len(decided.loads.step)), bool((decided.place == _ON_CPU).any()), from_drive]
    many_copies = prices.n_gpus > 1 and prices.n_gpus * box.copy_bytes_per_s > box.dram_bytes_per_s
    return sum(readers) > 1 or many_copies


def _arrays(work: LayerSteps, decided: Decisions, prices: Prices, more: Extras) -> _Work:
    loads = decided.loads
    gpu_of_layer = (np.arange(work.n_layers) * prices.n_gpus // work.n_layers).astype(np.int32)
    none = np.zeros(0, np.bool_)
    return _Work(
        work.start,
        work.tokens,
        decided.place,
        decided.load,
        loads.step,
        gpu_of_layer[loads.object // work.n_experts],
        loads.kind != 0,
        loads.units.astype(np.float64) * prices.unit_bytes,
        none if more.load_cold is None else more.load_cold,
        none if more.cpu_cold is None else more.cpu_cold,
        gpu_of_layer,
    )


def _numbers(prices: Prices, more: Extras, shared: bool) -> _Prices:
    box = prices.box
    copy_rate = box.copy_bytes_per_s * prices.links
    drive = box.drive
    share = box.efficiency.drive_share
    return _Prices(
        prices.first_s,
        prices.before_s,
        prices.after_s,
        prices.tail_s,
        prices.gpu_s,
        prices.cpu_s,
        np.zeros(1) if more.pim_s is None else more.pim_s,
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
    )


def _empty(n_tasks: int, n_passes: int) -> _Tasks:
    return _Tasks(
        np.empty(n_tasks, np.int32),
        np.empty(n_tasks, np.int8),
        np.empty(n_tasks),
        np.empty(n_tasks),
        np.empty(n_tasks),
        np.zeros(n_tasks + 1, np.int64),
        np.empty(2 * n_tasks + 4, np.int32),
        np.zeros(n_tasks + 1, np.int64),
        np.empty(n_tasks, np.int32),
        np.empty(n_passes, np.int64),
        np.zeros(3, np.int64),
    )


@compiled
def _emit(
    work: _Work,
    prices: _Prices,
    tasks: _Tasks,
    passes: tuple[int, int],
    n_layers: int,
    loads: tuple[int, int],
    n_gpus: int,
) -> None:
    """All tasks of the passes, in order of issue."""
    cpu, drive, pim = 2 * n_gpus, 2 * n_gpus + 1, 2 * n_gpus + 2
    next_load, first_load = loads[0], loads[0]
    task_of_load = np.full(loads[1] - loads[0], -1, np.int32)
    on_device = due = late = -1  # last task on a device; CPU tasks the next layers wait for
    for p in range(passes[0], passes[1]):
        for layer in range(n_layers):
            step = p * n_layers + layer
            gpu = work.gpu_of_layer[layer]
            seconds = prices.before_s[p] + (prices.first_s[p] if layer == 0 else 0.0)
            gate = _task(tasks, gpu, DENSE, seconds)
            if on_device >= 0 and tasks.stream[on_device] != gpu:
                _wait(tasks, on_device)
            if due >= 0:
                _wait(tasks, due)
            while next_load < loads[1] and work.load_step[next_load] == step:
                if work.load_ahead[next_load]:
                    break
                copied = _copy(work, prices, tasks, next_load, gate, n_gpus, drive)
                task_of_load[next_load - first_load] = copied
                next_load += 1
            now, later = _on_cpu(work, prices, tasks, step, gate, cpu, drive)
            due, late = (now if now >= 0 else late), later
            beside = _on_pim(work, prices, tasks, step, gate, pim)
            last = _on_gpu(work, prices, tasks, step, gpu, p, first_load, task_of_load)
            on_device = last if last >= 0 else gate
            if beside >= 0:
                on_device = _task(tasks, gpu, RESIDENT_EXPERTS, 0.0)
                _wait(tasks, beside)
            while next_load < loads[1] and work.load_step[next_load] == step:
                copied = _copy(work, prices, tasks, next_load, gate, n_gpus, drive)
                task_of_load[next_load - first_load] = copied
                next_load += 1
        gpu = work.gpu_of_layer[n_layers - 1]
        head = _task(tasks, gpu, HEAD, prices.tail_s[p])
        if due >= 0:
            _wait(tasks, due)
        if late >= 0:
            _wait(tasks, late)
        due = late = -1
        on_device = head
        tasks.pass_end[p - passes[0]] = head


@inlined
def _task(tasks: _Tasks, stream: int, kind: int, seconds: float) -> int:
    """One more task, without waits or draws yet."""
    at = int(tasks.total[0])
    tasks.stream[at] = stream
    tasks.kind[at] = kind
    tasks.seconds[at] = seconds
    tasks.bytes[at] = 0.0
    tasks.max_rate[at] = np.inf
    tasks.wait_start[at + 1] = tasks.total[1]
    tasks.draw_start[at + 1] = tasks.total[2]
    tasks.total[0] = at + 1
    return at


@inlined
def _wait(tasks: _Tasks, for_task: int) -> None:
    """The newest task waits for an earlier one."""
    tasks.wait_for[tasks.total[1]] = for_task
    tasks.total[1] += 1
    tasks.wait_start[tasks.total[0]] = tasks.total[1]


@inlined
def _draw(prices: _Prices, tasks: _Tasks, n_bytes: float, rate: float) -> None:
    """The newest task draws bytes, from the DRAM pool where that is shared."""
    at = tasks.total[0] - 1
    tasks.bytes[at] = n_bytes
    tasks.max_rate[at] = rate
    if prices.shared_dram:
        tasks.draw_pool[tasks.total[2]] = DRAM
        tasks.total[2] += 1
        tasks.draw_start[at + 1] = tasks.total[2]


@inlined
def _copy(
    work: _Work, prices: _Prices, tasks: _Tasks, load: int, gate: int, n_gpus: int, drive: int
) -> int:
    """A load: read from the drive first when the expert is not in host memory."""
    engine, n_bytes = n_gpus + work.load_gpu[load], work.load_bytes[load]
    kind = COPY_AHEAD if work.load_ahead[load] else COPY
    after = gate
    if len(work.load_cold) and work.load_cold[load]:
        after = _read(prices, tasks, n_bytes, gate, drive)
    if not prices.shared_dram:
        task = _task(tasks, engine, kind, prices.copy_s + n_bytes / prices.copy_rate)
        _wait(tasks, after)
        return task
    _task(tasks, engine, kind, prices.copy_s)
    _wait(tasks, after)
    task = _task(tasks, engine, kind, 0.0)
    _draw(prices, tasks, n_bytes, prices.copy_rate)
    return task


@inlined
def _read(prices: _Prices, tasks: _Tasks, n_bytes: float, gate: int, drive: int) -> int:
    """A read from the drive into host memory, its latency first."""
    _task(tasks, drive, READ, prices.drive_s)
    _wait(tasks, gate)
    task = _task(tasks, drive, READ, 0.0)
    _draw(prices, tasks, n_bytes, prices.drive_rate)
    return task


@inlined
def _on_cpu(
    work: _Work, prices: _Prices, tasks: _Tasks, step: int, gate: int, cpu: int, drive: int
) -> tuple[int, int]:
    """Experts on the CPU, one after the other: the task the next layer waits for, and the last of
    those that may join one layer later; -1 for none."""
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
        read = _read(prices, tasks, prices.expert_bytes, gate, drive) if cold else -1
        if same == tokens and not cold and seen != on_time:
            tasks.seconds[task] += prices.cpu_s[tokens]  # equal experts in a row are one task
            tasks.bytes[task] += prices.expert_bytes
        else:
            task = _task(tasks, cpu, CPU_EXPERTS, prices.cpu_s[tokens])
            if cold:
                _wait(tasks, read)
            _draw(prices, tasks, prices.expert_bytes, prices.cpu_rate)
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
            seconds += prices.pim_s[work.tokens[cell]]
    if seconds == 0.0:
        return -1
    task = _task(tasks, pim, PIM, prices.gpu_fixed_s + seconds)
    _wait(tasks, gate)
    return task


@inlined
def _on_gpu(
    work: _Work,
    prices: _Prices,
    tasks: _Tasks,
    step: int,
    gpu: int,
    n_pass: int,
    first_load: int,
    task_of_load: Ints,
) -> int:
    """Experts that wait for nothing together with the shared ones, then each other after its load.

    returns  the last task, -1 when there is no work
    """
    seconds, last, after_s = 0.0, -1, prices.after_s[n_pass]
    for cell in range(work.start[step], work.start[step + 1]):
        if work.place[cell] == _RESIDENT and work.load[cell] < first_load:
            seconds += prices.gpu_s[work.tokens[cell]]
    if seconds > 0.0:
        seconds += prices.gpu_fixed_s
    if seconds + after_s > 0.0:
        last = _task(tasks, gpu, RESIDENT_EXPERTS, seconds + after_s)
    for place in (_RESIDENT, _LOADED):  # what was fetched ahead arrives before what is missing
        for cell in range(work.start[step], work.start[step + 1]):
            if work.place[cell] != place or work.load[cell] < first_load:
                continue
            seconds = prices.gpu_start_s + prices.gpu_s[work.tokens[cell]]
            last = _task(tasks, gpu, LOADED_EXPERT, seconds)
            _wait(tasks, task_of_load[work.load[cell] - first_load])
    return last
