"""FlexGen: block schedule with the shares of weights, cache and activations from a linear program.

The program is solved with the rates that FlexGen's authors fitted on a cloud T4; Mixtral's rows
come from the zig-zag schedule on the engine, with the policies that were run.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moesim.reproduce.claim import Claim, Tier
from moesim.reproduce.sources import Sources
from moesim.reproduce.streamed_runs import GIB, T4_MEMORY_BYTES, flexgen_run, l4_box, t4_box
from planners.flexgen import (
    FlexgenProblem,
    flexgen_capacity,
    flexgen_plan,
    flexgen_search,
    flexgen_terms,
)
from planners.streamed import LayerShape, Lengths, StreamedPolicy, layer_shape
from traces.models import load_model

NAME = "flexgen"
PAPER = "arXiv 2303.06865"

HOST_BYTES, DISK_BYTES = 208 * GIB, 1500 * GIB
LENGTHS = Lengths(512, 32)
GRID = 5  # steps of a share in the exhaustive check of the linear program
# MoE-Lightning's tables 4 and 5: box, prompt and output, batch and micro-batch, share of weights
# on the GPU (launch scripts of its artifact), tokens/s of FlexGen and of FlexGen(c).
ROWS = (
    ("t4", (418, 128), (1112, 8), 0.08, (9.5, 7.2)),
    ("t4", (418, 128), (504, 36), 0.0, (16.816, None)),
    ("t4", (418, 128), (1116, 36), 0.0, (20.654, None)),
    ("t4", (242, 50), (1952, 32), 0.07, (22.691, 16.903)),
    ("t4", (1693, 64), (276, 3), 0.07, (3.868, 2.614)),
    ("l4", (242, 50), (2112, 64), 0.14, (50.138, 20.015)),
)


def claims(sources: Sources) -> list[Claim]:
    """Every claim; `sources` is not used, since neither routing nor chance plays a part."""
    return [*_program(), *_opt(), *_mixtral()]


def opt_shape(n_layers: int, hidden: int, n_heads: int) -> LayerShape:
    """A dense OPT layer: four attention projections and two matrices of 4 * hidden."""
    return LayerShape(
        n_layers=n_layers,
        n_experts=1,
        top_k=1,
        n_heads=n_heads,
        dense_bytes=8.0 * hidden**2,
        expert_bytes=16.0 * hidden**2,
        kv_token_bytes=4.0 * hidden,
        hidden_bytes=2.0 * hidden,
        qkv_bytes=6.0 * hidden,
        dense_flops=8.0 * hidden**2,
        expert_flops=16.0 * hidden**2,
        score_flops=4.0 * hidden,
        workspace_bytes=8.0 * hidden,
    )


def opt_problem(shape: LayerShape) -> FlexgenProblem:
    """The paper's machine: a T4, 208 GB of host memory, 1.5 TB of disk; 512 in, 32 out."""
    return FlexgenProblem(shape, LENGTHS, T4_MEMORY_BYTES, HOST_BYTES, DISK_BYTES)


def _row(
    claim: str,
    published: float | None,
    simulated: float,
    band: tuple[float, float] | None,
    tier: Tier,
    note: str = "",
) -> Claim:
    low, high = band if band is not None else (None, None)
    return Claim(NAME, claim, published, float(simulated), low, high, tier, "code", note)


def grid_seconds(problem: FlexgenProblem, block: int, micro_batch: int) -> float:
    """Least seconds over a grid of shares that fit; inf when none does."""
    parts = [
        (a / GRID, b / GRID, (GRID - a - b) / GRID)
        for a in range(GRID + 1)
        for b in range(GRID + 1 - a)
    ]
    least, room = np.inf, flexgen_capacity(problem)
    for weights in parts:
        for cache in parts:
            for hidden in parts:
                if hidden[2]:
                    continue  # hidden states may not go to disk
                shares = np.array([weights, cache, hidden])
                terms = flexgen_terms(problem, block, micro_batch, shares)
                if (terms.memory_bytes <= room).all():
                    seconds = terms.seconds(problem.shape.n_layers, problem.lengths.output)
                    least = min(least, seconds)
    return float(least)


def _program() -> Iterator[Claim]:
    """The linear program against an exhaustive grid."""
    problem = opt_problem(opt_shape(48, 7168, 56))
    plan = flexgen_plan(problem, 144, 48)
    terms = flexgen_terms(problem, 144, 48, plan.shares)
    parts = terms.prefill_s.max() + terms.generate_s.max() * (LENGTHS.output - 1)
    ratio = plan.seconds / (parts * 48)
    yield _row("T over T_pre l + T_gen (n - 1) l", 1.0, ratio, (0.999, 1.001), "A")
    ratio = plan.seconds / grid_seconds(problem, 144, 48)
    note = "OPT-30B, 144 sequences; shares in fifths"
    yield _row("linear program over the best of a grid", None, ratio, (0.0, 1.0), "A", note)


def _opt() -> Iterator[Claim]:
    """The paper's three models on a T4, batches as published."""
    plan = flexgen_plan(opt_problem(opt_shape(48, 7168, 56)), 144, 48)
    note = "blocks of 3 x 48 as in the README; the source's default rates, nothing fitted here"
    yield _row("tokens/s of OPT-30B", 7.32, plan.tokens_per_s, (6.22, 8.42), "B", note)
    plan = flexgen_plan(opt_problem(opt_shape(32, 4096, 32)), 2, 2)
    note = "whether all weights fit decides: 15 GiB at 0.8 hold 94 % of them"
    yield _row("tokens/s of OPT-6.7B", 25.26, plan.tokens_per_s, None, "C", note)
    plan = flexgen_search(opt_problem(opt_shape(96, 12288, 96)))
    note = (
        "the source's disk rate of 0.473 GiB/s and all of the cache on disk; the published run had"
        " a faster disk, and its batch of 256 does not fit the source's own memory rule"
    )
    yield _row("tokens/s of OPT-175B", 0.69, plan.tokens_per_s, None, "C", note)


def _mixtral() -> Iterator[Claim]:
    """Mixtral 8x7B as MoE-Lightning measured FlexGen and FlexGen(c) on it."""
    shape = layer_shape(load_model("mixtral-8x7b"))
    boxes = {"t4": t4_box(), "l4": l4_box()}
    note = "shown, not fitted; the port of Mixtral to FlexGen runs experts one by one"
    for box, lengths, (batch, micro), resident, measured in ROWS:
        words = f"on one {box}, {lengths[0]} in / {lengths[1]} out, {batch}/{micro}"
        for published, name, on_gpu in zip(
            measured, ("FlexGen", "FlexGen(c)"), (True, False), strict=True
        ):
            if published is not None:
                policy = StreamedPolicy(batch, micro, on_gpu, weights_share=resident)
                run = flexgen_run(shape, boxes[box], Lengths(*lengths), policy)
                yield _row(
                    f"tokens/s of {name} {words}", published, run.tokens_per_s, None, "C", note
                )
