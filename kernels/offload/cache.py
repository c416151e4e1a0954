"""The slots of one layer: which expert is in which, and who leaves; books only, no weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class LruSlots:
    """Slots first .. first + n - 1; the expert longest unused leaves, never one of those asked for.

    Law: an expert is in one slot, a slot holds one expert.
    """

    def __init__(self, first: int, n: int) -> None:
        self._free = list(range(first + n - 1, first - 1, -1))
        self._slot: dict[int, int] = {}  # of each resident expert, longest unused first

    def __contains__(self, expert: int) -> bool:
        return expert in self._slot

    def slot(self, expert: int) -> int:
        """Where a resident expert is."""
        return self._slot[expert]

    def touch(self, experts: Iterable[int]) -> None:
        """These were used now, the last of them last."""
        for expert in experts:
            self._slot[expert] = self._slot.pop(expert)

    def bring(self, experts: Sequence[int]) -> list[tuple[int, int]]:
        """Make experts resident, at most as many as there are slots.

        returns  (expert, slot) of those that must be read, in the order given; they count as used
        """
        missing = [expert for expert in experts if expert not in self._slot]
        for expert in missing:
            self._slot[expert] = self._free.pop() if self._free else self._evict(experts)
        return [(expert, self._slot[expert]) for expert in missing]

    def resident(self) -> list[tuple[int, int]]:
        """(expert, slot) of all resident experts, longest unused first."""
        return list(self._slot.items())

    def _evict(self, keep: Sequence[int]) -> int:
        victim = next(expert for expert in self._slot if expert not in keep)
        return self._slot.pop(victim)
