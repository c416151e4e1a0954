"""Router hooks, prefill and sampled decode: the model and held-out text to routing arrays.

`capture` runs one request after the other; `capture_together` runs all of them side by side, which
a GPU needs to be quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from traces.data.model import TinyMoe
from traces.data.training import CPU_RUN, EncodedDomains, Run, window
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
        self._ids: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._hooks = [block.router.register_forward_hook(self._record) for block in model.blocks]

    def _record(self, router: nn.Module, inputs: Any, routed: Any) -> None:
        self._ids.append(routed.ids.to(torch.int16))
        self._weights.append(routed.weights.to(torch.float16))

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids int16 and weights float16, both [tokens, layers, top_k], of one forward pass."""
        ids, weights = torch.stack(self._ids, dim=1), torch.stack(self._weights, dim=1)
        taken = ids.cpu().numpy(), weights.cpu().numpy()
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
class Request:
    """What one request asks: the domain and tokens of its prompt, and how many to decode."""

    domain: str
    prompt: np.ndarray
    n_decode: int

    @property
    def n_tokens(self) -> int:
        """Prompt and decoded tokens."""
        return len(self.prompt) + self.n_decode


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
    generator = torch.Generator().manual_seed(plan.seed)
    recorder, rows = RouterRecorder(model), TokenLog()
    session = Session(model, recorder, rows, generator, plan.temperature)
    requests = draw_requests(held_out, plan)
    for index, request in enumerate(requests):
        run_request(session, index, request.prompt, request.n_decode)
    recorder.remove()
    trace = RoutingTrace(
        n_experts=model.config.n_experts,
        layers=tuple(range(model.config.n_layers)),
        model=name,
        capture="router hooks, torch on CPU, batch size 1, prefill then sampled decode",
        **rows.arrays(),
    )
    return trace, [request.domain for request in requests]


def draw_requests(held_out: EncodedDomains, plan: CapturePlan) -> list[Request]:
    """The requests of a plan; domains take turns."""
    rng = np.random.default_rng(plan.seed)
    requests = []
    for index, domain in enumerate(list(held_out) * plan.requests_per_domain):
        documents = held_out[domain]
        document = documents[index // len(held_out) % len(documents)]
        prompt = window(document, int(rng.integers(*plan.prompt_tokens, endpoint=True)), rng)
        n_decode = int(rng.integers(*plan.decode_tokens, endpoint=True))
        requests.append(Request(domain, prompt.astype(np.int64, copy=False), n_decode))
    return requests


@torch.no_grad()
def capture_together(
    model: TinyMoe, requests: list[Request], plan: CapturePlan, run: Run = CPU_RUN
) -> dict[str, np.ndarray]:
    """Run all requests side by side, each at the same position, from the same first token on.

    A request takes tokens of its prompt while there are any, then its own samples; so no padding
    is attended to, and each is routed as if it ran alone, up to rounding.

    returns  `topk`, `weights`, `request`, `position` and `phase` as in RoutingTrace, request after
             request; there is no `forward`, for the passes mix requests in prefill and decode
    """
    generator = torch.Generator(run.device).manual_seed(plan.seed)
    lengths = np.array([len(request.prompt) for request in requests])
    ends = np.array([request.n_tokens for request in requests])
    prompts = np.zeros((len(requests), lengths.max()), dtype=np.int64)
    for row, request in enumerate(requests):
        prompts[row, : lengths[row]] = request.prompt
    recorder, past, parts = RouterRecorder(model), model.empty_past(), []
    given, known = torch.from_numpy(prompts).to(run.device), torch.from_numpy(lengths)
    fed, first = given[:, : lengths.min()], 0
    known = known.to(run.device)
    while True:
        with run.autocast():
            logits, _ = model(fed, past)
        parts.append(_rows_of_pass(recorder.take(), first, (lengths, ends)))
        first += fed.shape[1]
        if first >= ends.max():
            break
        fed = sample(logits[:, -1], plan.temperature, generator)
        if first < prompts.shape[1]:
            fed = torch.where((first < known)[:, None], given[:, first : first + 1], fed)
    recorder.remove()
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((rows["position"], rows["request"]))
    return {name: column[order] for name, column in rows.items()}


def _rows_of_pass(
    routed: tuple[np.ndarray, np.ndarray], first: int, extent: tuple[np.ndarray, np.ndarray]
) -> dict[str, np.ndarray]:
    """Columns of one pass of all requests from position `first` on, without those that ended."""
    topk, weights = routed
    lengths, ends = extent
    n_positions = len(topk) // len(lengths)
    request = np.repeat(np.arange(len(lengths), dtype=np.int32), n_positions)
    position = np.tile(np.arange(first, first + n_positions, dtype=np.int32), len(lengths))
    phase = np.where(position < lengths[request], PREFILL, DECODE).astype(np.int8)
    columns: dict[str, np.ndarray] = {
        "topk": topk,
        "weights": weights,
        "request": request,
        "position": position,
        "phase": phase,
    }
    going = position < ends[request]
    return {name: column[going] for name, column in columns.items()}


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
    """Ids, int64[..., 1], drawn from softmax(logits / temperature) of each row of logits."""
    chances = (logits.float() / temperature).softmax(dim=-1)
    return torch.multinomial(chances, 1, generator=generator)
