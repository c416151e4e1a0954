"""SN40L (arXiv 2405.07518): many whole models behind a router, kept in SRAM, HBM and DDR.

A composition of experts routes every prompt to one of n models of 7 B. The HBM of a node is an LRU
cache of models; a missing one is copied from DDR (SN40L) or over PCIe from host memory (GPUs),
read-only, so that nothing is written back. A batch runs the router once for all prompts, then
fetches and runs one (prompt, model) pair after the other, every model cut over all eight sockets:

    latency = router + sum over prompts of (miss * switch + prefill + tokens * token time)

Misses come from a replay of the stream of model ids, not from a formula. Which link a GPU node
fetches over decides the outcome: the paper takes one PCIe link for the node ("one link"); each of
eight GPUs fetching its own slice ("eight links") is the honest baseline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hwmodels.collective import ring_collective
from hwmodels.device import Device, Figure
from hwmodels.devices import load_device
from hwmodels.operators import (
    AttentionShape,
    attention_decode,
    attention_prefill,
    elementwise,
    gemm,
)
from hwmodels.system import System
from hwmodels.systems import load_system
from moesim.reproduce.claim import Claim, Tier
from moesim.reproduce.sources import Sources
from traces.replay import replay
from traces.synth import stream

NAME = "sn40l"
PAPER = "SN40L, arXiv 2405.07518 (MICRO 2024), with Composition of Experts, arXiv 2412.01868"

Ids = npt.NDArray[np.int64]

MODEL_BYTES = 13.5e9  # Llama2-7B in BF16
LAYERS, HIDDEN, HEADS, INTERMEDIATE, VOCAB = 32, 4096, 32, 11008, 32000
SOCKETS = 8
DDR_BYTES = SOCKETS * 1.5 * 2**40
GPU_HBM_BYTES = 80e9  # of one GPU, as sold: the handbook's figure
MODELS = 150
REQUESTS = 100_000
FIGURES = MappingProxyType(
    {
        "token": Figure(
            1 / 430 * MODEL_BYTES / 16.06e9,
            "derived",
            "SambaNova's blog: Llama3-8B, 430 tokens/s on 8 sockets; scaled by bytes of weights",
        ),
        "prefill": Figure(
            0.2 / 4096, "derived", "SambaNova's blog: 0.2 s to the first token of up to 4096"
        ),
        "hbm share": Figure(0.85, "datasheet", "arXiv 2405.07518, section VI-B: over 85 %"),
        "prompt": Figure(128, "assumed", "tokens of a short chat prompt; the paper does not say"),
        "footprint": Figure(850, "datasheet", "arXiv 2405.07518, section VI-C: models on one node"),
    }
)
PROMPT = int(FIGURES["prompt"].value)


@dataclass(frozen=True, slots=True)
class Box:
    """One node and how fast it fetches and runs a model.

    hbm_bytes            of all its sockets or GPUs
    switch_bytes_per_s   from DDR or host memory, everything that runs at once together
    prefill_s_per_token  0 for a GPU, which is priced by its operators
    token_s              of one decoded token; 0 as above
    gpus                 the system whose operators price prefill and decode, None for the SN40L
    """

    name: str
    hbm_bytes: float
    switch_bytes_per_s: float
    prefill_s_per_token: float = 0.0
    token_s: float = 0.0
    gpus: System | None = None

    @property
    def slots(self) -> int:
        """Models that fit its HBM."""
        return int(self.hbm_bytes // MODEL_BYTES)

    @property
    def switch_s(self) -> float:
        """Seconds to fetch one model."""
        return MODEL_BYTES / self.switch_bytes_per_s

    def prefill_s(self, tokens: int) -> float:
        """Seconds of one pass over a prompt, or over several in a batch."""
        if self.gpus is not None:
            return _pass_s(self.gpus, tokens, 0)
        return self.prefill_s_per_token * tokens

    def run_s(self, prompt: int, output: int) -> float:
        """Seconds of one model for one prompt, once it is in HBM."""
        each = self.token_s or _pass_s(self.gpus, 1, prompt + output // 2)
        return self.prefill_s(prompt) + output * each


def sn40l() -> Box:
    """An SN40L node at the speeds its maker measured on Llama3-8B."""
    node = load_device("sn40l-node")
    prefill, token = (FIGURES[key].value for key in ("prefill", "token"))
    return Box("SN40L", node.memory_bytes, node.host_link_bytes_per_s, prefill, token)


def sn40l_at_roofline() -> Box:
    """An SN40L node whose decode reads weights at 85 % of HBM and whose prefill is a roofline."""
    node = load_device("sn40l-node")
    prefill = MODEL_BYTES / (0.8 * node.peak_flop_per_s("bf16"))  # 2 FLOP a weight of 2 bytes
    token = MODEL_BYTES / (FIGURES["hbm share"].value * node.memory_bytes_per_s)
    return replace(sn40l(), prefill_s_per_token=prefill, token_s=token)


def dgx(device: str, links: int = 1) -> Box:
    """Eight GPUs that fetch a model over one PCIe link, or each its slice over its own."""
    system = load_system(f"{device}x{SOCKETS}")
    rate = links * system.device.host_link_bytes_per_s
    return Box(device, SOCKETS * GPU_HBM_BYTES, rate, gpus=system)


@cache
def _operators(name: str, tokens: int, context: int) -> float:
    system = load_system(name)
    device: Device = system.device
    heads = HEADS // SOCKETS
    shape = AttentionShape(heads, heads, HIDDEN // HEADS, HIDDEN // HEADS)
    width, inner = HIDDEN // SOCKETS, INTERMEDIATE // SOCKETS
    layer = gemm(device, (tokens, 3 * width, HIDDEN)) + gemm(device, (tokens, HIDDEN, width))
    layer += gemm(device, (tokens, 2 * inner, HIDDEN)) + gemm(device, (tokens, HIDDEN, inner))
    layer += elementwise(device, tokens * inner * 2 * 3.0)
    norm = elementwise(device, tokens * HIDDEN * 2 * 4.0)
    reduce = ring_collective(system, "all_reduce", tokens * HIDDEN * 2.0, SOCKETS)
    layer += norm + norm + reduce + reduce
    if context:
        layer += attention_decode(device, shape, (tokens, context))
    else:
        layer += attention_prefill(device, shape, (tokens, 0))
    head = gemm(device, (1, VOCAB / SOCKETS, HIDDEN))
    return float(LAYERS * layer.seconds + head.seconds)


def _pass_s(system: System | None, tokens: int, context: int) -> float:
    """Seconds of one pass of the model cut over eight GPUs; context 0 is a prefill."""
    return 0.0 if system is None else _operators(system.name, tokens, context)


def requests(n_models: int, seed: int, exponent: float = 0.0, n: int = REQUESTS) -> Ids:
    """int64[n]: models that prompts ask for, independent draws; popularity rank ** -exponent."""
    rng = stream(seed, f"sn40l {n_models} {exponent}")
    odds = np.arange(1, n_models + 1) ** -exponent
    return rng.choice(n_models, n, p=odds / odds.sum())


def miss_share(models: Ids, slots: int) -> float:
    """Share of requests whose model is not in an LRU cache of that many, after a warm-up."""
    early = len(models) // 10
    cold = replay(models[:early], slots, "lru").n_misses
    return (replay(models, slots, "lru").n_misses - cold) / (len(models) - early)


def latency_s(box: Box, miss: float, batch: int, output: int, prompt: int = PROMPT) -> float:
    """Mean seconds from a batch of prompts to the last answer."""
    fetch_and_run_s = miss * box.switch_s + box.run_s(prompt, output)
    return box.prefill_s(batch * prompt) + batch * fetch_and_run_s


def ratio(gpu: Box, node: Box, models: Ids, batch: int, output: int, prompt: int = PROMPT) -> float:
    """Latency on the GPU node over latency on the other, each with its own misses."""
    one, two = (
        latency_s(box, miss_share(models, box.slots), batch, output, prompt) for box in (gpu, node)
    )
    return one / two


def last_flat_pool(box: Box, seed: int, rise: float = 0.05) -> int:
    """Models in the largest pool before mean latency rises by more than a share of its floor."""
    floor = latency_s(box, 0.0, 1, 20)
    for n_models in range(1, 2 * box.slots):
        miss = miss_share(requests(n_models, seed, n=20_000), box.slots)
        if latency_s(box, miss, 1, 20) > (1 + rise) * floor:
            return n_models - 1
    return 2 * box.slots


_END_TO_END = (3.0, 5.0)  # the handbook's band, against one H100 node, batch 1 to 8, 20 tokens
_HOW = (
    "150 models asked for at random; GPUs by their operators; SN40L at its maker's measured speeds"
    " of Llama3-8B, scaled; prompt of 128 tokens assumed with the published figures known (other"
    " rows: prompt 512, SN40L at its roofline)"
)
_ONE = _HOW + "; GPUs fetch over one PCIe link for the node, as in the paper"
_EIGHT = _HOW + "; honest baseline: every GPU fetches its slice over its own link, eight at once"


def _row(
    claim: str,
    published: float | None,
    simulated: float,
    band: tuple[float, float] | None,
    note: str,
    tier: Tier = "C",
    convention: str = "one link",
) -> Claim:
    low, high = band or (None, None)
    return Claim(NAME, claim, published, float(simulated), low, high, tier, convention, note)


def _exact(claim: str, published: float, simulated: float, note: str = "") -> Claim:
    """Tier A: within 1 %."""
    return _row(claim, published, simulated, (0.99 * published, 1.01 * published), note, "A")


def claims(sources: Sources) -> list[Claim]:
    """Switch times and capacities exactly, then end-to-end latency over a real replay."""
    return [
        *_switching(),
        *_capacity(sources.seed),
        *_end_to_end(sources.seed),
        *_long_answers(sources.seed),
        *_other_gpus(sources.seed),
        *_pool_size(sources.seed),
    ]


def _switching() -> Iterator[Claim]:
    node, h100, a100 = sn40l(), dgx("h100"), dgx("a100-80gb")
    yield _exact("model switch, A100 node, ms", 421.9, 1e3 * a100.switch_s, "13.5 GB, 32 GB/s")
    yield _exact("model switch, H100 node, ms", 210.9, 1e3 * h100.switch_s, "13.5 GB, 64 GB/s")
    yield _exact("model switch, SN40L, ms", 12.86, 1e3 * node.switch_s, "13.5 GB, 1.05 TB/s")
    note = "the paper claims {}, which is a switch in about 13.5 ms"
    yield _exact("switch, A100 over SN40L", 32.8, a100.switch_s / node.switch_s, note.format(31))
    yield _exact("switch, H100 over SN40L", 16.4, h100.switch_s / node.switch_s, note.format(15))
    eight = dgx("h100", 8).switch_s / node.switch_s
    note = "honest baseline: every GPU fetches its slice over its own link, eight at once"
    yield _row("switch, H100 over SN40L", None, eight, None, note, "A", "eight links")


def _capacity(seed: int) -> Iterator[Claim]:
    node, h100 = sn40l(), dgx("h100")
    yield _exact("models in the HBM of eight 80 GB GPUs", 47, h100.slots)
    yield _exact("models in the DDR of a node", 977, DDR_BYTES // MODEL_BYTES, "12 TiB, by bytes")
    nodes = np.ceil(FIGURES["footprint"].value / h100.slots)
    yield _exact("DGX nodes that hold 850 models in HBM", 19, nodes, "one SN40L node holds them")
    for box in (h100, node):
        miss = miss_share(requests(MODELS, seed), box.slots)
        claim = f"misses of an LRU of {box.slots} models of 150, uniform"
        note = "replayed; published: 1 - slots / models"
        yield _exact(claim, 1 - box.slots / MODELS, miss, note)


def _end_to_end(seed: int) -> Iterator[Claim]:
    node, h100, eight = sn40l(), dgx("h100"), dgx("h100", 8)
    even, zipf = requests(MODELS, seed), requests(MODELS, seed, 1.0)
    zipf_note = _ONE + "; exponent 1 assumed: popular models stay in HBM, switches weigh less"
    for batch, published in ((1, 2.8), (8, 3.7)):
        claim = f"end to end, H100 over SN40L, batch {batch}, 20 tokens"
        found = ratio(h100, node, even, batch, 20)
        yield _row(claim, published, found, _END_TO_END, _ONE)
        found = ratio(h100, node, zipf, batch, 20)
        yield _row(claim + ", Zipf", published, found, _END_TO_END, zipf_note)
        yield _row(claim, published, ratio(eight, node, even, batch, 20), None, _EIGHT,
                   convention="eight links")  # fmt: skip
    claim = "end to end, H100 over SN40L, batch 8, 20 tokens"
    longer = ratio(h100, node, even, 8, 20, 4 * PROMPT)
    yield _row(claim + ", prompt 512", None, longer, None, _ONE + ": here 512")
    roofline = ratio(h100, sn40l_at_roofline(), even, 8, 20)
    note = _ONE + ", but SN40L at 85 % of its HBM and prefill at 80 % of its peak"
    yield _row(claim, None, roofline, None, note, convention="one link, SN40L at its roofline")


def _long_answers(seed: int) -> Iterator[Claim]:
    node, h100 = sn40l(), dgx("h100")
    even = requests(MODELS, seed)
    same = replace(h100, gpus=None, prefill_s_per_token=node.prefill_s_per_token)
    same = replace(same, token_s=node.token_s)
    note = _ONE + "; both nodes given the same token time"
    limit = ratio(same, node, even, 1, 100_000)
    yield _row("end to end, 100,000 tokens, equal token times", 1.0, limit, (0.99, 1.01), note)
    for output, published in ((20, 1.5), (200, 2.3)):
        own = h100.run_s(PROMPT, output)
        for box, how in ((node, "measured"), (sn40l_at_roofline(), "at its roofline")):
            claim = f"one model, no switch, H100 over SN40L {how}, {output} tokens"
            note = _HOW + "; the paper takes GPU latencies published by others, not named here"
            yield _row(claim, published, own / box.run_s(PROMPT, output), None, note)
    for batch, published in ((1, 2.6), (8, 2.7)):
        found = ratio(h100, node, even, batch, 200)
        claim = f"end to end, H100 over SN40L, batch {batch}, 200 tokens"
        yield _row(claim, published, found, None, _ONE)


def _other_gpus(seed: int) -> Iterator[Claim]:
    node, a100 = sn40l(), dgx("a100-80gb")
    for batch, published in ((1, 4.8), (8, 6.6)):
        found = ratio(a100, node, requests(MODELS, seed), batch, 20)
        claim = f"end to end, A100 over SN40L, batch {batch}, 20 tokens"
        yield _row(claim, published, found, None, _ONE)


def _pool_size(seed: int) -> Iterator[Claim]:
    """Latency of one prompt as the pool of models grows."""
    node, h100 = sn40l(), dgx("h100")
    jump = last_flat_pool(h100, seed)
    note = _ONE + "; latency more than 5 % above that of a resident model"
    yield _row("models up to which an H100 node's latency is flat", 47, jump, (47, 47), note, "A")
    seconds = {}
    for box in (h100, node):
        for n_models in (20, 100, 900):
            miss = miss_share(requests(n_models, seed), box.slots)
            seconds[box.name, n_models] = latency_s(box, miss, 1, 20)
    for box in (h100, node):
        grown = seconds[box.name, 100] / seconds[box.name, 20]
        yield _row(
            f"latency with 100 models over that with 20, {box.name}", None, grown, None, _ONE
        )
    grown = seconds[node.name, 900] / seconds[node.name, 100]
    yield _row("latency with 900 models over that with 100, SN40L", None, grown, None, _ONE)
