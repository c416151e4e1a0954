"""The loop of `decide.py` compiled, for the built-in policies: same rules, same decisions.

Resident objects of a group are an unordered row; a victim is found by looking at all of them,
which is faster than any tree for the tens of slots a layer has. What is known of an object, a group
and a load are records, and loops over the experts of a layer-step stand inside the functions: what
costs here is the number of arrays that calls pass on. All compiled functions stay in this one file.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from traces.compiled import compiled, inlined

LRU, LFU, FIFO, ARC, MRS, BELADY, LOOKAHEAD = range(7)
LOAD, LOAD_LOW, CPU, THRESHOLD, HSS, SKIP = range(6)
_RESIDENT, _LOADED, _ON_CPU, _SKIPPED = 0, 1, 2, 4
_DEMAND, _PREFETCH = 0, 1
_LOW, _HIGH = 1, 2
_NOWHERE, _T1, _T2, _B1, _B2 = range(5)
_NEVER = np.iinfo(np.int64).max
_BEFORE_ALL = -2e19
LOADS, EVICTIONS, REFUSED, WASTED, STEP, CLOCK, LEFT, N_TALLY = range(8)

Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.int8]
Doubles = npt.NDArray[np.float64]
Records = npt.NDArray[Any]

OBJECT = np.dtype(
    [
        ("stamp", np.int64),  # clock of the last use (FIFO: insertion; ARC: move into its list)
        ("count", np.int64),  # uses since it last left
        ("upcoming", np.int64),  # next layer-step that asks for it
        ("wanted_until", np.int64),  # last layer-step it was expected at
        ("asked_at", np.int64),  # last layer-step that asked for it
        ("score", np.float64),
        ("slot", np.int32),  # place in its group's row, -1 when not in a slot
        ("arriving", np.int32),  # load ahead that has not been used, -1 for none
        ("level", np.int8),  # precision of the copy in the fast tier, 0 for none
        ("arc", np.int8),  # ARC's list it is in
        ("untouched", np.bool_),  # fetched ahead and not used yet
    ],
    align=True,
)
GROUP = np.dtype(
    [
        ("slots", np.int64),
        ("used", np.int64),
        ("n_resident", np.int64),
        ("wanted_t1", np.float64),  # ARC
    ],
    align=True,
)
LOAD_RECORD = np.dtype(
    [
        ("step", np.int64),
        ("object", np.int32),
        ("units", np.int32),
        ("victim", np.int32),  # the last copy thrown out for it, -1 for none
        ("kind", np.int8),
    ],
    align=True,
)


class Work(NamedTuple):
    """Arrays of LayerSteps, and what was worked out of them beforehand."""

    start: Longs
    expert: Ints
    tokens: Ints
    need: Bytes
    weight: npt.NDArray[np.float32]  # gate weight per token and cell; empty unless MRS
    next_step: Longs  # next use of each cell's object; empty unless an oracle
    ahead_start: Longs
    ahead: Ints


class Rules(NamedTuple):
    """A policy as numbers."""

    cache: int
    on_miss: int
    budget: int
    distance: int
    window_steps: int
    decay: float
    threshold: float
    units_low: int
    units_high: int
    nested: bool
    n_layers: int
    n_experts: int
    per_layer: bool
    keep_expected: bool


class Times(NamedTuple):
    """Estimates that HSS decides from."""

    gpu_s: Doubles
    cpu_s: Doubles
    cpu_start_s: float
    load_s: float


class Fast(NamedTuple):
    """The fast tier: objects and groups as records, and the objects in each group's slots."""

    objects: Records
    groups: Records
    row: Ints
    in_list: Longs  # [groups, 5] objects in each of ARC's lists
    tally: Longs  # loads, evictions, refused, wasted, next layer-step, clock, last to leave


class Log(NamedTuple):
    """Decisions while they are made; room for loads grows outside."""

    place: Bytes
    was_there: npt.NDArray[np.bool_]
    level: Bytes
    load: Ints
    loads: Records


@compiled
def decide(work: Work, rules: Rules, times: Times, fast: Fast, log: Log, scratch: Ints) -> None:
    """Run layer-steps from tally[STEP] on; stops early when the log of loads may overflow."""
    n_steps = len(work.start) - 1
    for step in range(fast.tally[STEP], n_steps):
        target = step + rules.distance
        most_ahead = 0
        if len(work.ahead) and target < n_steps:
            most_ahead = work.ahead_start[target + 1] - work.ahead_start[target]
        most = work.start[step + 1] - work.start[step] + most_ahead
        if fast.tally[LOADS] + most > len(log.loads):
            return
        fast.tally[STEP] = step + 1
        if rules.cache == MRS:
            _hear_gate(work, rules, fast.objects, step)
        _look_up(work, rules, fast, log.was_there, step)
        if rules.on_miss == HSS:
            _hybrid_schedule(work, times, log, step, scratch)
        else:
            _dispatch(work, rules, log, step)
        _serve(work, rules, fast, log, step)
        if most_ahead:
            _fetch_ahead(work, rules, fast, log.loads, step)


@compiled
def fill(rules: Rules, fast: Fast, experts: Longs) -> None:
    """Full copies in the slots before the first layer-step, in the order given."""
    for expert in experts:
        group = expert // rules.n_experts if rules.per_layer else 0
        _insert(rules, fast, group, expert, True)
        fast.objects[expert].level = _HIGH
        fast.groups[group].used += rules.units_high


@inlined
def _look_up(
    work: Work, rules: Rules, fast: Fast, was_there: npt.NDArray[np.bool_], step: int
) -> None:
    """Are copies there that are good enough; and the policy hears of the uses."""
    base = step % rules.n_layers * rules.n_experts
    objects = fast.objects
    for cell in range(work.start[step], work.start[step + 1]):
        expert = base + work.expert[cell]
        was_there[cell] = objects[expert].level >= work.need[cell]
        objects[expert].asked_at = step
        objects[expert].count += 1
        if rules.cache == LRU or rules.cache == LFU or rules.cache == LOOKAHEAD:
            fast.tally[CLOCK] += 1
            objects[expert].stamp = fast.tally[CLOCK]
        elif rules.cache == ARC:
            _arc_use(rules, fast, expert)
        if len(work.next_step):
            objects[expert].upcoming = work.next_step[cell]


@inlined
def _hear_gate(work: Work, rules: Rules, objects: Records, step: int) -> None:
    """MRS: the layer's scores fade, those of the chosen experts gain their gate weight."""
    base = step % rules.n_layers * rules.n_experts
    for expert in range(base, base + rules.n_experts):
        objects[expert].score *= 1.0 - rules.decay
    for cell in range(work.start[step], work.start[step + 1]):
        objects[base + work.expert[cell]].score += rules.decay * np.float64(work.weight[cell])


@inlined
def _dispatch(work: Work, rules: Rules, log: Log, step: int) -> None:
    """Where each expert of the layer-step is computed."""
    for cell in range(work.start[step], work.start[step + 1]):
        if log.was_there[cell]:
            log.place[cell] = _RESIDENT
        elif rules.on_miss == CPU:
            log.place[cell] = _ON_CPU
        elif rules.on_miss == SKIP:
            log.place[cell] = _SKIPPED
        elif rules.on_miss == THRESHOLD and work.tokens[cell] < rules.threshold:
            log.place[cell] = _ON_CPU
        else:
            log.place[cell] = _LOADED


@inlined
def _hybrid_schedule(work: Work, times: Times, log: Log, step: int, order: Ints) -> None:
    """HSS (`moesim/policies/dispatch.py`): GPU from the head of the queue, CPU from its tail."""
    first, n = work.start[step], work.start[step + 1] - work.start[step]
    for i in range(n):  # insertion sort: cached first, then by falling tokens, then by cell
        cell, j = first + i, i
        while j > 0 and _before(work.tokens, log.was_there, cell, order[j - 1]):
            order[j] = order[j - 1]
            j -= 1
        order[j] = cell
    gpu_s = cpu_s = moved_s = 0.0
    head, tail = 0, n - 1
    while head <= tail:
        taken, other = order[head], order[tail]
        on_gpu, on_cpu = times.gpu_s[work.tokens[taken]], times.cpu_s[work.tokens[other]]
        if cpu_s == 0.0:
            on_cpu += times.cpu_start_s
        if not log.was_there[taken]:
            on_gpu += max(0.0, moved_s + times.load_s - gpu_s)
        if gpu_s + on_gpu <= cpu_s + on_cpu:
            gpu_s += on_gpu
            log.place[taken] = _RESIDENT
            if not log.was_there[taken]:
                moved_s += times.load_s
                log.place[taken] = _LOADED
            head += 1
        else:
            cpu_s += on_cpu
            log.place[other] = _ON_CPU
            tail -= 1


@inlined
def _before(tokens: Ints, was_there: npt.NDArray[np.bool_], cell: int, other: int) -> bool:
    if was_there[cell] != was_there[other]:
        return bool(was_there[cell])
    return bool(tokens[cell] > tokens[other])


@inlined
def _serve(work: Work, rules: Rules, fast: Fast, log: Log, step: int) -> None:
    """Each expert of the layer-step: its load, its slot, what its computation waits for."""
    base = step % rules.n_layers * rules.n_experts
    objects = fast.objects
    for cell in range(work.start[step], work.start[step + 1]):
        expert = base + work.expert[cell]
        objects[expert].untouched = False
        if log.place[cell] == _RESIDENT:
            log.load[cell] = objects[expert].arriving
            objects[expert].arriving = -1
            log.level[cell] = objects[expert].level
        elif log.place[cell] == _LOADED:
            need, had = work.need[cell], objects[expert].level
            units = _units(rules, need) - (_units(rules, had) if rules.nested else 0)
            _take_slot(rules, fast, expert, need, step, False)
            log.load[cell] = _issue(fast.tally, log.loads, expert, step, units, _DEMAND)
            log.level[cell] = need
        else:
            log.load[cell] = -1
            log.level[cell] = _HIGH


@inlined
def _fetch_ahead(work: Work, rules: Rules, fast: Fast, loads: Records, step: int) -> None:
    """Fetch what is expected at a later layer-step and not there, best first, up to the budget."""
    target = step + rules.distance
    base = target % rules.n_layers * rules.n_experts
    first, end = work.ahead_start[target], work.ahead_start[target + 1]
    objects = fast.objects
    for i in range(first, end):
        objects[base + work.ahead[i]].wanted_until = target
    issued = 0
    for i in range(first, end):
        expert = base + work.ahead[i]
        if issued == rules.budget:
            return
        if objects[expert].level != 0:
            continue
        if not _take_slot(rules, fast, expert, _HIGH, step, True):
            fast.tally[REFUSED] += 1
            continue
        load = _issue(fast.tally, loads, expert, step, rules.units_high, _PREFETCH)
        objects[expert].arriving = load
        objects[expert].untouched = True
        issued += 1


@inlined
def _issue(tally: Longs, loads: Records, expert: int, step: int, units: int, kind: int) -> int:
    at = int(tally[LOADS])
    loads[at].object = expert
    loads[at].step = step
    loads[at].units = units
    loads[at].kind = kind
    loads[at].victim = tally[LEFT]
    tally[LOADS] = at + 1
    return at


@inlined
def _units(rules: Rules, level: int) -> int:
    if level == _HIGH:
        return rules.units_high
    return rules.units_low if level == _LOW else 0


@inlined
def _take_slot(rules: Rules, fast: Fast, expert: int, level: int, step: int, ahead: bool) -> bool:
    """Room for a copy of an expert; False when every other copy is needed sooner."""
    group = expert // rules.n_experts if rules.per_layer else 0
    objects, groups = fast.objects, fast.groups
    more = _units(rules, level) - _units(rules, objects[expert].level)
    fast.tally[LEFT] = -1
    while groups[group].used + more > groups[group].slots:
        victim = _victim(rules, fast, group, expert, step, ahead)
        if victim < 0:
            return False
        _evict(rules, fast, group, victim)
    if objects[expert].slot < 0:
        _insert(rules, fast, group, expert, ahead)
    objects[expert].level = level
    groups[group].used += more
    return True


@inlined
def _insert(rules: Rules, fast: Fast, group: int, expert: int, ahead: bool) -> None:
    objects, groups = fast.objects, fast.groups
    objects[expert].slot = groups[group].n_resident
    fast.row[group, objects[expert].slot] = expert
    groups[group].n_resident += 1
    if rules.cache == ARC:
        _arc_insert(rules, fast, group, expert)
    elif ahead or rules.cache == FIFO:
        fast.tally[CLOCK] += 1
        objects[expert].stamp = fast.tally[CLOCK]


@inlined
def _evict(rules: Rules, fast: Fast, group: int, victim: int) -> None:
    objects, groups = fast.objects, fast.groups
    last = fast.row[group, groups[group].n_resident - 1]
    fast.row[group, objects[victim].slot] = last
    objects[last].slot = objects[victim].slot
    groups[group].n_resident -= 1
    groups[group].used -= _units(rules, objects[victim].level)
    objects[victim].slot = -1
    objects[victim].level = 0
    objects[victim].arriving = -1
    objects[victim].count = 0
    fast.tally[EVICTIONS] += 1
    fast.tally[LEFT] = victim
    if objects[victim].untouched:
        objects[victim].untouched = False
        fast.tally[WASTED] += 1
    if rules.cache == ARC:
        _arc_move(fast, group, victim, _B1 if objects[victim].arc == _T1 else _B2)


@inlined
def _victim(rules: Rules, fast: Fast, group: int, incoming: int, step: int, ahead: bool) -> int:
    """Resident object that leaves, -1 for none.

    What the running layer needs stays. What is expected later stays too while there is anything
    else (with `keep_expected`), and always when the incoming copy is itself fetched ahead.
    """
    objects = fast.objects
    best, best_major, best_minor, best_wanted = -1, 0.0, 0, False
    from_t1 = rules.cache == ARC and _arc_takes_t1(fast, group, incoming)
    for i in range(fast.groups[group].n_resident):
        expert = fast.row[group, i]
        wanted = objects[expert].wanted_until >= step
        if objects[expert].asked_at == step or (wanted and ahead):
            continue
        wanted = wanted and rules.keep_expected
        major, minor = _rank(rules, objects, expert, step, from_t1)
        sooner = major < best_major or (major == best_major and minor < best_minor)
        if best < 0 or wanted < best_wanted or (wanted == best_wanted and sooner):
            best, best_major, best_minor, best_wanted = expert, major, minor, wanted
    return best


@inlined
def _rank(
    rules: Rules, objects: Records, expert: int, step: int, from_t1: bool
) -> tuple[float, int]:
    """The lowest pair leaves first."""
    stamp = objects[expert].stamp
    if rules.cache == LRU or rules.cache == FIFO:
        return float(stamp), 0
    if rules.cache == LFU:
        return float(objects[expert].count), stamp
    if rules.cache == ARC:
        return (0.0 if (objects[expert].arc == _T1) == from_t1 else 1.0), stamp
    if rules.cache == MRS:
        return objects[expert].score, expert
    upcoming = objects[expert].upcoming
    if rules.cache == LOOKAHEAD and upcoming - step > rules.window_steps:
        return _BEFORE_ALL, stamp
    return -float(upcoming), expert


@inlined
def _arc_move(fast: Fast, group: int, expert: int, to: int) -> None:
    """To the fresh end of one of ARC's lists."""
    objects = fast.objects
    fast.in_list[group, objects[expert].arc] -= 1
    fast.in_list[group, to] += 1
    objects[expert].arc = to
    fast.tally[CLOCK] += 1
    objects[expert].stamp = fast.tally[CLOCK]


@inlined
def _arc_use(rules: Rules, fast: Fast, expert: int) -> None:
    """A copy used again moves to T2; a ghost moves the wanted size of T1."""
    group = expert // rules.n_experts if rules.per_layer else 0
    groups, found = fast.groups, fast.objects[expert].arc
    b1, b2 = fast.in_list[group, _B1], fast.in_list[group, _B2]
    wanted = groups[group].wanted_t1
    if found in (_T1, _T2):
        _arc_move(fast, group, expert, _T2)
    elif found == _B1:
        room = float(groups[group].slots // rules.units_high)
        groups[group].wanted_t1 = min(room, wanted + max(1.0, b2 / b1))
    elif found == _B2:
        groups[group].wanted_t1 = max(0.0, wanted - max(1.0, b1 / b2))


@inlined
def _arc_takes_t1(fast: Fast, group: int, incoming: int) -> bool:
    t1, wanted = fast.in_list[group, _T1], fast.groups[group].wanted_t1
    was_often = fast.objects[incoming].arc == _B2
    return bool(t1 > wanted or (was_often and t1 == wanted and t1 > 0))


@inlined
def _arc_insert(rules: Rules, fast: Fast, group: int, expert: int) -> None:
    """Into T1, or into T2 when it left not long ago; ghosts are cut to their room."""
    known = fast.objects[expert].arc == _B1 or fast.objects[expert].arc == _B2
    _arc_move(fast, group, expert, _T2 if known else _T1)
    counts, slots = fast.in_list[group], fast.groups[group].slots // rules.units_high
    while counts[_B1] > 0 and counts[_T1] + counts[_B1] > slots:
        _arc_forget_oldest(rules, fast, group, _B1)
    while counts[_B2] > 0 and counts[_T1] + counts[_T2] + counts[_B1] + counts[_B2] > 2 * slots:
        _arc_forget_oldest(rules, fast, group, _B2)


@inlined
def _arc_forget_oldest(rules: Rules, fast: Fast, group: int, ghosts: int) -> None:
    objects = fast.objects
    first = group * rules.n_experts if rules.per_layer else 0
    end = first + rules.n_experts if rules.per_layer else len(objects)
    oldest, age = -1, _NEVER
    for expert in range(first, end):
        if objects[expert].arc == ghosts and objects[expert].stamp < age:
            oldest, age = expert, objects[expert].stamp
    _arc_move(fast, group, oldest, _NOWHERE)
