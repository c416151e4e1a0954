"""Reads from the file system past the page cache (O_DIRECT), by block size and reads in flight."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from moesim_kernels.bench import timing
from moesim_kernels.bench.measured import CannotMeasure, Measured
from moesim_kernels.bench.points import MIB, Point

FILE_BYTES = 256 * MIB
BATCH_BYTES = 64 * MIB
MOST_READS = 256


class DirectFile:
    """A file of random bytes, opened past the page cache; it has no name, so none is left over.

    folder  on the file system to measure
    raises  CannotMeasure when that file system has no O_DIRECT or no room
    """

    def __init__(self, folder: Path, n_bytes: int = FILE_BYTES) -> None:
        self.n_bytes = n_bytes
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".read-") as file:
                _fill(file, n_bytes)
                self.descriptor = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            known = {errno.EINVAL: "the file system refuses O_DIRECT"}
            why = known.get(error.errno or 0, os.strerror(error.errno or 0))
            raise CannotMeasure(f"{folder}: {why}") from error

    def close(self) -> None:
        """Give the space back."""
        os.close(self.descriptor)


def read(point: Point, file: DirectFile) -> Measured:
    """A batch of reads at random aligned places, `depth` of them in flight at any time."""
    block, depth = int(point.shape["block_bytes"]), int(point.shape["depth"])
    n_reads = max(2 * depth, min(MOST_READS, BATCH_BYTES // block))
    rng = np.random.default_rng(0)
    places = [int(x) * block for x in rng.integers(0, file.n_bytes // block, n_reads)]
    buffers = [mmap.mmap(-1, block) for _ in range(depth)]
    with ThreadPoolExecutor(depth) as pool:

        def batch() -> float:
            jobs = [
                pool.submit(_read_all, file.descriptor, places[i::depth], buffers[i])
                for i in range(depth)
            ]
            return sum(job.result() for job in jobs)

        timed = timing.repeat(batch)
    per_read = timing.Timed([second / n_reads for second in timed.seconds], timed.disturbed)
    method = {"cache": "direct", "reads": n_reads, "latency_of": "one read, batch over reads"}
    return Measured(per_read, "preadv", block, 0, method)


def _fill(file: IO[bytes], n_bytes: int) -> None:
    piece = np.random.default_rng(0).bytes(4 * MIB)
    for _ in range(n_bytes // len(piece)):
        file.write(piece)
    file.flush()
    os.fsync(file.fileno())


def _read_all(descriptor: int, places: list[int], buffer: mmap.mmap) -> float:
    started = time.perf_counter()
    for place in places:
        if os.preadv(descriptor, [buffer], place) != len(buffer):
            raise OSError(errno.EIO, "short read")
    return time.perf_counter() - started
