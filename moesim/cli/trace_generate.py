"""What `moesim trace generate` does: fit to a trace, or draw from a popularity law."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moesim.cli import output
from moesim.cli.inputs import open_trace
from traces.errors import TraceError
from traces.routing import RoutingTrace, require_tokens

_TOKENS = 10_000
LAW_REQUEST_TOKENS = 256  # of every request that a law makes (traces/synth.py)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for, as typed; empty text and 0 mean "not said", None too."""

    source: str
    tokens: int
    requests: int
    zipf: float | None
    reuse: float | None
    model: str
    seed: int


def generated(wish: Wish) -> RoutingTrace:
    """The trace asked for.

    raises  TraceError when flags contradict each other, or for counts to fit to
    """
    if wish.tokens and wish.requests:
        raise TraceError("--tokens and --requests: give one of them")
    if wish.source and (wish.zipf is not None or wish.reuse is not None):
        raise TraceError("--zipf and --reuse make a trace without a source: leave TRACE out")
    return _like_source(wish) if wish.source else _by_law(wish)


def _like_source(wish: Wish) -> RoutingTrace:
    from traces import synth

    source = require_tokens(open_trace(wish.source, wish.model)[0], "fitting a generator")
    with output.progress(None, "fit and generate"):
        fitted = synth.fit(source, wish.seed)
        if wish.requests:
            return synth.generate(fitted, n_requests=wish.requests, seed=wish.seed)
        return synth.generate(fitted, n_tokens=wish.tokens or source.n_tokens, seed=wish.seed)


def _by_law(wish: Wish) -> RoutingTrace:
    from traces import synth
    from traces.models import load_model

    if not wish.model:
        raise TraceError("without TRACE, --model says how many layers and experts: pass it")
    spec = load_model(wish.model)
    made = synth.zipf_trace(
        wish.requests * LAW_REQUEST_TOKENS or wish.tokens or _TOKENS,
        spec.n_moe_layers,
        spec.n_experts,
        spec.top_k,
        exponent=1.0 if wish.zipf is None else wish.zipf,
        reuse=wish.reuse or 0.0,
        seed=wish.seed,
    )
    return replace(made, layers=spec.moe_layers, model=spec.name)
