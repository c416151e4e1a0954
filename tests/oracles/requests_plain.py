"""The scheduler of streamed requests as plain Python, the specification of the compiled loop."""

from __future__ import annotations

from collections import deque

from moesim.lower.streamed_requests import Scheduler


def plain_schedule(
    prompt: list[int], output: list[int], scheduler: Scheduler
) -> tuple[list[tuple[int, int, int, int]], list[int], int]:
    """Rows (decoded, prefilled, pages, KV tokens), iteration of each end, preemptions."""
    queue = deque(range(len(prompt)))
    made, pages = [0] * len(prompt), [0] * len(prompt)
    running: list[int] = []
    rows: list[tuple[int, int, int, int]] = []
    ends, preempted, credit, decoding = [-1] * len(prompt), 0, 0.0, False

    def length(r: int) -> int:
        return prompt[r] + made[r]

    def free() -> int:
        return scheduler.n_pages - sum(pages)

    def needed(tokens: int) -> int:
        return -(-tokens // scheduler.page_tokens)

    while min(ends, default=0) < 0:
        decoded = prefilled = at = 0
        while at < len(running) and (decoding or not scheduler.phases_apart):
            r = running[at]
            if needed(length(r) + 1) > pages[r]:
                while not free() and pages[r]:
                    newest = running.pop()
                    pages[newest] = 0
                    queue.appendleft(newest)
                    preempted += 1
                if not pages[r]:
                    break
                pages[r] += 1
            made[r] += 1
            decoded += 1
            at += 1
        old, credit = len(running), credit + scheduler.per_iteration
        while queue and not (scheduler.phases_apart and decoding):
            r = queue[0]
            held = needed(prompt[r] + output[r] if scheduler.phases_apart else length(r))
            full = decoded + prefilled + length(r) > scheduler.most_tokens or held > free()
            if full or (scheduler.per_iteration and credit < 1):
                break
            credit -= bool(scheduler.per_iteration)
            queue.popleft()
            pages[r] = held
            prefilled += length(r)
            running.append(r)
        if scheduler.phases_apart and not prefilled:
            decoding = True
        resident = sum(length(r) for r in running)
        if decoded + prefilled:
            rows.append((decoded, prefilled, sum(pages), resident))
        for r in [r for i, r in enumerate(running) if i < old and made[r] == output[r]]:
            ends[r], pages[r] = len(rows) - 1, 0
            running.remove(r)
        decoding = decoding and bool(running)
    return rows, ends, preempted
