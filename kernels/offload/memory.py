"""Memory: how much is free, and stretches of it that are good to read into."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from moesim_kernels.errors import KernelError

PAGE_BYTES = 4096  # what O_DIRECT wants places, sizes and memory to be a multiple of
HUGE_PAGE_BYTES = 2 << 20
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def touched_memory(n_bytes: int) -> memoryview:
    """Zeros of our own, every page in place, at the start of a huge page.

    They lie on huge pages where the system has them: a direct read into scattered small pages
    takes up to three times as long as into a contiguous stretch, and differs from place to place.
    """
    memory = mmap.mmap(-1, n_bytes + HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    first = -address % HUGE_PAGE_BYTES
    whole = memoryview(memory)[first : first + n_bytes]
    np.frombuffer(whole, np.uint8)[::PAGE_BYTES] = 0
    return whole


def huge_pages() -> str:
    """When the system gives huge pages: "always", "madvise" (as asked here), "never" or ""."""
    text = HUGE_PAGES.read_text(encoding="utf-8") if HUGE_PAGES.exists() else "[]"
    return text[text.index("[") + 1 : text.index("]")]


def require_memory(n_bytes: int, what: str) -> None:
    """Refuse what does not fit into the memory that is free."""
    free = available_bytes()
    if n_bytes > free:
        raise KernelError(f"{what}: {n_bytes} bytes, {free} bytes of memory are free")


def available_bytes(facts: Path = Path("/proc/meminfo")) -> int:
    """Memory that can be had without swapping; all there is where the system does not say."""
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    if found:
        return int(found[0]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
