"""The slow tier: where experts wait, and the slots in fast memory that they are read into.

`direct` reads the file past the page cache, `buffered` through it (and drops what it read),
`mapped` copies from a file held in memory, `pinned` copies from pinned memory to a GPU.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from moesim_kernels.errors import KernelError
from moesim_kernels.offload.memory import PAGE_BYTES, require_memory, touched_memory
from moesim_kernels.offload.stack import DTYPES, Stack, Weights, fill

KINDS = ("auto", "direct", "buffered", "mapped", "pinned")
CPU = torch.device("cpu")


class Tier(Protocol):
    """A slow tier with slots in front of it.

    kind     which of KINDS reads, never "auto"
    device   where the slots are and experts compute
    weights  gate-and-up and down of each slot, whatever expert is in it
    """

    kind: str
    device: torch.device
    weights: Sequence[Weights]

    def read(self, layer: int, expert: int, slot: int) -> None:
        """Bring an expert into a slot; it is there when this returns."""

    def settle(self) -> None:
        """Wait for what was launched on the device."""

    def close(self) -> None:
        """Give back what is held."""


def open_tier(stack: Stack, n_slots: int, kind: str = "auto") -> Tier:
    """Slots, and the tier to fill them from.

    kind    one of KINDS; "auto" is `direct`, or `buffered` where the file system refuses that
    raises  KernelError for a kind that is unknown or that this machine does not have, and where
            memory is too small
    """
    require_kind(kind)
    if kind == "pinned":
        return PinnedTier(stack, n_slots, torch.device("cuda"))
    if kind == "mapped":
        return MappedTier(stack, n_slots)
    direct = kind != "buffered" and _reads_direct(stack)
    if kind == "direct" and not direct:
        raise KernelError("tier='direct': the file system refuses O_DIRECT")
    return FileTier(stack, n_slots, direct=direct)


def require_kind(kind: str) -> None:
    """Refuse what is none of KINDS, and `pinned` without a GPU."""
    if kind not in KINDS:
        raise KernelError(f"tier={kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "pinned" and not torch.cuda.is_available():
        raise KernelError("tier='pinned' needs a GPU, and there is none")


class HostSlots:
    """Slots in the memory of this machine, one behind the other, each at the start of a page."""

    def __init__(self, stack: Stack, n_slots: int) -> None:
        spec, size = stack.spec, stack.spec.expert_bytes
        require_memory(n_slots * size, f"{n_slots} slots")
        whole = touched_memory(n_slots * size)
        self.views = [whole[slot * size : (slot + 1) * size] for slot in range(n_slots)]
        flat = [torch.frombuffer(view, dtype=DTYPES[spec.dtype]) for view in self.views]
        self.weights = [spec.expert(of_slot) for of_slot in flat]


class FileTier:
    """Experts in a file on disk."""

    device = CPU

    def __init__(self, stack: Stack, n_slots: int, *, direct: bool) -> None:
        self.kind = "direct" if direct else "buffered"
        self._spec = stack.spec
        self._descriptor = stack.descriptor
        if direct and stack.direct is not None:
            self._descriptor = stack.direct
        self._slots = HostSlots(stack, n_slots)
        self.weights: Sequence[Weights] = self._slots.weights
        if not direct:
            _forget(self._descriptor, 0, 0)

    def read(self, layer: int, expert: int, slot: int) -> None:
        """Read a whole expert; where the page cache takes part, drop it from there."""
        place = self._spec.offset(layer, expert)
        fill(self._descriptor, self._slots.views[slot], place)
        if self.kind == "buffered":
            _forget(self._descriptor, place, self._spec.expert_bytes)

    def settle(self) -> None:
        """Nothing runs behind the back of a CPU."""

    def close(self) -> None:
        """The slots go when nobody looks at them any more."""


class MappedTier:
    """Experts in a file that is held in memory; a read is a copy."""

    kind, device = "mapped", CPU

    def __init__(self, stack: Stack, n_slots: int) -> None:
        spec = stack.spec
        require_memory(spec.file_bytes + n_slots * spec.expert_bytes, "all experts and the slots")
        self._spec = spec
        self._slots = HostSlots(stack, n_slots)
        self.weights: Sequence[Weights] = self._slots.weights
        self._targets = [np.frombuffer(view, np.uint8) for view in self._slots.views]
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        mapped = mmap.mmap(stack.descriptor, spec.file_bytes, flags, mmap.PROT_READ)
        self._experts = np.frombuffer(mapped, np.uint8).reshape(-1, spec.expert_bytes)
        self._experts[:, ::PAGE_BYTES].max()  # every page is touched once

    def read(self, layer: int, expert: int, slot: int) -> None:
        """Copy a whole expert."""
        np.copyto(self._targets[slot], self._experts[layer * self._spec.n_experts + expert])

    def settle(self) -> None:
        """Nothing runs behind the back of a CPU."""

    def close(self) -> None:
        """The mapping goes when nobody looks at it any more."""


class PinnedTier:
    """Experts in pinned memory, slots on a GPU; a read is a copy on a stream of its own.

    A read may overwrite a slot without asking who computes with it: the run settles the device
    before it decides what to read, so what was launched earlier has run by then.
    """

    kind = "pinned"

    def __init__(self, stack: Stack, n_slots: int, device: torch.device) -> None:
        spec, self.device = stack.spec, device
        on_gpu = device.type == "cuda"
        self._spec, self._host = spec, stack.in_memory(pinned=on_gpu)
        shape = (n_slots, spec.expert_bytes)
        self._slots = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.weights: Sequence[Weights] = [
            spec.expert(slot.view(DTYPES[spec.dtype])) for slot in self._slots
        ]
        self._stream = torch.cuda.Stream(device) if on_gpu else None

    def read(self, layer: int, expert: int, slot: int) -> None:
        """Copy a whole expert, and wait until it has arrived."""
        with self._on_stream():
            place = self._spec.offset(layer, expert)
            source = self._host[place : place + self._spec.expert_bytes]
            self._slots[slot].copy_(source, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()

    def settle(self) -> None:
        """Wait for the kernels launched so far; copies have a stream of their own."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).synchronize()

    def close(self) -> None:
        """The memory goes when nobody looks at it any more."""

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _reads_direct(stack: Stack) -> bool:
    """Whether one page can be read past the page cache: some file systems open, then refuse."""
    if stack.direct is None:
        return False
    try:
        with mmap.mmap(-1, PAGE_BYTES) as page:
            return os.preadv(stack.direct, [page], 0) == PAGE_BYTES
    except OSError:
        return False


def _forget(descriptor: int, place: int, n_bytes: int) -> None:
    """Ask the page cache to drop a part of a file; 0 bytes: all behind the place."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, place, n_bytes, os.POSIX_FADV_DONTNEED)
