"""One forward pass of a serving engine on its busiest rank, as a list of operators.

A pass decodes one token of some sequences and, in the same launch, computes chunks of prompts. The
operators are named by family and number format only; `step_prices.py` finds who prices them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hwmodels.fitted.benchmark_routing import mean_routed
from hwmodels.fitted.experts import ROUTED
from hwmodels.fitted.parts import Floats, Work, full_length
from hwmodels.fitted.tables import BITS
from moesim.errors import SimulationError
from traces.model import ModelSpec

ACTIVATION_BYTES = 2.0  # hidden states are bf16 between operators
LOGIT_BYTES = 4.0
SAMPLING_PASSES = 3.0  # over the logits: largest, sum of exponentials, draw
EXPERTS, ELEMENTWISE, ALL_REDUCE = "experts", "elementwise", "all_reduce"
ALL_GATHER, REDUCE_SCATTER = "all_gather", "reduce_scatter"


@dataclass(frozen=True, slots=True)
class Ranks:
    """How a model is split: attention_tp * attention_dp = expert_tp * expert_ep devices."""

    attention_tp: int = 1
    attention_dp: int = 1
    expert_tp: int = 1
    expert_ep: int = 1

    def __post_init__(self) -> None:
        sizes = (self.attention_tp, self.attention_dp, self.expert_tp, self.expert_ep)
        if min(sizes) < 1 or self.n_devices != self.expert_tp * self.expert_ep:
            raise SimulationError(
                f"attention tp {sizes[0]} x dp {sizes[1]} and experts tp {sizes[2]} x ep {sizes[3]}"
                " must be the same number of devices"
            )

    @property
    def n_devices(self) -> int:
        """Devices in all."""
        return self.attention_tp * self.attention_dp


@dataclass(frozen=True, slots=True)
class Formats:
    """Names of number formats as in the operator tables ("bfloat16", "fp8_block", ...).

    gemm     attention projections, shared experts and dense layers; experts, routed ones
    cache    keys and values
    routing  law of the tokens of each expert, see hwmodels/fitted/benchmark_routing.py
    """

    gemm: str = "bfloat16"
    experts: str = "bfloat16"
    cache: str = "bfloat16"
    routing: str = "power_law_1.01"


@dataclass(frozen=True, slots=True)
class Passes:
    """What forward passes carry, float64[n] each, on the rank with most of it.

    sequences     that decode; context, tokens in the cache of each
    prompts       of which a chunk is computed; chunk, new tokens of each; cached, before the chunk
    group_tokens  tokens of all ranks of the expert group
    """

    sequences: Floats
    context: Floats
    prompts: Floats
    chunk: Floats
    cached: Floats
    group_tokens: Floats

    @property
    def tokens(self) -> Floats:
        """Tokens of the rank, float64[n]."""
        return self.sequences + self.prompts * self.chunk

    @property
    def outputs(self) -> Floats:
        """Sequences that need logits; of each prompt, one."""
        return self.sequences + self.prompts


@dataclass(frozen=True, slots=True)
class Operator:
    """Equal operators of n passes.

    family  of hwmodels/fitted, or ELEMENTWISE, ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER
    dtype   its number format; "bfloat16 kv fp8" for attention
    times   how often a pass runs it
    work    columns of the family, float64[n]; "bytes" of the families above, with "ranks"
    present bool[n], passes that have any of it
    """

    name: str
    family: str
    dtype: str
    times: float
    work: Work
    present: np.ndarray


def operators(model: ModelSpec, ranks: Ranks, formats: Formats, passes: Passes) -> list[Operator]:
    """The operators of passes of a model on the busiest rank.

    raises  SimulationError for a split that does not fit the model or a format that is not known
    """
    _check(model, ranks, formats)
    step = _Step(model, ranks, formats, passes)
    found = step.attention() + step.routed_layers() + step.dense_layers() + step.ends()
    return [operator for operator in found if operator.times > 0 and operator.present.any()]


def _check(model: ModelSpec, ranks: Ranks, formats: Formats) -> None:
    for name in (formats.gemm, formats.experts, formats.cache):
        if name not in BITS:
            raise SimulationError(f"format {name!r} is unknown, known: {', '.join(BITS)}")
    a = model.attention
    divided = (
        ("heads", a.n_heads, ranks.attention_tp),
        ("experts", model.n_experts, ranks.expert_ep),
        ("expert width", model.expert_intermediate_size, ranks.expert_tp),
    )
    for name, size, parts in divided:
        if size % parts:
            raise SimulationError(f"model {model.name}: {size} {name} do not split in {parts}")
    if model.n_mixer_layers or model.n_encoder_layers or a.n_experts > 1:
        raise SimulationError(f"model {model.name}: only decoders with attention layers are priced")


@dataclass(frozen=True, slots=True)
class _Step:
    model: ModelSpec
    ranks: Ranks
    formats: Formats
    passes: Passes

    def attention(self) -> list[Operator]:
        """All attention layers, norms before them and the sum over ranks after them."""
        inner = self._latent() if self.model.attention.kv_lora_rank else self._grouped()
        tokens, hidden = self.passes.tokens, self.model.hidden_size
        return [
            self._norm("attention norm", self.model.n_layers),
            *inner,
            *self._sum("attention sum", tokens * hidden, self.model.n_layers),
        ]

    def _grouped(self) -> list[Operator]:
        a, tp, layers = self.model.attention, self.ranks.attention_tp, self.model.n_layers
        heads, kv_heads = a.n_heads // tp, max(a.n_kv_heads // tp, 1)
        width = heads * a.head_dim * (2 if a.output_gate else 1)
        keys = kv_heads * (a.head_dim + a.v_head_dim)
        hidden = self.model.hidden_size
        sliding = a.n_sliding_layers if a.sliding_window else 0
        shape: dict[str, float] = {
            "heads": heads, "kv_heads": kv_heads, "head_dim": a.head_dim,
        }  # fmt: skip
        moved = self.passes.tokens * (width + keys) * 2 * ACTIVATION_BYTES
        found = [
            self._gemm("query, key, value", (width + keys, hidden), layers),
            self._elementwise("rotary and cache", moved, layers),
        ]
        for name, window, times in (
            ("attention", 0, layers - sliding), ("windowed attention", a.sliding_window, sliding)
        ):  # fmt: skip
            found += self._attend(name, "attention", times, shape | {"window": window})
        return [*found, self._gemm("output", (hidden, heads * a.v_head_dim), layers)]

    def _latent(self) -> list[Operator]:
        """Multi-head latent attention: absorbed in decode, expanded in prefill."""
        a, layers = self.model.attention, self.model.n_layers
        hidden, heads = self.model.hidden_size, a.n_heads // self.ranks.attention_tp
        latent, tokens = a.kv_lora_rank + a.qk_rope_dim, self.passes.tokens
        down, query = a.q_lora_rank + latent, heads * (a.qk_nope_dim + a.qk_rope_dim)
        shape: dict[str, float] = {
            "heads": heads, "kv_rank": a.kv_lora_rank, "rope_dim": a.qk_rope_dim,
            "nope_dim": a.qk_nope_dim, "v_dim": a.v_head_dim,
            "tensor_parallel": self.ranks.attention_tp,
        }  # fmt: skip
        decoded, prefilled = self.passes.sequences, self.passes.prompts * self.passes.chunk
        absorb = replace(self, formats=replace(self.formats, gemm="bfloat16"))
        return [
            self._gemm("down projections", (down, hidden), layers),
            self._elementwise("latent norms", tokens * down * 2 * ACTIVATION_BYTES, layers),
            self._gemm("query up", (query, a.q_lora_rank or hidden), layers),
            self._elementwise("rotary and cache", tokens * (query + latent) * 2.0, layers),
            absorb._gemm("absorb", (heads * a.kv_lora_rank, a.qk_nope_dim), layers, decoded),
            absorb._gemm("absorb", (heads * a.v_head_dim, a.kv_lora_rank), layers, decoded),
            self._gemm("key, value up", (heads * (a.qk_nope_dim + a.v_head_dim), a.kv_lora_rank),
                       layers, prefilled),
            *self._attend("latent attention", "latent", layers, shape),
            self._gemm("output", (hidden, heads * a.v_head_dim), layers),
        ]  # fmt: skip

    def _attend(
        self, name: str, family: str, times: float, shape: dict[str, float]
    ) -> list[Operator]:
        p, kv = self.passes, BITS[self.formats.cache][0]
        bits = {"kv_bits": kv, "activation_bits": 16.0}
        dtype = f"bfloat16 kv {self.formats.cache}"
        decode = {"batch": p.sequences, "new_tokens": 1.0, "cached_tokens": p.context}
        prefill = {"batch": p.prompts, "new_tokens": p.chunk, "cached_tokens": p.cached + p.chunk}
        return [
            self._operator(f"{name}, decode", f"{family}_decode", dtype, times,
                           {**decode, **shape, **bits}, p.sequences > 0),
            self._operator(f"{name}, prefill", f"{family}_prefill", dtype, times,
                           {**prefill, **shape, **bits}, p.prompts > 0),
        ]  # fmt: skip

    def routed_layers(self) -> list[Operator]:
        """Norm, router, routed and shared experts, and the sum over ranks of each MoE layer."""
        m, layers, tokens = self.model, self.model.n_moe_layers, self.passes.group_tokens
        own = self.passes.tokens
        gate = replace(self, formats=replace(self.formats, gemm="bfloat16"))
        gathers = self.ranks.attention_dp > 1
        moved = tokens * m.hidden_size * ACTIVATION_BYTES
        found = [
            self._norm("expert norm", layers),
            gate._gemm("router", (m.n_experts, m.hidden_size), layers),
            self._elementwise("top-k", own * (m.n_experts * 4.0 + m.top_k * 8.0), layers),
            self._experts(layers),
        ]
        if gathers:
            found += [self._collective("dispatch", ALL_GATHER, moved, layers),
                      self._collective("combine", REDUCE_SCATTER, moved, layers)]  # fmt: skip
        if m.shared_intermediate_size:
            # Data-parallel attention keeps whole shared experts on every rank.
            parts = self.ranks.attention_tp
            found += self._feed_forward("shared", m.shared_intermediate_size // parts, layers)
            found.append(self._elementwise("add shared", own * m.hidden_size * 6.0, layers))
        if not gathers:
            found += self._sum("expert sum", own * m.hidden_size, layers)
        return found

    def _experts(self, layers: int) -> Operator:
        m, stored = self.model, BITS[self.formats.experts]
        tokens = np.maximum(np.rint(self.passes.group_tokens), 1)
        work = {
            "tokens": tokens, "hidden": m.hidden_size, "top_k": m.top_k, "experts": m.n_experts,
            "intermediate": m.expert_intermediate_size // self.ranks.expert_tp,
            "local_experts": m.n_experts // self.ranks.expert_ep, "matrices": m.ffn_matrices,
            "weight_bits": stored[0], "activation_bits": stored[1],
        }  # fmt: skip
        counts = expert_counts(m, self.ranks.expert_ep, self.formats.routing, tokens)
        present = self.passes.group_tokens > 0
        return self._operator(
            "routed experts", EXPERTS, self.formats.experts, layers, work | counts, present
        )

    def dense_layers(self) -> list[Operator]:
        """Layers with one feed-forward network for all tokens."""
        layers = self.model.n_layers - self.model.n_moe_layers
        inner = self.model.dense_intermediate_size // self.ranks.attention_tp
        matrices = self.model.dense_ffn_matrices or self.model.ffn_matrices
        return [
            self._norm("dense norm", layers),
            *self._feed_forward("dense", inner, layers, matrices),
            *self._sum("dense sum", self.passes.tokens * self.model.hidden_size, layers),
        ]

    def _feed_forward(self, name: str, inner: int, times: int, matrices: int = 3) -> list[Operator]:
        hidden, tokens = self.model.hidden_size, self.passes.tokens
        wide = inner * (matrices - 1)
        return [
            self._gemm(f"{name} up", (wide, hidden), times),
            self._elementwise(f"{name} activation", tokens * (wide + inner) * 2.0, times),
            self._gemm(f"{name} down", (hidden, inner), times),
        ]

    def ends(self) -> list[Operator]:
        """Embedding before all layers; norm, head, gathering of logits and sampling after."""
        p, m, tp = self.passes, self.model, self.ranks.attention_tp
        vocab = -(-m.vocab_size // tp)
        head = replace(self, formats=replace(self.formats, gemm="bfloat16"))
        logits = p.outputs * m.vocab_size
        return [
            self._elementwise("embedding", p.tokens * m.hidden_size * 4.0, 1),
            *self._sum("embedding sum", p.tokens * m.hidden_size, 1),
            self._norm("last norm", 1),
            head._gemm("head", (vocab, m.hidden_size), 1, p.outputs),
            self._collective("gather logits", ALL_GATHER, logits * ACTIVATION_BYTES, 1, tp),
            self._elementwise("sampling", logits * LOGIT_BYTES * SAMPLING_PASSES, 1),
        ]

    def _sum(self, name: str, values: Floats, times: int) -> list[Operator]:
        tp = self.ranks.attention_tp
        if tp == 1:
            return []
        return [self._collective(name, ALL_REDUCE, values * ACTIVATION_BYTES, times, tp)]

    def _collective(
        self, name: str, family: str, n_bytes: Floats, times: int, group: int = 0
    ) -> Operator:
        ranks = group or self.ranks.n_devices
        work = {"bytes": n_bytes, "ranks": float(ranks)}
        present = (n_bytes > 0) & (ranks > 1)
        return self._operator(name, family, "", times, work, present)

    def _gemm(
        self, name: str, sides: tuple[int, int], times: float, rows: Floats | None = None
    ) -> Operator:
        n, k = sides
        m = self.passes.tokens if rows is None else rows
        stored, computed = BITS[self.formats.gemm]
        work = {"m": np.maximum(m, 1), "n": n, "k": k, "weight_bits": stored,
                "activation_bits": computed}  # fmt: skip
        return self._operator(name, "gemm", self.formats.gemm, times, work, m > 0)

    def _norm(self, name: str, times: int) -> Operator:
        """Add to the residual and normalise: two in, two out."""
        n_bytes = self.passes.tokens * self.model.hidden_size * 4 * ACTIVATION_BYTES
        return self._elementwise(name, n_bytes, times)

    def _elementwise(self, name: str, n_bytes: Floats, times: int) -> Operator:
        return self._operator(name, ELEMENTWISE, "", times, {"bytes": n_bytes}, n_bytes > 0)

    def _operator(
        self, name: str, family: str, dtype: str, times: float, work: dict[str, object],
        present: np.ndarray,
    ) -> Operator:  # fmt: skip
        n = len(self.passes.sequences)
        columns = {key: _column(value, n) for key, value in work.items()}
        return Operator(name, family, dtype, float(times), columns, full_length(present, n))


def _column(value: object, n: int) -> Floats:
    if isinstance(value, np.ndarray) and value.shape == (n,):
        return value
    if isinstance(value, int | float):
        return np.full(n, float(value))
    return full_length(np.atleast_1d(np.asarray(value, np.float64)), n)


def expert_counts(model: ModelSpec, ranks: int, routing: str, tokens: Floats) -> dict[str, Floats]:
    """The columns ROUTED of the busiest rank for float64[n] tokens of the group."""
    sizes, place = np.unique(tokens.astype(np.int64), return_inverse=True)
    of_size = np.array(
        [mean_routed(int(n), model.n_experts, model.top_k, ranks, routing) for n in sizes]
    )
    return dict(zip(ROUTED, of_size[place].T, strict=True))
