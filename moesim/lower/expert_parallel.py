"""One prefill or decode step of a whole model over N ranks, as a Program.

Every rank has a stream for kernels and one for communication. Ranks meet before an all-to-all
and after it: a joint (a task of no length) waits for all of them. The twin of a step without
two-batch overlap is `step_breakdown`, the closed form of the same schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hwmodels.collective import rank_seconds
from hwmodels.cost import expert_seconds
from hwmodels.system import System
from moesim.builder import NONE, ProgramBuilder
from moesim.errors import SimulationError
from moesim.lower.layer_costs import LayerCosts, StepOptions, layer_costs
from moesim.program import Names, Program
from planners.dispatch import DispatchCounts
from planners.step_time import MoeLaws, MoeParts, laws_for
from traces.model import ModelSpec

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
COMPONENTS = (
    "attention", "gate", "dispatch", "experts", "combine", "shared", "dense", "other",
)  # fmt: skip


def step_program(
    model: ModelSpec, system: System, options: StepOptions, batches: tuple[DispatchCounts, ...]
) -> tuple[Program, Names]:
    """The program of one step and the names of its streams and tasks.

    batches  counts of the step without steps axis: one, or two half batches with overlap
    raises   SimulationError when the number of batches, layers or ranks does not fit
    """
    _check(model, system, options, batches)
    laws = laws_for(model, system, options.precision, options.kernel)
    work = [_batch(counts, laws, model, system, options) for counts in batches]
    writer = _Writer(system, options.shared_overlap, work)
    column_of = {layer: column for column, layer in enumerate(model.moe_layers)}
    for layer in range(model.n_layers):
        column = column_of.get(layer)
        for i in range(len(work)):
            writer.attention(i, layer)
            if column is None:
                writer.kernels(i, work[i].costs.dense_s, f"feed-forward of layer {layer}", "dense")
            else:
                writer.dispatch(i, layer, column)
        for i in range(len(work) if column is not None else 0):
            writer.experts(i, layer, column or 0)
    for i in range(len(work)):
        writer.kernels(i, work[i].costs.head_s, "output projection", "other")
    return writer.builder.build(), writer.builder.names()


def step_breakdown(
    model: ModelSpec, costs: LayerCosts, parts: MoeParts, shared_overlap: bool
) -> Mapping[str, Floats]:
    """Seconds of every component of a step without two-batch overlap; they add up to the step.

    parts    arrays [..., moe_layers]
    returns  component to float64[...]; hidden time is not counted: with shared_overlap "shared"
             is only what sticks out beyond the dispatch
    """
    n_moe = model.n_moe_layers
    lead = np.zeros(parts.experts_s.shape[:-1])
    shared = np.full_like(parts.dispatch_s, costs.shared_s)
    if shared_overlap:
        shared = np.maximum(0.0, shared - parts.dispatch_s)
    return {
        "attention": lead + costs.attention_s.sum(),
        "gate": lead + costs.gate_s * n_moe,
        "dispatch": np.asarray(parts.dispatch_s.sum(axis=-1)),
        "experts": np.asarray(parts.experts_s.sum(axis=-1)),
        "combine": np.asarray(parts.combine_s.sum(axis=-1)),
        "shared": np.asarray(shared.sum(axis=-1)),
        "dense": lead + costs.dense_s * (model.n_layers - n_moe),
        "other": lead + costs.norm_s * model.n_layers + costs.head_s,
    }


@dataclass(frozen=True, slots=True)
class _Batch:
    """Seconds of one batch: the same on all ranks (costs), and float64[moe_layers, ranks]."""

    costs: LayerCosts
    dispatch_s: Floats
    experts_s: Floats
    combine_s: Floats


def _batch(
    counts: DispatchCounts, laws: MoeLaws, model: ModelSpec, system: System, options: StepOptions
) -> _Batch:
    sent = (counts.up_send, counts.up_recv, counts.out_send, counts.out_recv)
    return _Batch(
        layer_costs(model, system, options, counts.n_tokens / system.n_devices),
        rank_seconds(laws.all_to_all, *(copies * laws.dispatch_bytes for copies in sent)),
        expert_seconds(laws.experts, counts.rank_tokens, counts.rank_distinct),
        rank_seconds(laws.all_to_all, *(copies * laws.combine_bytes for copies in sent)),
    )


class _Writer:
    """Appends the tasks of a step in the order a runtime issues them.

    What a batch must wait for next is remembered per batch: the joint at the end of its latest
    all-to-all. Within a rank and a batch, kernels follow each other on the rank's stream.
    """

    def __init__(self, system: System, shared_overlap: bool, work: list[_Batch]) -> None:
        self.builder = ProgramBuilder()
        make, ranks = self.builder.stream, range(system.n_devices)
        self._kernels = np.array([make("kernels", f"rank {rank}") for rank in ranks])
        self._wires = np.array([make("communication", f"rank {rank}") for rank in ranks])
        self._joints = [make(f"joints of batch {i}", "all ranks") for i in range(len(work))]
        self._arrived = [NONE for _ in work]
        self._shared_overlap = shared_overlap
        self._work = work

    def attention(self, i: int, layer: int) -> None:
        """Both norms of a layer and its attention."""
        costs = self._work[i].costs
        self.kernels(i, costs.norm_s, f"norms of layer {layer}", "other")
        self.kernels(i, float(costs.attention_s[layer]), f"attention of layer {layer}", "attention")

    def dispatch(self, i: int, layer: int, column: int) -> None:
        """Gate, dispatch, and the shared experts before it or beside it."""
        batch = self._work[i]
        shared = (batch.costs.shared_s, f"shared experts of layer {layer}", "shared")
        last = self.kernels(i, batch.costs.gate_s, f"gate of layer {layer}", "gate")
        if shared[0] and not self._shared_overlap:
            last = self.kernels(i, *shared)
        seconds = batch.dispatch_s[column]
        arrived = self._send(i, last, seconds, (f"dispatch of layer {layer}", "dispatch"))
        if shared[0] and self._shared_overlap:
            self.kernels(i, *shared)
        self._arrived[i] = arrived

    def experts(self, i: int, layer: int, column: int) -> None:
        """Routed experts, then combine."""
        batch = self._work[i]
        last = self.kernels(i, batch.experts_s[column], f"experts of layer {layer}", "experts")
        seconds = batch.combine_s[column]
        self._arrived[i] = self._send(i, last, seconds, (f"combine of layer {layer}", "combine"))

    def kernels(self, i: int, seconds: float | Floats, name: str, sort: str) -> Ids:
        """One kernel on every rank, after the batch's latest all-to-all; returns the tasks."""
        label = self.builder.label(name, sort)
        return self.builder.extend(self._kernels, seconds, self._arrived[i], label=label)

    def _send(self, i: int, after: Ids, seconds: Floats, label: tuple[str, str]) -> int:
        """An all-to-all: all ranks meet, send, and meet again; returns the last joint."""
        ready = self.builder.append(self._joints[i], waits=after.tolist())
        number = self.builder.label(*label)
        sent = self.builder.extend(self._wires, seconds, ready, label=number)
        return self.builder.append(self._joints[i], waits=sent.tolist())


def _check(
    model: ModelSpec, system: System, options: StepOptions, batches: tuple[DispatchCounts, ...]
) -> None:
    wanted = 2 if options.two_batch_overlap else 1
    if len(batches) != wanted:
        raise SimulationError(f"batches: {len(batches)}, expected {wanted}")
    expected = (model.n_moe_layers, system.n_devices)
    for counts in batches:
        if counts.rank_tokens.shape != expected:
            raise SimulationError(
                f"counts: shape {counts.rank_tokens.shape}, expected {expected} (MoE layers of"
                f" {model.name}, devices of {system.name})"
            )
