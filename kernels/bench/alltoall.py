"""All-to-all on gloo between two processes of this machine, over loopback.

The two ranks run `python -m moesim_kernels.bench.alltoall RANK STORE`: a line of JSON in on
stdin asks for one measurement, a line of JSON out on stdout answers it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moesim_kernels.bench import timing
from moesim_kernels.bench.measured import CannotMeasure, Measured
from moesim_kernels.bench.points import MIB, Point

N_RANKS = 2
SHARES = {"even": 0.5, "uneven": 0.75}


class Pair:
    """Two ranks that wait for work; close() ends them."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, str(rank), str(store)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True, env=environment,
            )
            for rank in range(N_RANKS)
        ]  # fmt: skip

    def ask(self, question: dict[str, object]) -> list[list[float]]:
        """Each rank's answer to one line of JSON; CannotMeasure when a rank has ended."""
        try:
            for rank in self._ranks:
                rank.stdin.write(json.dumps(question) + "\n")
                rank.stdin.flush()
            return [json.loads(rank.stdout.readline()) for rank in self._ranks]
        except (BrokenPipeError, json.JSONDecodeError) as error:
            raise CannotMeasure("gloo does not work between two processes here") from error

    def close(self) -> None:
        """End both ranks and wait for them."""
        for rank in self._ranks:
            rank.kill()
            rank.communicate()
        self._folder.cleanup()


def exchange(point: Point, pair: Pair) -> Measured:
    """Each rank holds `bytes`; rank 1 gets the share of SHARES of both, rank 0 the rest."""
    n_bytes = int(point.shape["bytes"])
    to_last = int(n_bytes * SHARES[str(point.shape["split"])])
    repetitions = max(7, min(60, 64 * MIB // n_bytes))
    answers = pair.ask({"bytes": n_bytes, "to_last": to_last, "repetitions": repetitions})
    slowest = timing.Timed([max(both) for both in zip(*answers, strict=True)])
    method = {"repetitions_start": "after a barrier", "seconds_of": "the slower rank"}
    busiest_direction = max(to_last, n_bytes - to_last)
    return Measured(slowest, "torch.gloo.all_to_all_single", busiest_direction, 0, method)


def _serve(rank: int, store: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=N_RANKS)
    for line in sys.stdin:
        asked = json.loads(line)
        taken = _repeat(rank, asked["bytes"], asked["to_last"], asked["repetitions"])
        sys.stdout.write(json.dumps(taken) + "\n")
        sys.stdout.flush()


def _repeat(rank: int, n_bytes: int, to_last: int, repetitions: int) -> list[float]:
    import torch
    import torch.distributed as dist

    sent = [n_bytes - to_last, to_last]
    received = [sent[rank]] * N_RANKS
    source = torch.zeros(n_bytes, dtype=torch.uint8)
    target = torch.zeros(sum(received), dtype=torch.uint8)
    taken = []
    for _ in range(repetitions + 2):
        dist.barrier()
        started = time.perf_counter()
        dist.all_to_all_single(target, source, received, sent)
        taken.append(time.perf_counter() - started)
    return taken[2:]


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2])
