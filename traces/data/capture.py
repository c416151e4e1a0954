"""Router hooks, prefill and sampled decode: the model and held-out text to routing arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from traces.data.model import TinyMoe
from traces.data.training import EncodedDomains, window
from traces.routing import DECODE, PREFILL, RoutingTrace


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """Which requests to run; lengths are drawn evenly between both ends, inclusive."""

    requests_per_domain: int = 13
    prompt_tokens: tuple[int, int] = (64, 256)
    decode_tokens: tuple[int, int] = (32, 128)
    temperature: float = 0.8
    seed: int = 11


class RouterRecorder:
    """Hooks every router of a model; holds what each layer chose since the last `take`."""

    def __init__(self, model: TinyMoe) -> None:
        self._ids: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []
        self._hooks = [block.router.register_forward_hook(self._record) for block in model.blocks]

    def _record(self, router: nn.Module, inputs: Any, routed: Any) -> None:
        self._ids.append(routed.ids.numpy().astype(np.int16))
        self._weights.append(routed.weights.numpy().astype(np.float16))

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids int16 and weights float16, both [tokens, layers, top_k], of one forward pass."""
        taken = np.stack(self._ids, axis=1), np.stack(self._weights, axis=1)
        self._ids.clear()
        self._weights.clear()
        return taken

    def remove(self) -> None:
        """Unhook."""
        for hook in self._hooks:
            hook.remove()


class TokenLog:
    """Rows of the trace to be, one forward pass after the other."""

    def __init__(self) -> None:
        self._rows: dict[str, list[np.ndarray]] = {}
        self._n_forwards = 0

    def add(
        self, request: int, start: int, phase: int, routed: tuple[np.ndarray, np.ndarray]
    ) -> None:
        """Append one forward pass over tokens start, start + 1, ... of a request."""
        topk, weights = routed
        n_tokens = len(topk)
        columns = {
            "topk": topk,
            "weights": weights,
            "request": np.full(n_tokens, request, dtype=np.int32),
            "position": np.arange(start, start + n_tokens, dtype=np.int32),
            "phase": np.full(n_tokens, phase, dtype=np.int8),
            "forward": np.full(n_tokens, self._n_forwards, dtype=np.int64),
        }
        for name, column in columns.items():
            self._rows.setdefault(name, []).append(column)
        self._n_forwards += 1

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything added so far, by field of RoutingTrace."""
        return {name: np.concatenate(parts) for name, parts in self._rows.items()}


@dataclass(frozen=True, slots=True)
class Session:
    """A hooked model, where its routing goes, and how it samples."""

    model: TinyMoe
    recorder: RouterRecorder
    rows: TokenLog
    generator: torch.Generator
    temperature: float


def capture(
    model: TinyMoe, held_out: EncodedDomains, plan: CapturePlan, name: str
) -> tuple[RoutingTrace, list[str]]:
    """Run every request alone, as a server with batch size one would.

    returns  the trace and the domain of each request; domains take turns, so that any
             contiguous part of the trace has all of them
    """
    rng = np.random.default_rng(plan.seed)
    generator = torch.Generator().manual_seed(plan.seed)
    recorder, rows = RouterRecorder(model), TokenLog()
    session = Session(model, recorder, rows, generator, plan.temperature)
    domains = list(held_out) * plan.requests_per_domain
    for request, domain in enumerate(domains):
        documents = held_out[domain]
        document = documents[request // len(held_out) % len(documents)]
        prompt = window(document, int(rng.integers(*plan.prompt_tokens, endpoint=True)), rng)
        n_decode = int(rng.integers(*plan.decode_tokens, endpoint=True))
        run_request(session, request, prompt, n_decode)
    recorder.remove()
    trace = RoutingTrace(
        n_experts=model.config.n_experts,
        layers=tuple(range(model.config.n_layers)),
        model=name,
        capture="router hooks, torch on CPU, batch size 1, prefill then sampled decode",
        **rows.arrays(),
    )
    return trace, domains


@torch.no_grad()
def run_request(session: Session, request: int, prompt: np.ndarray, n_decode: int) -> list[int]:
    """Prefill the prompt, then feed back n_decode sampled tokens; the sampled tokens."""
    past = session.model.empty_past()
    logits, _ = session.model(torch.from_numpy(prompt)[None], past)
    session.rows.add(request, 0, PREFILL, session.recorder.take())
    sampled = []
    for position in range(len(prompt), len(prompt) + n_decode):
        token = sample(logits[0, -1], session.temperature, session.generator)
        logits, _ = session.model(token[None], past)
        session.rows.add(request, position, DECODE, session.recorder.take())
        sampled.append(int(token))
    return sampled


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One id, int64[1], drawn from softmax(logits / temperature)."""
    chances = (logits / temperature).softmax(dim=-1)
    return torch.multinomial(chances, 1, generator=generator)
