"""All-to-all between processes of this machine: on gloo over loopback, on NCCL between GPUs.

Each rank runs `python -m moesim_kernels.bench.alltoall BACKEND RANK RANKS STORE`: a line of JSON
in on stdin asks for one measurement, a line of JSON out on stdout answers it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from moesim_kernels.bench import timing
from moesim_kernels.bench.measured import CannotMeasure, CannotMeasurePoint, Measured
from moesim_kernels.bench.points import MIB, Point

TO_LAST = {"even": 1.0, "uneven": 1.5}  # what the last rank gets, as a multiple of an even share
PATIENCE = timedelta(seconds=60)  # of a rank that waits for another
WARM_UPS = 2


class Ranks:
    """Processes that wait for work; close() ends them.

    backend  "gloo" on the CPU, or "nccl" with one GPU a rank
    raises   CannotMeasure for nccl with fewer than two GPUs, CannotMeasurePoint with too few
    """

    def __init__(self, backend: str = "gloo", n: int = 2) -> None:
        if backend == "nccl":
            _check_gpus(n)
        self.backend, self.n = backend, n
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        environment.pop("NCCL_DEBUG", None)  # it writes to stdout
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, backend, str(rank), str(n), str(store)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True, env=environment,
            )
            for rank in range(n)
        ]  # fmt: skip

    def ask(self, question: dict[str, object]) -> list[list[float]]:
        """Each rank's answer to one line of JSON; CannotMeasure when a rank has ended."""
        try:
            for rank in self._ranks:
                rank.stdin.write(json.dumps(question) + "\n")
                rank.stdin.flush()
            return [json.loads(rank.stdout.readline()) for rank in self._ranks]
        except (BrokenPipeError, json.JSONDecodeError) as error:
            raise CannotMeasure(
                f"{self.backend} does not work between {self.n} processes here"
            ) from error

    def close(self) -> None:
        """End all ranks and wait for them."""
        for rank in self._ranks:
            rank.kill()
            rank.communicate()
        self._folder.cleanup()


def exchange(point: Point, ranks: Ranks) -> Measured:
    """Each rank holds `bytes`; the last rank gets TO_LAST even shares of each, the others the rest.

    The bytes of the row are those of the busiest direction of the busiest rank.
    """
    n_bytes = int(point.shape["bytes"])
    sent = sizes(n_bytes, ranks.n, str(point.shape["split"]))
    repetitions = max(7, min(60, 64 * MIB // n_bytes))
    answers = ranks.ask({"sent": sent, "repetitions": repetitions})
    slowest = timing.Timed([max(of_all) for of_all in zip(*answers, strict=True)])
    method = {"repetitions_start": "after a barrier", "seconds_of": "the slowest rank"}
    source = f"torch.{ranks.backend}.all_to_all_single"
    return Measured(slowest, source, busiest(sent), 0, method, device=_device(ranks.backend))


def sizes(n_bytes: int, n_ranks: int, split: str) -> list[int]:
    """Bytes that a rank sends to each rank, itself included."""
    last = int(n_bytes * TO_LAST[split] / n_ranks)
    each, more = divmod(n_bytes - last, n_ranks - 1)
    return [each + (rank < more) for rank in range(n_ranks - 1)] + [last]


def busiest(sent: Sequence[int]) -> int:
    """Most bytes that one rank sends to, or gets from, the others."""
    return max(max(own * (len(sent) - 1), sum(sent) - own) for own in sent)


def _check_gpus(n: int) -> None:
    import torch

    found = torch.cuda.device_count()
    if found < 2:
        raise CannotMeasure("NCCL needs more than one GPU")
    if found < n:
        raise CannotMeasurePoint(f"{n} ranks need {n} GPUs, found {found}")


def _device(backend: str) -> dict[str, object]:
    if backend == "gloo":
        return timing.cpu()
    from moesim_kernels.bench.accelerator import gpu_facts

    return gpu_facts()


def _serve(backend: str, rank: int, n_ranks: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=n_ranks, timeout=PATIENCE
    )
    for line in sys.stdin:
        asked = json.loads(line)
        taken = _repeat(backend == "nccl", rank, asked["sent"], asked["repetitions"])
        sys.stdout.write(json.dumps(taken) + "\n")
        sys.stdout.flush()


def _repeat(on_gpu: bool, rank: int, sent: list[int], repetitions: int) -> list[float]:
    import torch
    import torch.distributed as dist

    device = f"cuda:{rank}" if on_gpu else "cpu"
    received = [sent[rank]] * len(sent)
    source = torch.zeros(sum(sent), dtype=torch.uint8, device=device)
    target = torch.zeros(sum(received), dtype=torch.uint8, device=device)
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    taken = []
    for _ in range(repetitions + WARM_UPS):
        dist.barrier(device_ids=[rank] if on_gpu else None)
        wait()
        started = time.perf_counter()
        dist.all_to_all_single(target, source, received, sent)
        wait()
        taken.append(time.perf_counter() - started)
    return taken[WARM_UPS:]


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
