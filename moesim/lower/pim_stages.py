"""Continuous batching on devices whose HBM stacks compute: seconds and joules, stage by stage.

A stage is one pass of a model over a batch: most requests decode a token, a new one is prefilled.
`serve` draws the stages of a steady state with the routing of every stage, `run` prices them on a
Machine. The rule that splits experts between the GPU (xPU) and the PIM stacks is
`planners/co_processing.py`.

Times are rooflines at nominal rates without launches, as simulators of unbuilt hardware have them;
only communication has measured constants (`hwmodels/collective.py`). Weights and cached keys and
values are read; activations, norms and softmax are left out. Dense work runs on the xPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from hwmodels.collective import all_to_all_law, all_to_all_seconds, ring_collective
from hwmodels.cost import ExpertShape
from hwmodels.device import Figure
from hwmodels.devices import load_link
from hwmodels.system import System
from moesim.errors import SimulationError
from planners.co_processing import UnitRates, co_processing_split, device_rates, unit_seconds
from traces.model import ModelSpec
from traces.synth import stream

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Rule = Literal["xpu", "faster", "split"]

SPACES = 4  # bank bundles of a stack, each used by one unit at a time
DRAWS = 2  # routings drawn for each stage
STAGES = 512
FLOP_J = Figure(
    0.23e-12, "derived", "LLMSimulator, src/dram/power.h: 0.46 pJ a multiply-add, all units"
)
LENGTH_SPREAD = Figure(
    0.1, "assumed", "arXiv 2409.01141 draws lengths from a Gaussian, without saying its width"
)


@dataclass(frozen=True, slots=True)
class Machine:
    """Devices of one kind and how they share a model.

    pim             rates of a device's stacks, None for a plain GPU
    rule            what runs the experts: the xPU, the faster unit one after the other, or both
                    at once (which then also holds for prefill and decode attention)
    cut             every expert is cut over the devices of a node; else experts are whole on one
                    device each, or cut where there are more devices than experts
    spaces          memory spaces that experts are dealt over in turn, each used by one unit at a
                    time; 0 for no such rule
    pim_j_per_byte  from the memory cells to the stacks' arithmetic
    """

    system: System
    pim: UnitRates | None = None
    rule: Rule = "xpu"
    cut: bool = False
    spaces: int = SPACES
    pim_j_per_byte: float = 0.0

    @property
    def xpu(self) -> UnitRates:
        """Nominal rates of one device."""
        return device_rates(self.system.device)

    @property
    def per_node(self) -> int:
        """Devices of a node that are used."""
        return self.system.n_devices // self.system.n_nodes


@dataclass(frozen=True, slots=True)
class Workload:
    """A model, the requests served at once, and the mean lengths of prompts and answers."""

    model: ModelSpec
    batch: int
    length_in: int
    length_out: int


@dataclass(frozen=True, slots=True)
class Stages:
    """A stretch of continuous batching; arrays are [stages] unless they say otherwise.

    decoding  sequences that decode; context their cached tokens together
    arrivals  prompts that are prefilled; prompt their tokens, squares the sum of their squares
    counts    int64[stages, draws, experts], tokens of each expert in routings drawn anew
    """

    decoding: Longs
    context: Floats
    arrivals: Longs
    prompt: Longs
    squares: Floats
    counts: Longs


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds and joules of every stage, float64[stages] each."""

    seconds: Floats
    joules: Floats


def pair_law(popularity: Floats) -> tuple[Floats, Longs]:
    """Probability of every pair of experts that a token can choose, one after the other.

    popularity  float64[experts], odds of the first choice, sums to 1
    returns     float64[pairs], and int64[pairs, experts] with two ones in a row
    """
    first, second = np.triu_indices(len(popularity), 1)
    p, q = popularity[first], popularity[second]
    member = np.zeros((len(first), len(popularity)), np.int64)
    rows = np.arange(len(first))
    member[rows, first] = member[rows, second] = 1
    odds = p * q * (1 / (1 - p) + 1 / (1 - q))
    return odds / odds.sum(), member


def serve(work: Workload, seed: int, popularity: Floats | None = None) -> Stages:
    """Serve a full batch for STAGES stages from its steady state: a request ends, one begins.

    popularity  float64[experts], uniform when None
    raises      SimulationError for a model whose tokens do not choose two experts
    """
    experts = work.model.n_experts
    if work.model.top_k != 2:
        raise SimulationError(f"model {work.model.name}: top_k={work.model.top_k}, expected 2")
    rng = stream(seed, f"pim {work.model.name} {work.batch} {work.length_in}")
    decoding, context, arrivals, prompt, squares = _schedule(work, rng)
    odds, member = pair_law(np.full(experts, 1 / experts) if popularity is None else popularity)
    tokens = np.repeat((decoding + prompt)[:, None], DRAWS, axis=1)
    counts = rng.multinomial(tokens, odds) @ member
    return Stages(
        decoding, context.astype(np.float64), arrivals, prompt, squares.astype(np.float64), counts
    )


def _schedule(work: Workload, rng: np.random.Generator) -> tuple[Longs, Longs, Longs, Longs, Longs]:
    """The first five fields of Stages; at the start requests are evenly under way."""
    n = work.batch
    length_in, length_out = (_lengths(rng, mean, n) for mean in (work.length_in, work.length_out))
    done = (length_out * (np.arange(n) + 0.5) / n).astype(np.int64)
    rows = np.empty((5, STAGES), np.int64)
    for stage in range(STAGES):
        new = done == 0
        prompts, context = length_in[new], (length_in + done)[~new].sum()
        rows[:, stage] = n - len(prompts), context, len(prompts), prompts.sum(), (prompts**2).sum()
        done += 1
        ended = done >= length_out
        done[ended] = 0
        length_in[ended] = _lengths(rng, work.length_in, int(ended.sum()))
        length_out[ended] = _lengths(rng, work.length_out, int(ended.sum()))
    return rows[0], rows[1], rows[2], rows[3], rows[4]


def _lengths(rng: np.random.Generator, mean: int, n: int) -> Longs:
    drawn = rng.normal(mean, LENGTH_SPREAD.value * mean, n)
    return np.maximum(np.rint(drawn), 2).astype(np.int64)


def run(work: Workload, stages: Stages, on: Machine) -> Run:
    """Seconds and joules of every stage: attention and projections, experts, communication."""
    model = work.model
    attention_s, attention_j = _attention(model, stages, on)
    linear_s, linear_j = _linear(model, stages, on)
    expert_s, expert_j = _experts(model, stages, on)
    layers = model.n_layers
    communication_s = 2 * layers * _reduce_s(model, stages, on)
    communication_s = communication_s + model.n_moe_layers * _between_nodes_s(model, stages, on)
    return Run(
        layers * attention_s + linear_s + model.n_moe_layers * expert_s + communication_s,
        layers * attention_j + linear_j + model.n_moe_layers * expert_j,
    )


def _node_tokens(stages: Stages, on: Machine) -> tuple[Floats, Floats]:
    """Decoding sequences of a node, and the share of the stage's prompts that the busiest has."""
    nodes = on.system.n_nodes
    share = np.ceil(stages.arrivals / nodes) / np.maximum(stages.arrivals, 1)
    return stages.decoding / nodes, share


def _linear(model: ModelSpec, stages: Stages, on: Machine) -> tuple[Floats, Floats]:
    """Projections, dense feed-forward layers and the output head of a stage, all on the xPU."""
    heads = model.attention
    width = heads.n_heads * (heads.head_dim + heads.v_head_dim)
    width += heads.n_kv_heads * (heads.head_dim + heads.v_head_dim)
    dense = (model.dense_ffn_matrices or model.ffn_matrices) * model.dense_intermediate_size
    layer_weights = model.n_layers * model.hidden_size * width
    layer_weights += (model.n_layers - model.n_moe_layers) * model.hidden_size * dense
    decoding, share = _node_tokens(stages, on)
    seconds, joules = np.zeros(len(decoding)), np.zeros(len(decoding))
    for weights, busiest, total in (
        (layer_weights, decoding + share * stages.prompt, stages.decoding + stages.prompt),
        (
            model.hidden_size * model.vocab_size,
            decoding + share * stages.arrivals,
            stages.decoding + stages.arrivals,
        ),
    ):
        read_s = 2 * weights / on.per_node / on.xpu.bytes_per_s
        work_s = 2 * weights * busiest / on.per_node / on.xpu.flop_per_s
        seconds += np.maximum(read_s, work_s)
        joules += 2 * weights * on.system.n_nodes * _xpu_j_per_byte()
        joules += 2 * weights * total * FLOP_J.value
    return seconds, joules


def _attention(model: ModelSpec, stages: Stages, on: Machine) -> tuple[Floats, Floats]:
    """Scores and values of one layer: decode on the stacks where there are any, prefill on xPU."""
    heads = model.attention
    cached_bytes = 2.0 * heads.n_kv_heads * (heads.head_dim + heads.v_head_dim)
    flops = 2.0 * heads.n_heads * (heads.head_dim + heads.v_head_dim)
    unit = on.pim or on.xpu
    per_device = stages.context / on.system.n_devices
    decode_s = per_device * max(cached_bytes / unit.bytes_per_s, flops / unit.flop_per_s)
    _, share = _node_tokens(stages, on)
    prefill_s = share * stages.squares / 2 * flops / on.per_node / on.xpu.flop_per_s
    both = np.maximum if on.rule == "split" else np.add
    read_j = on.pim_j_per_byte if on.pim else _xpu_j_per_byte()
    pairs = stages.context + stages.squares / 2
    joules = stages.context * cached_bytes * read_j + pairs * flops * FLOP_J.value
    return both(decode_s, prefill_s), joules


def _experts(model: ModelSpec, stages: Stages, on: Machine) -> tuple[Floats, Floats]:
    """Experts of one layer, mean over the drawn routings; the busiest device sets the time."""
    groups, _ = holders(on, model.n_experts)
    shape = ExpertShape(model.hidden_size, model.expert_intermediate_size, model.ffn_matrices)
    counts = stages.counts.reshape(-1, model.n_experts // groups)  # experts of one holder in a row
    on_pim, seconds = _holder_seconds(shape, counts, on, model.n_experts)
    read_j = np.where(on_pim, on.pim_j_per_byte, _xpu_j_per_byte()) * (counts > 0)
    joules = 2.0 * shape.n_params * (read_j + FLOP_J.value * counts)
    drawn = stages.counts.shape[:2]
    return (
        seconds.reshape(*drawn, groups).max(axis=2).mean(axis=1),
        joules.reshape(*drawn, -1).sum(axis=2).mean(axis=1),
    )


def _holder_seconds(
    shape: ExpertShape, counts: Longs, on: Machine, n_experts: int
) -> tuple[Flags, Floats]:
    """Which experts of each holder the stacks compute, and how long each holder takes."""
    _, slices = holders(on, n_experts)
    n = np.arange(int(counts.max()) + 1)
    xpu_table = unit_seconds(on.xpu, shape, n) / slices
    if on.pim is None or on.rule == "xpu":
        return np.zeros(counts.shape, np.bool_), xpu_table[counts].sum(axis=1)
    pim_table = unit_seconds(on.pim, shape, n) / slices
    if on.rule == "split":
        space = np.arange(counts.shape[1]) % on.spaces if on.spaces else None
        split = co_processing_split(counts, xpu_table, pim_table, space)
        return split.on_pim, split.makespan_s
    faster = np.asarray((pim_table < xpu_table)[counts])
    return faster, np.minimum(xpu_table, pim_table)[counts].sum(axis=1)


def holders(on: Machine, n_experts: int) -> tuple[int, int]:
    """Groups of devices that hold the same experts, and into how many slices each is cut.

    raises  SimulationError where experts or devices cannot be dealt out evenly
    """
    devices = on.system.n_devices
    groups = on.system.n_nodes if on.cut else min(devices, n_experts)
    if n_experts % groups or devices % groups:
        raise SimulationError(
            f"{n_experts} experts and {devices} devices cannot be dealt to {groups} groups evenly"
        )
    return groups, devices // groups


def _xpu_j_per_byte() -> float:
    return load_link("hbm3").energy_j_per_byte


def _reduce_s(model: ModelSpec, stages: Stages, on: Machine) -> Floats:
    """All-reduce of a node's tokens after attention, and again after a feed-forward layer."""
    decoding, share = _node_tokens(stages, on)
    n_bytes = (decoding + share * stages.prompt) * model.hidden_size * 2
    return np.asarray(ring_collective(on.system, "all_reduce", n_bytes, on.per_node).seconds)


def _between_nodes_s(model: ModelSpec, stages: Stages, on: Machine) -> Floats:
    """Tokens to the other nodes that hold their experts, and their results back."""
    nodes = on.system.n_nodes
    if nodes == 1:
        return np.zeros(len(stages.decoding))
    decoding, share = _node_tokens(stages, on)
    stay = 1.0
    for j in range(model.top_k):
        stay *= 1 - (model.n_experts / nodes) / (model.n_experts - j)
    sent = (decoding + share * stages.prompt) * (nodes - 1) * (1 - stay) * model.hidden_size * 2
    per_device = (sent / on.per_node)[:, None]
    none = np.zeros_like(per_device)
    law = all_to_all_law(on.system, "low_latency")
    leg_s = all_to_all_seconds(law, none, none, per_device, per_device)
    inside = ring_collective(on.system, "all_gather", sent, on.per_node).seconds
    return np.asarray(2 * (leg_s + inside))
