"""Compiled loops of cache replay: arrays in, arrays out, one function a policy.

Every function replays `stream` from an empty cache of `capacity` slots and returns
(hits, evictions), both int64[n_objects]. They share these arguments:

stream     int32[requests], object ids 0..n_objects-1
token_end  int64[tokens], where each token's requests end in stream
batched    True: all requests of a token are looked up before any of them changes the cache, and
           the first request ever of an object is a hit while fewer than `capacity` objects have
           been seen; False: one after another, a first request is a miss

The rules in plain Python are `tests/oracles/replay_plain.py`; a property test holds both equal.
`place[object]` is >= 0 exactly when the object is resident, in every kernel.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from traces.compiled import compiled

Ints: TypeAlias = npt.NDArray[np.int32]
Longs: TypeAlias = npt.NDArray[np.int64]
Counts: TypeAlias = tuple[Longs, Longs]
Heap: TypeAlias = tuple[Longs, Ints, Ints]
Links: TypeAlias = tuple[Ints, Ints]

_ABSENT = -1
_T1, _T2, _B1, _B2 = 0, 1, 2, 3
_GHOST_B1, _GHOST_B2 = -2, -3
_SHIFT = 32  # keys are (count << 32) | time: counts and times stay below 2**31


@compiled
def next_use(stream: Ints, n_objects: int) -> Ints:
    """Index of the next request for the same object, or len(stream) when there is none."""
    n = len(stream)
    upcoming = np.full(n_objects, n, np.int32)
    result = np.empty(n, np.int32)
    for i in range(n - 1, -1, -1):
        result[i] = upcoming[stream[i]]
        upcoming[stream[i]] = i
    return result


@compiled
def count_requests(stream: Ints, n_objects: int) -> Longs:
    """How often each object is asked for: int64[n_objects]."""
    requests = np.zeros(n_objects, np.int64)
    for key in stream:
        requests[key] += 1
    return requests


@compiled
def fifo(stream: Ints, token_end: Longs, capacity: int, n_objects: int, batched: bool) -> Counts:
    """First in, first out: the oldest insertion leaves; hits change nothing."""
    hits, evictions = np.zeros(n_objects, np.int64), np.zeros(n_objects, np.int64)
    place, seen = np.full(n_objects, _ABSENT, np.int32), np.zeros(n_objects, np.bool_)
    queue = np.full(capacity, _ABSENT, np.int32)
    n_seen, oldest, start = 0, 0, 0
    for token in range(len(token_end)):
        end = token_end[token]
        if batched:
            n_seen = _look_up(stream[start:end], place, seen, n_seen, capacity, hits)
        for i in range(start, end):
            key = stream[i]
            if place[key] >= 0:
                if not batched:
                    hits[key] += 1
                continue
            victim = queue[oldest]
            if victim != _ABSENT:
                place[victim] = _ABSENT
                evictions[victim] += 1
            queue[oldest] = key
            place[key] = oldest
            oldest = oldest + 1 if oldest + 1 < capacity else 0
        start = end
    return hits, evictions


@compiled
def lru(stream: Ints, token_end: Longs, capacity: int, n_objects: int, batched: bool) -> Counts:
    """Least recently used: the longest unused leaves. A ring of objects, newest after the root."""
    hits, evictions = np.zeros(n_objects, np.int64), np.zeros(n_objects, np.int64)
    seen = np.zeros(n_objects, np.bool_)
    links = _empty_lists(n_objects, 1)
    place, root = links[0], n_objects
    n_seen, used, start = 0, 0, 0
    for token in range(len(token_end)):
        end = token_end[token]
        if batched:
            n_seen = _look_up(stream[start:end], place, seen, n_seen, capacity, hits)
        for i in range(start, end):
            key = stream[i]
            if place[key] >= 0:
                if not batched:
                    hits[key] += 1
                _unlink(links, key)
            elif used < capacity:
                used += 1
            else:
                evictions[_pop_oldest(links, root)] += 1
            _push_newest(links, root, key)
        start = end
    return hits, evictions


@compiled
def lfu(
    stream: Ints, token_end: Longs, capacity: int, n_objects: int, batched: bool, history: bool
) -> Counts:
    """Least frequently used; ties go to the least recently used.

    history  False: an object's count restarts at 1 when it comes back; True: it never forgets
    """
    hits, evictions = np.zeros(n_objects, np.int64), np.zeros(n_objects, np.int64)
    seen, count = np.zeros(n_objects, np.bool_), np.zeros(n_objects, np.int64)
    heap = _empty_heap(capacity, n_objects)
    place = heap[2]
    n_seen, used, start = 0, 0, 0
    for token in range(len(token_end)):
        end = token_end[token]
        if batched:
            n_seen = _look_up(stream[start:end], place, seen, n_seen, capacity, hits)
        for i in range(start, end):
            key = stream[i]
            resident = place[key] >= 0
            if resident and not batched:
                hits[key] += 1
            count[key] = count[key] + 1 if resident or history else 1
            used = _put(heap, used, key, (count[key] << _SHIFT) | i, evictions)
        start = end
    return hits, evictions


@compiled
def belady(stream: Ints, token_end: Longs, capacity: int, n_objects: int, batched: bool) -> Counts:
    """The object whose next request is farthest leaves; of those without one, the least recent."""
    hits, evictions = np.zeros(n_objects, np.int64), np.zeros(n_objects, np.int64)
    seen = np.zeros(n_objects, np.bool_)
    upcoming = next_use(stream, n_objects)
    heap = _empty_heap(capacity, n_objects)
    place, never = heap[2], len(stream)
    n_seen, used, start = 0, 0, 0
    for token in range(len(token_end)):
        end = token_end[token]
        if batched:
            n_seen = _look_up(stream[start:end], place, seen, n_seen, capacity, hits)
        for i in range(start, end):
            key = stream[i]
            if place[key] >= 0 and not batched:
                hits[key] += 1
            distance = 2 * never - i
            if upcoming[i] < never:
                distance = upcoming[i]
            used = _put(heap, used, key, -distance, evictions)
        start = end
    return hits, evictions


@compiled
def segment(
    stream: Ints, token_end: Longs, capacity: int, n_objects: int, batched: bool, lookahead: int
) -> Counts:
    """Fewest requests left in the window of `lookahead` tokens leaves; ties to the least recent.

    The window of a token begins with the token itself; its requests leave the window as they
    are served. source: segment cache of arXiv 2505.16056
    """
    hits, evictions = np.zeros(n_objects, np.int64), np.zeros(n_objects, np.int64)
    seen, ahead = np.zeros(n_objects, np.bool_), np.zeros(n_objects, np.int64)
    last = np.zeros(n_objects, np.int64)
    heap = _empty_heap(capacity, n_objects)
    place, n_tokens = heap[2], len(token_end)
    n_seen, used, start, entered = 0, 0, 0, 0
    for token in range(n_tokens):
        end = token_end[token]
        window_end = token_end[min(token + lookahead, n_tokens) - 1]
        for i in range(entered, window_end):
            key = stream[i]
            ahead[key] += 1
            if place[key] >= 0:
                used = _put(heap, used, key, (ahead[key] << _SHIFT) | last[key], evictions)
        entered = window_end
        if batched:
            n_seen = _look_up(stream[start:end], place, seen, n_seen, capacity, hits)
        for i in range(start, end):
            key = stream[i]
            if place[key] >= 0 and not batched:
                hits[key] += 1
            ahead[key] -= 1
            last[key] = i
            used = _put(heap, used, key, (ahead[key] << _SHIFT) | i, evictions)
        start = end
    return hits, evictions


@compiled
def arc(stream: Ints, token_end: Longs, capacity: int, n_objects: int, batched: bool) -> Counts:
    """Adaptive replacement cache. source: Megiddo and Modha, FAST 2003, figure 4 (real-valued p).

    T1 and T2 hold resident objects seen once and more often, B1 and B2 the ghosts of each.
    """
    hits, evictions = np.zeros(n_objects, np.int64), np.zeros(n_objects, np.int64)
    place, seen = np.full(n_objects, _ABSENT, np.int32), np.zeros(n_objects, np.bool_)
    links, size = _empty_lists(n_objects, 4), np.zeros(4, np.int64)
    n_seen, start, target = 0, 0, 0.0
    for token in range(len(token_end)):
        end = token_end[token]
        if batched:
            n_seen = _look_up(stream[start:end], place, seen, n_seen, capacity, hits)
        for i in range(start, end):
            key = stream[i]
            was = place[key]
            if was >= 0:
                if not batched:
                    hits[key] += 1
                _unlink(links, key)
                size[was] -= 1
            elif was == _GHOST_B1:
                target = min(target + max(size[_B2] / size[_B1], 1.0), float(capacity))
                _arc_replace(links, size, place, target, False, evictions)
                _unlink(links, key)
                size[_B1] -= 1
            elif was == _GHOST_B2:
                target = max(target - max(size[_B1] / size[_B2], 1.0), 0.0)
                _arc_replace(links, size, place, target, True, evictions)
                _unlink(links, key)
                size[_B2] -= 1
            else:
                _arc_make_room(links, size, place, target, capacity, evictions)
            into = _T1 if was == _ABSENT else _T2
            _push_newest(links, n_objects + into, key)
            size[into] += 1
            place[key] = into
        start = end
    return hits, evictions


@compiled
def _arc_make_room(
    links: Links, size: Longs, place: Ints, target: float, capacity: int, evictions: Longs
) -> None:
    """Case IV of the paper: room for an object in none of the four lists."""
    first = len(place)
    if size[_T1] + size[_B1] == capacity:
        if size[_T1] < capacity:
            place[_pop_oldest(links, first + _B1)] = _ABSENT
            size[_B1] -= 1
            _arc_replace(links, size, place, target, False, evictions)
        else:
            victim = _pop_oldest(links, first + _T1)
            place[victim] = _ABSENT
            size[_T1] -= 1
            evictions[victim] += 1
    elif size.sum() >= capacity:
        if size.sum() == 2 * capacity:
            place[_pop_oldest(links, first + _B2)] = _ABSENT
            size[_B2] -= 1
        _arc_replace(links, size, place, target, False, evictions)


@compiled
def _arc_replace(
    links: Links, size: Longs, place: Ints, target: float, from_b2: bool, evictions: Longs
) -> None:
    """Subroutine REPLACE of the paper: one resident object becomes a ghost."""
    first = len(place)
    if size[_T1] > 0 and (size[_T1] > target or (from_b2 and size[_T1] == target)):
        source, ghosts, mark = _T1, _B1, _GHOST_B1
    else:
        source, ghosts, mark = _T2, _B2, _GHOST_B2
    victim = _pop_oldest(links, first + source)
    _push_newest(links, first + ghosts, victim)
    size[source] -= 1
    size[ghosts] += 1
    place[victim] = mark
    evictions[victim] += 1


@compiled
def _look_up(
    requests: Ints, place: Ints, seen: npt.NDArray[Any], n_seen: int, capacity: int, hits: Longs
) -> int:
    """Count the hits of one token against the cache as it stands; returns objects seen so far."""
    for key in requests:
        if place[key] >= 0 or (not seen[key] and n_seen < capacity):
            hits[key] += 1
        if not seen[key]:
            seen[key] = True
            n_seen += 1
    return n_seen


@compiled
def _empty_lists(n_objects: int, n_lists: int) -> Links:
    """Rings of objects as (newer-to-older, older-to-newer); ring j has the root n_objects + j."""
    after = np.full(n_objects + n_lists, _ABSENT, np.int32)
    before = np.full(n_objects + n_lists, _ABSENT, np.int32)
    for root in range(n_objects, n_objects + n_lists):
        after[root] = root
        before[root] = root
    return after, before


@compiled
def _unlink(links: Links, key: int) -> None:
    after, before = links
    after[before[key]] = after[key]
    before[after[key]] = before[key]


@compiled
def _push_newest(links: Links, root: int, key: int) -> None:
    after, before = links
    newest = after[root]
    after[key] = newest
    before[key] = root
    before[newest] = key
    after[root] = key


@compiled
def _pop_oldest(links: Links, root: int) -> int:
    after, before = links
    oldest: int = before[root]
    _unlink(links, oldest)
    after[oldest] = _ABSENT
    return oldest


@compiled
def _empty_heap(capacity: int, n_objects: int) -> Heap:
    """Binary min-heap as (key of each node, object of each node, node of each object)."""
    keys, objects = np.zeros(capacity, np.int64), np.zeros(capacity, np.int32)
    return keys, objects, np.full(n_objects, _ABSENT, np.int32)


@compiled
def _put(heap: Heap, used: int, key: int, priority: int, evictions: Longs) -> int:
    """Insert an object or change its priority; the lowest leaves a full heap. Returns its size."""
    keys, objects, place = heap
    node = place[key]
    if node >= 0:
        if priority < keys[node]:
            _rise(heap, node, key, priority)
        else:
            _sink(heap, used, node, key, priority)
        return used
    if used < len(keys):
        _rise(heap, used, key, priority)
        return used + 1
    victim = objects[0]
    place[victim] = _ABSENT
    evictions[victim] += 1
    _sink(heap, used, 0, key, priority)
    return used


@compiled
def _rise(heap: Heap, node: int, key: int, priority: int) -> None:
    keys, objects, place = heap
    while node > 0:
        parent = (node - 1) >> 1
        if keys[parent] <= priority:
            break
        keys[node] = keys[parent]
        objects[node] = objects[parent]
        place[objects[node]] = node
        node = parent
    keys[node] = priority
    objects[node] = key
    place[key] = node


@compiled
def _sink(heap: Heap, used: int, node: int, key: int, priority: int) -> None:
    keys, objects, place = heap
    child = 2 * node + 1
    while child < used:
        if child + 1 < used and keys[child + 1] < keys[child]:
            child += 1
        if keys[child] >= priority:
            break
        keys[node] = keys[child]
        objects[node] = objects[child]
        place[objects[node]] = node
        node = child
        child = 2 * node + 1
    keys[node] = priority
    objects[node] = key
    place[key] = node
