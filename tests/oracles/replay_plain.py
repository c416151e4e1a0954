"""Cache replay in plain Python: the specification of traces/replay_kernels.py. Slow and short."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

Token = list[int]
Priority = Callable[[int], tuple[float, ...]]


class Memory:
    """What a policy may know of each object: when it came, when and how often it was used."""

    def __init__(self, tokens: list[Token], lookahead_tokens: int) -> None:
        self.tokens, self.lookahead = tokens, lookahead_tokens
        self.flat = [key for token in tokens for key in token]
        self.inserted: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.count: Counter[int] = Counter()  # since the object was last inserted
        self.count_ever: Counter[int] = Counter()
        self.now = -1  # index of the request being served
        self.token = -1  # and of its token

    def next_use(self, key: int) -> float:
        later = (i for i in range(self.last[key] + 1, len(self.flat)) if self.flat[i] == key)
        return next(later, float("inf"))

    def left_in_window(self, key: int) -> int:
        """Requests for key after the present one, in this token and lookahead - 1 more."""
        window_end = sum(len(token) for token in self.tokens[: self.token + self.lookahead])
        return self.flat[self.now + 1 : window_end].count(key)


def priorities(memory: Memory) -> dict[str, Priority]:
    """The resident object of the lowest priority leaves."""
    return {
        "fifo": lambda key: (memory.inserted[key],),
        "lru": lambda key: (memory.last[key],),
        "lfu": lambda key: (memory.count[key], memory.last[key]),
        "perfect_lfu": lambda key: (memory.count_ever[key], memory.last[key]),
        "belady": lambda key: (-memory.next_use(key), memory.last[key]),
        "segment": lambda key: (memory.left_in_window(key), memory.last[key]),
    }


class Cache:
    """At most `slots` objects; makes room before it inserts, so the new one never leaves."""

    def __init__(self, slots: int, memory: Memory, priority: Priority) -> None:
        self.slots, self.memory, self.priority = slots, memory, priority
        self.resident: set[int] = set()
        self.evictions: Counter[int] = Counter()

    def use(self, key: int) -> None:
        memory = self.memory
        if key not in self.resident:
            if len(self.resident) == self.slots:
                victim = min(self.resident, key=self.priority)
                self.resident.remove(victim)
                self.evictions[victim] += 1
            self.resident.add(key)
            memory.inserted[key] = memory.now
            memory.count[key] = 0
        memory.count[key] += 1
        memory.count_ever[key] += 1
        memory.last[key] = memory.now


class ArcCache:
    """Figure 4 of Megiddo and Modha (FAST 2003), case by case; the last of each list is newest."""

    def __init__(self, slots: int) -> None:
        self.slots, self.p = slots, 0.0
        self.t1: OrderedDict[int, None] = OrderedDict()
        self.t2: OrderedDict[int, None] = OrderedDict()
        self.b1: OrderedDict[int, None] = OrderedDict()
        self.b2: OrderedDict[int, None] = OrderedDict()
        self.evictions: Counter[int] = Counter()

    @property
    def resident(self) -> set[int]:
        return {*self.t1, *self.t2}

    def use(self, key: int) -> None:
        for name in ("t1", "t2", "b1", "b2"):
            if key in getattr(self, name):
                getattr(self, "_in_" + name)(key)
                self.t2[key] = None
                return
        self._make_room()
        self.t1[key] = None

    def _in_t1(self, key: int) -> None:
        del self.t1[key]

    def _in_t2(self, key: int) -> None:
        del self.t2[key]

    def _in_b1(self, key: int) -> None:
        self.p = min(self.p + max(len(self.b2) / len(self.b1), 1), self.slots)
        self._replace(from_b2=False)
        del self.b1[key]

    def _in_b2(self, key: int) -> None:
        self.p = max(self.p - max(len(self.b1) / len(self.b2), 1), 0)
        self._replace(from_b2=True)
        del self.b2[key]

    def _make_room(self) -> None:
        once = len(self.t1) + len(self.b1)
        total = once + len(self.t2) + len(self.b2)
        if once == self.slots:
            if len(self.t1) < self.slots:
                self.b1.popitem(last=False)
                self._replace(from_b2=False)
            else:
                self.evictions[self.t1.popitem(last=False)[0]] += 1
        elif total >= self.slots:
            if total == 2 * self.slots:
                self.b2.popitem(last=False)
            self._replace(from_b2=False)

    def _replace(self, from_b2: bool) -> None:
        n = len(self.t1)
        source, ghosts = self.t2, self.b2
        if n > 0 and (n > self.p or (from_b2 and n == self.p)):
            source, ghosts = self.t1, self.b1
        victim = source.popitem(last=False)[0]
        ghosts[victim] = None
        self.evictions[victim] += 1


def replay_plain(
    tokens: list[Token], slots: int, policy: str, batched: bool, lookahead_tokens: int = 1
) -> tuple[Counter[int], Counter[int]]:
    """Hits and evictions of every object, from an empty cache.

    batched  all of a token is looked up first, and a first request is a hit while fewer than
             `slots` objects have been seen; else one after another, and a first request is a miss
    """
    memory = Memory(tokens, lookahead_tokens)
    plain = priorities(memory)
    cache = ArcCache(slots) if policy == "arc" else Cache(slots, memory, plain[policy])
    hits: Counter[int] = Counter()
    seen: set[int] = set()
    for memory.token, token in enumerate(tokens):
        if batched:
            hits.update(_batch_hits(token, cache.resident, seen, slots))
        for key in token:
            memory.now += 1
            if not batched and key in cache.resident:
                hits[key] += 1
            cache.use(key)
    return hits, cache.evictions


def _batch_hits(token: Token, resident: set[int], seen: set[int], slots: int) -> Iterable[int]:
    for key in token:
        if key in resident or (key not in seen and len(seen) < slots):
            yield key
        seen.add(key)


def fewest_misses(stream: list[int], slots: int) -> int:
    """The least number of misses of any policy that inserts every miss: all choices tried."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for key in stream:
        after: dict[frozenset[int], int] = {}
        for resident, misses in states.items():
            for state, cost in _choices(resident, key, slots):
                after[state] = min(after.get(state, misses + cost), misses + cost)
        states = after
    return min(states.values())


def _choices(
    resident: frozenset[int], key: int, slots: int
) -> Iterable[tuple[frozenset[int], int]]:
    if key in resident:
        yield resident, 0
    elif len(resident) < slots:
        yield resident | {key}, 1
    else:
        for victim in resident:
            yield (resident - {victim}) | {key}, 1
