"""The compiled loop of `batches.py`: arrays in, arrays out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from traces.compiled import compiled

Rows = npt.NDArray[np.int64]


@compiled
def lock_step(size: Rows, offset: Rows, start: Rows, rows: Rows) -> int:
    """Fills rows int64[steps, slots] with token numbers; every slot runs one request at a time.

    start, size  int64[requests], tokens of request r are start[r]:start[r] + size[r]
    offset       int64[runs], token of its request that each run begins with, wrapping round; run i
                 is of request i % requests. Slots take runs in order; at the same step the lower
                 slot first
    returns      steps filled: all, or those before the first slot for which no run is left
    """
    n_steps, n_slots = rows.shape
    n_requests = len(size)
    run = np.full(n_slots, -1, np.int64)
    done = np.zeros(n_slots, np.int64)
    served = 0
    for step in range(n_steps):
        for slot in range(n_slots):
            if run[slot] < 0 or done[slot] == size[run[slot] % n_requests]:
                if served == len(offset):
                    return int(step)
                run[slot] = served
                done[slot] = 0
                served += 1
            request = run[slot] % n_requests
            token = (offset[run[slot]] + done[slot]) % size[request]
            rows[step, slot] = start[request] + token
            done[slot] += 1
    return int(n_steps)
