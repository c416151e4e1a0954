"""BlockFFN: many tiny experts that stay on over neighbouring tokens, so a chunk needs few of them.

Every expert is a chain of two states with the published sparsity of one token (TLS 0.8) and of
eight (CLS 0.7). Decoding then runs on an edge device whose memory CPU and GPU share: a drafter
proposes the tokens of a chunk one by one, one pass of the model checks them all and reads the
union of their experts. All weights are resident; a pass is clocked by the offload simulator.

Assumed: speculation as a chain, each drafted token accepted with chance 0.75 given those before it
(EAGLE reports 0.7 to 0.8, recalled); a drafter of one layer as wide as the model, with an output
of 16,384 words (the authors' scripts); 512 tokens of context; 16-bit weights. The authors' scripts
run a 3 B model with trees of 32 tokens; here it is the 1.2 B one with chunks of 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from hwmodels.box import Box, load_box
from hwmodels.operators import AttentionShape, attention_decode, elementwise, gemm
from moesim.errors import SimulationError
from moesim.offload.policy import OffloadPolicy
from moesim.offload.prices import Weights, prices
from moesim.offload.simulate import simulate
from moesim.reproduce.claim import Claim, Tier
from moesim.reproduce.sources import Sources
from traces.layer_steps import forward_passes, layer_steps
from traces.markov import (
    Chain,
    Flags,
    activity_trace,
    chain_with,
    draw_activity,
    independent,
    sparsity,
)
from traces.model import ModelSpec
from traces.models import load_model
from traces.routing import PREFILL

NAME = "blockffn"
PAPER = "arXiv 2507.08771"

DEVICE, MODEL = "jetson-orin-nx", "blockffn-1.2b"
CHUNK = 8
TLS, CLS = 0.8, 0.7
PUBLISHED_CHAIN = Chain(0.0189, 0.0756)
ACCEPTANCE = 0.75
CONTEXT = 512
DRAFT_WORDS = 16_384
TOKENS = 1024  # of the drawn activity
BITS = 16.0


@dataclass(frozen=True, slots=True)
class Speculation:
    """One token that is known and chunk - 1 drafted ones, checked in one pass.

    acceptance  chance that a drafted token is right when all before it are
    """

    chunk: int = CHUNK
    acceptance: float = ACCEPTANCE

    def __post_init__(self) -> None:
        if self.chunk < 1 or not 0 <= self.acceptance <= 1:
            raise SimulationError(
                f"chunk={self.chunk}, acceptance={self.acceptance}: expected a chunk of 1 or more"
                " and a chance in 0..1"
            )

    @property
    def tokens(self) -> float:
        """New tokens a round: those accepted and the one the pass itself adds.

        source  Leviathan and others 2023: 1 + a + a^2 + ... + a^(chunk - 1)
        """
        return float(np.power(self.acceptance, np.arange(self.chunk)).sum())


def edge_box() -> Box:
    """The device."""
    return load_box(DEVICE)


def pass_seconds(model: ModelSpec, box: Box, active: Flags, chunk: int) -> float:
    """Mean seconds of a pass over `chunk` neighbouring tokens, all weights resident.

    active  bool[tokens, layers, experts], read once a pass by the union of the chunk
    """
    trace = activity_trace(active, top_k=model.n_experts, request_tokens=len(active))
    position = trace.position + np.int32(CONTEXT)
    if chunk > 1:
        trace = replace(trace, phase=np.full(len(active), PREFILL, np.int8))
    trace = replace(trace, position=position, layers=model.moe_layers)
    work = layer_steps(trace, forward_passes(trace, chunk_tokens=chunk if chunk > 1 else 0))
    resident = OffloadPolicy(pinned=np.ones(work.n_objects, np.bool_))
    done = simulate(work, prices(model, box, work, Weights(expert_bits=BITS)), resident)
    return float(done.pass_s[done.pass_tokens == chunk].mean())


def draft_seconds(model: ModelSpec, box: Box) -> float:
    """Seconds of one drafted token: the drafter reads all its weights.

    Two square matrices in front, attention with four, a gated dense part as wide as all experts
    together, the head of the words it may draft.
    """
    hidden, width = model.hidden_size, model.n_experts * model.expert_intermediate_size
    sides = (
        [(hidden, hidden)] * 6 + [(width, hidden)] * 2 + [(hidden, width), (DRAFT_WORDS, hidden)]
    )
    weights_s = sum(float(gemm(box.device, (1, n, k), "fp16").seconds) for n, k in sides)
    heads = model.attention.n_heads
    shape = AttentionShape(heads, heads, hidden // heads, hidden // heads)
    attention_s = float(attention_decode(box.device, shape, (1, CONTEXT), "fp16").seconds)
    return weights_s + attention_s + 4 * float(elementwise(box.device, 4 * hidden).seconds)


@dataclass(frozen=True, slots=True)
class Decoding:
    """Seconds a token of one way to decode."""

    pass_s: float
    draft_s: float = 0.0
    speculation: Speculation = Speculation(chunk=1)

    @property
    def token_s(self) -> float:
        """A round of drafting and one pass, over the tokens it yields."""
        drafted = self.speculation.chunk - 1
        return (self.pass_s + drafted * self.draft_s) / self.speculation.tokens


@dataclass(frozen=True, slots=True)
class Bench:
    """What is compared: one model on one box, with all experts or with those that are on."""

    model: ModelSpec
    box: Box
    active: Flags
    seed: int = 0

    def one_by_one(self, sparse: bool) -> Decoding:
        """Decoding without speculation."""
        return Decoding(pass_seconds(self.model, self.box, self._used(sparse)[:64], 1))

    def speculated(self, sparse: bool, how: Speculation) -> Decoding:
        """Decoding in chunks."""
        pass_s = pass_seconds(self.model, self.box, self._used(sparse), how.chunk)
        return Decoding(pass_s, draft_seconds(self.model, self.box), how)

    def _used(self, sparse: bool) -> Flags:
        return self.active if sparse else np.ones_like(self.active)


def bench(seed: int) -> Bench:
    """The model on its device, with activity drawn by the published chain."""
    model = load_model(MODEL)
    shape = (TOKENS, model.n_moe_layers, model.n_experts)
    return Bench(model, edge_box(), draw_activity(PUBLISHED_CHAIN, shape, seed), seed)


def claims(sources: Sources) -> list[Claim]:
    """Sparsity in closed form and drawn, ideal speed-ups, then decoding on the edge device."""
    on = bench(sources.seed)
    return [*_closed_forms(), *_drawn(on.active), *_decoding(on)]


def _row(
    claim: str,
    published: float | None,
    simulated: float,
    band: tuple[float, float] | None,
    note: str = "",
    tier: Tier = "C",
    convention: str = "synthetic, chains",
) -> Claim:
    low, high = band or (None, None)
    return Claim(NAME, claim, published, float(simulated), low, high, tier, convention, note)


def _exact(claim: str, published: float, simulated: float, within: float, note: str) -> Claim:
    band = (round(published - within, 6), round(published + within, 6))
    return _row(claim, published, simulated, band, note, "A", "identity")


def _closed_forms() -> Iterator[Claim]:
    note = "off at the first of 8 tokens and never turned on"
    plain = independent(1 - TLS).sparsity(CHUNK)
    yield _exact("8-token sparsity (CLS) of independent experts", 0.168, plain, 0.0005, note)
    tls, cls = PUBLISHED_CHAIN.sparsity(), PUBLISHED_CHAIN.sparsity(CHUNK)
    yield _exact("token sparsity (TLS) of the chain", TLS, tls, 0.01, "closed form")
    yield _exact("8-token sparsity (CLS) of the chain", CLS, cls, 0.01, f"closed form: {note}")
    solved = chain_with(TLS, CLS, CHUNK)
    note = "solved from TLS and CLS; printed to four decimals"
    for name, published, ours in (
        ("on", PUBLISHED_CHAIN.turn_on, solved.turn_on),
        ("off", PUBLISHED_CHAIN.turn_off, solved.turn_off),
    ):
        yield _exact(f"chance that an expert turns {name}", published, ours, 0.00005, note)


def _drawn(active: Flags) -> Iterator[Claim]:
    n_tokens, n_layers, n_experts = active.shape
    note = f"{n_tokens} tokens, {n_layers} layers of {n_experts} experts; every window of a request"
    one, chunk = sparsity(active), sparsity(active, CHUNK, 256)
    yield _exact("TLS of drawn activity", TLS, one, 0.01, note)
    yield _exact("CLS of drawn activity", CLS, chunk, 0.01, note)
    note = "weights of all experts over those read; printed to one decimal"
    yield _exact("ideal speed-up of the experts, 1 token", 5.0, 1 / (1 - TLS), 0.05, note)
    yield _exact("ideal speed-up of the experts, 8 tokens", 3.3, 1 / (1 - CLS), 0.05, note)
    for name, published, ours in (("1 token", 5.0, one), ("8 tokens", 3.3, chunk)):
        why = f"{note}; drawn activity"
        yield _row(f"the same as drawn, {name}", published, 1 / (1 - ours), None, why)


def _decoding(on: Bench) -> Iterator[Claim]:
    dense = on.one_by_one(sparse=False)
    ours = on.speculated(True, Speculation())
    note = (
        f"{MODEL} on {DEVICE}, unified memory, 16 bits; one by one with all experts in"
        f" {1e3 * dense.token_s:.1f} ms a token; a chunk of {CHUNK} yields"
        f" {ours.speculation.tokens:.2f} tokens at an assumed acceptance of {ACCEPTANCE}, in"
        f" {1e3 * ours.pass_s:.1f} ms and {CHUNK - 1} drafts of {1e3 * ours.draft_s:.1f} ms; the"
        " authors' scripts run a 3 B model with trees of 32 tokens"
    )
    found = dense.token_s / ours.token_s
    yield _row("speed of decoding in chunks over dense decoding", 3.67, found, (2.5, 4.0), note)
    for acceptance in (0.6, 0.9):
        how = replace(ours, speculation=Speculation(acceptance=acceptance))
        claim = f"the same at an acceptance of {acceptance}"
        yield _row(claim, None, dense.token_s / how.token_s, None, note)
    sparse = on.one_by_one(sparse=True)
    plain = on.speculated(False, Speculation())
    note = f"{MODEL} on {DEVICE}"
    for claim, slow, fast in (
        ("sparse kernels alone, one by one, over dense", dense, sparse),
        ("speculation alone, all experts, over dense", dense, plain),
        ("sparse kernels over dense ones, both in chunks", plain, ours),
    ):
        yield _row(claim, None, slow.token_s / fast.token_s, None, note)
    wide = on.speculated(True, Speculation(chunk=32))
    why = f"{note}; CLS_32 is {PUBLISHED_CHAIN.sparsity(32):.2f}; a chain of 31 drafts, no tree"
    yield _row("a chunk of 32 over dense", None, dense.token_s / wide.token_s, None, why)
    anew = draw_activity(independent(1 - TLS), on.active.shape, on.seed)
    memoryless = replace(on, active=anew)
    found = dense.token_s / memoryless.speculated(True, Speculation()).token_s
    why = f"{note}; the same TLS, experts drawn anew for every token"
    yield _row("chunks of 8 over dense when experts do not stay on", None, found, None, why)
