"""What `moesim trace generate` does: fit to a trace, or draw from a popularity law."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.cli import output
from moesim.cli.inputs import open_trace
from traces.errors import TraceError
from traces.routing import RoutingTrace, require_tokens

_TOKENS = 10_000


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for, as typed; empty text and 0 mean "not said"."""

    source: str
    tokens: int
    requests: int
    zipf: float
    reuse: float
    model: str
    seed: int


def generated(wish: Wish) -> RoutingTrace:
    """The trace asked for.

    raises  TraceError when both tokens and requests are given, or counts to fit to
    """
    if wish.tokens and wish.requests:
        raise TraceError("--tokens and --requests: give one of them")
    return _like_source(wish) if wish.source else _from_law(wish)


def _like_source(wish: Wish) -> RoutingTrace:
    from traces import synth

    source = require_tokens(open_trace(wish.source, wish.model)[0], "fitting a generator")
    with output.progress(None, "fit and generate"):
        fitted = synth.fit(source, wish.seed)
        if wish.requests:
            return synth.generate(fitted, n_requests=wish.requests, seed=wish.seed)
        return synth.generate(fitted, n_tokens=wish.tokens or source.n_tokens, seed=wish.seed)


def _from_law(wish: Wish) -> RoutingTrace:
    raise NotImplementedError
