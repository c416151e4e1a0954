"""Tune the grouped GEMM of the device at hand into tables that `tuning.choose_config` reads.

python -m moesim_kernels.bench.tune --out DIR --minutes M [--tries N]

Most valuable problems first; what a table of DIR already has is not tuned again. What happens is
told as JSON lines on stdout: `start`, `tuned`, `refused` (with the reason), `end`. Put DIR at
kernels/results/<device>/tuned, and benchmarks on that device take the tables from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch
from moesim_kernels.autotune import Tuned, Workload, candidates, tune
from moesim_kernels.bench.accelerator import Accelerator, this_gpu
from moesim_kernels.bench.gpu_experts import (
    ACTIVATIONS,
    FORMATS,
    Layer,
    Sizes,
    make_batch,
    make_layers,
    max_rel_err,
)
from moesim_kernels.bench.gpu_points import SHAPES, gpu_dtype, tokens_of
from moesim_kernels.bench.measured import CannotMeasure
from moesim_kernels.bench.points import ladder
from moesim_kernels.bench.routing import Ids, routed_ids, routing_of
from moesim_kernels.errors import KernelError
from moesim_kernels.grouped_gemm import compile_moe_ffn, moe_ffn
from moesim_kernels.tuning import Config, Problem, load_table, save_table

TOKENS_PER_EXPERT = (1, 64, 8, 256, 1024, 16, 2, 4, 32, 128, 512)
WEIGHTS = ("bf16", "int4", "fp8", "int8")
MOST_REL_ERR = 0.1  # above it a configuration is taken for broken; fp8 rounds its input twice
Tell = Callable[[dict[str, object]], None]


class OutOfTime(RuntimeError):
    """The time is over in the middle of a search."""


def problems() -> list[Sizes]:
    """What is worth tuning, most valuable first; shapes of one kind follow each other.

    The order matters: a compiled configuration serves all shapes of equal top-k.
    """
    found = {}
    for per_expert, weights in ladder(TOKENS_PER_EXPERT, WEIGHTS):
        dtype = ACTIVATIONS[str(gpu_dtype(weights)["a"])]
        for hidden, inter, n_experts, topk in SHAPES:
            tokens = tokens_of(per_expert, n_experts, topk)
            sizes = Sizes(tokens, hidden, inter, n_experts, topk, FORMATS[weights], dtype)
            found[sizes] = None
    return list(found)


def tune_all(
    wanted: Sequence[Sizes], gpu: Accelerator, out: Path, tries: int, minutes: float, tell: Tell
) -> dict[str, int]:
    """Tune problem after problem into tables in `out`, until the time is over.

    tries    configurations timed per problem, the untuned default among them
    tell     is told each event, a dict with `event`
    returns  how many were tuned, refused, found in a table, left for want of time
    """
    deadline = time.monotonic() + 60 * minutes
    count = {"tuned": 0, "refused": 0, "reused": 0, "left": 0}
    tell({"event": "start", "problems": len(wanted), "minutes": minutes})
    for sizes in wanted:
        path = out / problem_of(sizes, gpu).file_name()
        table = load_table(path) if path.exists() else {}
        if sizes.tokens in table:
            count["reused"] += 1
            continue
        try:
            found = tune_one(sizes, gpu, tries, deadline)
        except OutOfTime:
            count["left"] += 1
            continue
        except (RuntimeError, KernelError) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            count["refused"] += 1
            tell({"event": "refused", "table": path.name, "tokens": sizes.tokens, "why": why})
            if "CUDA error" in why:  # nothing on this device works after it
                raise
            continue
        save_table(path, table | {sizes.tokens: found.config})
        count["tuned"] += 1
        tell({"event": "tuned", "table": path.name, "tokens": sizes.tokens, **_facts(found)})
    tell({"event": "end", **count})
    return count


def tune_one(sizes: Sizes, gpu: Accelerator, tries: int, deadline: float | None = None) -> Tuned:
    """The quickest of `tries` configurations of the layer, with balanced routing and cold weights.

    deadline  of time.monotonic, after which OutOfTime is raised
    raises    KernelError when all are refused or the quickest computes something else
    """
    _within(deadline)
    ids = routed_ids(sizes.tokens, sizes.experts, sizes.topk, "balanced", 0)
    busy_bytes = routing_of(ids, sizes.experts)["distinct"] * sizes.expert_bytes()
    layers = make_layers(sizes, busy_bytes, gpu)
    workload = Workload(ids.size, sizes.experts, sizes.weight_format)
    configs = candidates(workload, tries)
    with torch.inference_mode():
        _compile_ahead(configs, sizes, ids, gpu, layers[0])

        def time_s(config: Config) -> float:
            _within(deadline)
            timed, _ = gpu.time(_calls(sizes, ids, gpu, layers, config), True)
            return median(timed.seconds)

        found = tune(configs, time_s)
        batch = make_batch(sizes, torch.from_numpy(ids), gpu, found.config)
        y = _calls(sizes, ids, gpu, layers[:1], found.config)[0]()
        error = max_rel_err(y, batch, layers[0])
    if error > MOST_REL_ERR:
        raise KernelError(f"{found.config} is wrong by {error}")
    return found


def problem_of(sizes: Sizes, gpu: Accelerator) -> Problem:
    """The key of the table that a problem belongs to."""
    name = str(gpu.facts["name"])
    return Problem(sizes.experts, sizes.inter, name, sizes.weight_format)


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 2 could not run."""
    asked = _parser().parse_args(arguments)
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
        with this_gpu() as gpu:
            tune_all(problems(), gpu, asked.out, asked.tries, asked.minutes, _tell_stdout)
    except (CannotMeasure, KernelError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _calls(
    sizes: Sizes, ids: Ids, gpu: Accelerator, layers: Sequence[Layer], config: Config
) -> list[Callable[[], torch.Tensor]]:
    batch = make_batch(sizes, torch.from_numpy(ids), gpu, config)
    return [
        lambda layer=layer: moe_ffn(batch.x, layer.gate_up, layer.down, batch.routed, config)
        for layer in layers
    ]


def _compile_ahead(
    configs: Sequence[Config], sizes: Sizes, ids: Ids, gpu: Accelerator, layer: Layer
) -> None:
    """Compile on all cores; what fails here fails again, and is counted, when it is timed."""
    import triton

    if triton.knobs.runtime.interpret or not hasattr(triton, "AsyncCompileMode"):
        return
    batch = make_batch(sizes, torch.from_numpy(ids), gpu, configs[0])
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
        triton.AsyncCompileMode(threads, ignore_errors=True),
    ):
        for config in configs:
            compile_moe_ffn(batch.x, layer.gate_up, layer.down, batch.routed, config)


def _within(deadline: float | None) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise OutOfTime


def _facts(found: Tuned) -> dict[str, object]:
    return {
        "us": round(found.seconds * 1e6, 2), "tried": found.n_tried, "failed": found.n_refused,
        **found.config.to_json(),
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moesim_kernels.bench.tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tries", type=int, default=24, help="configurations per problem")
    return parser


def _tell_stdout(event: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
