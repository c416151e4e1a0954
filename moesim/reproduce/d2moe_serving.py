"""What D2MoE's claims are simulated on: a model, a machine, routing with bits, and serving.

Read `serve` first: layer after layer, what is missing is read in a load order while what is there
is computed. `gain` and `examples` look at single layers with nothing in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hwmodels.cost import DEFAULT_EFFICIENCY
from hwmodels.devices import load_device, load_link
from moesim.policies.load_order import (
    Order,
    bound_s,
    computed_s,
    hebf_order,
    layer_order,
    makespan_s,
)
from moesim.policies.nested_memory import NestedMemory, segment_bytes
from planners.nested_bits import plane_bytes
from traces.counting import attention_params, kv_bytes_per_token
from traces.model import Attention, ModelSpec
from traces.synth import stream, zipf_trace

Longs = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

BIT_SHARES = (0.3, 0.4, 0.3)  # of tokens at 2, 3 and 4 bits, the router's target
REQUESTS, CONTEXT = 32, 192  # 128 tokens in and 128 out: 192 cached on average
EXPERT_S = 3.1e-3
WARM_PASSES = 4
# Dequantising is 20.8 % of computing with 4 requests and 16.8 % with 32. At one such step for an
# expert's precision, which then has 1.2 or 3 tokens on average, a token adds 0.147 of the rest.
GROUP_TOKENS = 1 / 0.147
IO_S, COMPUTE_S, UNSCHEDULED_S = 2.6, 2.04, 3.55  # of the example pipeline
EXAMPLES = 200


def llama_moe() -> ModelSpec:
    """LLaMA-MoE-3.5B (2/8): LLaMA-2 7B with its feed-forward part cut into 8 experts."""
    return ModelSpec(
        name="llama-moe-3.5b",
        n_layers=32,
        moe_layers=tuple(range(32)),
        hidden_size=4096,
        attention=Attention(n_heads=32, n_kv_heads=32, head_dim=128, v_head_dim=128),
        n_experts=8,
        top_k=2,
        expert_intermediate_size=1376,
        shared_intermediate_size=0,
        dense_intermediate_size=0,
        vocab_size=32000,
        kv_layers=32,
    )


MODEL = llama_moe()
PLANES = plane_bytes(MODEL.expert_params)


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine takes.

    read_s, read_bytes_per_s  of reading a segment from the drive, once and by bytes
    group_s, token_s          of computing an expert at one precision, once and by tokens
    dense_s                   of the attention of a layer, before its gate
    ahead                     the next layer's segments are known a layer early
    """

    read_s: float
    read_bytes_per_s: float
    group_s: float
    token_s: float
    dense_s: float
    ahead: bool = False


def rates(group_tokens: float = 0.0) -> Rates:
    """The assumed machine, a Jetson AGX Orin; a group costs as much as so many tokens more."""
    drive, device = load_link("nvme-gen3"), load_device("jetson-agx-orin")
    tokens = REQUESTS * MODEL.top_k / MODEL.n_experts
    token_s = EXPERT_S / (tokens + len(BIT_SHARES) * group_tokens)
    n_bytes = attention_params(MODEL) * 4.25 / 8
    n_bytes += REQUESTS * CONTEXT * kv_bytes_per_token(MODEL) / MODEL.n_layers
    return Rates(
        read_s=drive.latency_s,
        read_bytes_per_s=drive.bytes_per_s,
        group_s=group_tokens * token_s,
        token_s=token_s,
        dense_s=n_bytes / (device.memory_bytes_per_s * DEFAULT_EFFICIENCY.memory_share),
    )


def requested(n_passes: int, seed: int, exponent: float = 1.0) -> Longs:
    """int64[passes, layers, experts, 3]: tokens that ask an expert for 2, 3 and 4 bits."""
    n_layers, n_experts, top_k = MODEL.n_layers, MODEL.n_experts, MODEL.top_k
    trace = zipf_trace(n_passes * REQUESTS, n_layers, n_experts, top_k, exponent, seed=seed)
    token, layer, _ = np.ogrid[: trace.n_tokens, :n_layers, :top_k]
    level = stream(seed, "d2moe bits").choice(len(BIT_SHARES), p=BIT_SHARES, size=trace.topk.shape)
    shape = (n_passes, n_layers, n_experts, len(BIT_SHARES))
    cell = np.ravel_multi_index((token // REQUESTS, layer, trace.topk, level), shape)
    return np.bincount(cell.ravel(), minlength=int(np.prod(shape))).reshape(shape)


def serve(
    work: Longs, on: Rates, planes: Longs, budget_bytes: float, order: Order
) -> tuple[Doubles, int]:
    """Seconds of each pass, and bytes read in all of them.

    work    int64[passes, layers, experts, precisions], tokens that ask for each
    planes  int64[precisions], bytes that each precision adds to the one below
    What is in memory is computed first. Reading begins at the gate, or with `on.ahead` at the gate
    of the layer before, behind that layer's reads.
    """
    n_passes, n_layers, n_experts, _ = work.shape
    memory = NestedMemory((n_layers, n_experts), planes, int(budget_bytes))
    ends = np.zeros(n_passes * n_layers + 1)
    free = gate_before = 0.0
    n_bytes = 0
    for at, tokens in enumerate(work.reshape(-1, *work.shape[2:])):
        gate = ends[at] + on.dense_s
        read = memory.load(at % n_layers, tokens).ravel()
        cells = order(tokens)
        cells = cells[np.argsort(read[cells] > 0, kind="stable")]
        missing = read[cells] > 0
        io_s = missing * (on.read_s + read[cells] / on.read_bytes_per_s)
        began = max(free, gate_before if on.ahead else gate)
        ready_s = np.where(missing, began + np.cumsum(io_s), gate)
        work_s = on.group_s + on.token_s * tokens.ravel()[cells]
        ends[at + 1] = computed_s(np.maximum(ready_s, gate), work_s)[-1]
        free, gate_before = began + float(io_s.sum()), gate
        n_bytes += int(read.sum())
    return np.diff(ends[::n_layers]), n_bytes


def tokens_per_s(
    work: Longs, on: Rates, budget_mb: float, order: Order = hebf_order, planes: Longs = PLANES
) -> float:
    """Generated tokens a second of all requests, after the passes in which memory fills."""
    pass_s, _ = serve(work, on, planes, 1e6 * budget_mb, order)
    return float(REQUESTS / pass_s[WARM_PASSES:].mean())


# --- one layer, nothing in memory -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gain:
    """Seconds in layer order over those by HEBF, and over what no order beats (`bound_s`)."""

    hebf: float
    most: float


def gain(work: Longs, on: Rates, io_over_compute: float) -> Gain:
    """What an order is worth when all layers are read from nothing.

    work             as in `serve`
    io_over_compute  of the totals over all layers; the reading rate is set to give it
    """
    layers = work.reshape(-1, *work.shape[2:])
    held = np.zeros(work.shape[2], np.int64)
    read = np.array([segment_bytes(tokens, held, PLANES).ravel() for tokens in layers])
    compute_s = (on.group_s + on.token_s * layers.reshape(read.shape)) * (read > 0)
    io_s = read * (io_over_compute * compute_s.sum() / read.sum())
    as_numbered = by_hebf = least = 0.0
    for tokens, io, compute in zip(layers, io_s, compute_s, strict=True):
        cells, hot = layer_order(tokens), hebf_order(tokens)
        as_numbered += makespan_s(io[cells], compute[cells])
        by_hebf += makespan_s(io[hot], compute[hot])
        least += bound_s(io[cells], compute[cells])
    return Gain(as_numbered / by_hebf, as_numbered / least)


@dataclass(frozen=True, slots=True)
class Example:
    """A layer with the totals of the published example; seconds by cell of `tokens`.

    tokens         int64[experts, 3]
    io_s, compute_s  float64[experts * 3], 0 where nobody asks
    """

    tokens: Longs
    io_s: Doubles
    compute_s: Doubles

    def total_s(self, order: Longs) -> float:
        """Seconds when the cells go in that order."""
        return makespan_s(self.io_s[order], self.compute_s[order])

    @property
    def bound_s(self) -> float:
        """All reading and the least computing after it, or the least reading before all computing.

        The handbook's form, with the part that is left to the other side at its smallest.
        """
        cells = layer_order(self.tokens)
        io_s, compute_s = self.io_s[cells], self.compute_s[cells]
        return float(max(io_s.sum() + compute_s.min(), io_s.min() + compute_s.sum()))


def examples(seed: int) -> list[Example]:
    """Layers that take in layer order what the example takes unscheduled, to 2 %.

    Only three totals of the example are published. Drawn: 3 to 6 experts, 32 tokens, Zipf
    exponent 1, bits by share, reading by bytes and computing by tokens; most draws are dropped.
    """
    rng = stream(seed, "d2moe example")
    found: list[Example] = []
    while len(found) < EXAMPLES:
        n_experts = int(rng.integers(3, 7))
        share = rng.permutation(1 / np.arange(1, n_experts + 1))
        odds = np.outer(share / share.sum(), BIT_SHARES)
        tokens = rng.multinomial(REQUESTS, odds.ravel()).reshape(odds.shape)
        read = segment_bytes(tokens, np.zeros(n_experts, np.int64), PLANES).ravel()
        one = Example(tokens, _scaled(read, IO_S), _scaled(tokens.ravel(), COMPUTE_S))
        if abs(one.total_s(layer_order(tokens)) / UNSCHEDULED_S - 1) < 0.02:
            found.append(one)
    return found


def _scaled(work: Longs, total_s: float) -> Doubles:
    """Seconds in proportion to work, with that total."""
    return np.asarray(work * (total_s / work.sum()), dtype=np.float64)
