"""Run tokens through the stack, one after another, and time every step."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from moesim_kernels.errors import KernelError
from moesim_kernels.offload.compute import dense_part, expert_part, normalised
from moesim_kernels.offload.policy import Ids, Policy, most_frequent, policy_of
from moesim_kernels.offload.reader import Background, Inline, Reader
from moesim_kernels.offload.robbed import Watch
from moesim_kernels.offload.stack import Stack, StackSpec
from moesim_kernels.offload.storage import Tier, open_tier

NS = 1e-9
FULLY_RUN = 2  # of the warm-up tokens; of the others only the books are kept
Seconds = npt.NDArray[np.float64]
AnyIds = npt.NDArray[np.integer[Any]]
Ahead = list[list[list[int]]]  # of each token and layer, the experts expected in the next


@dataclass(frozen=True, slots=True)
class RunOptions:
    """warm_up  tokens at the beginning that are not timed: they fill the slots, and `static` pins
             their most frequent experts (with 0 it pins those of all tokens: that looks ahead)
    tier     one of storage.KINDS
    """

    warm_up: int = 0
    tier: str = "auto"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run took, for the tokens after the warm-up.

    step_s      float64[tokens], a token through all layers
    layer_s     float64[tokens, layers]
    stall_s     float64[tokens, layers], waiting for reads; part of layer_s
    hits        int64[tokens, layers], chosen experts that were resident or on their way; late,
                those of them that were waited for; misses, chosen experts read on demand
    prefetched  int64[tokens, layers], reads ahead that this layer asked for
    dropped     int64[tokens], reads ahead given up in this step before they began
    bytes_read  int64[tokens], of all reads asked for and not dropped
    busy_s      float64[tokens], of the reads that ended during this step
    robbed_s    float64[tokens], threads of the run ready but without a core, since other programs
                held them: part of step_s, and the sign of a step that tells little
    outputs     what left the last layer, [tokens, hidden]
    buffer_bytes  of all slots; tier, what was read from
    """

    policy: str
    tier: str
    buffer_bytes: int
    step_s: Seconds
    layer_s: Seconds
    stall_s: Seconds
    hits: Ids
    late: Ids
    misses: Ids
    prefetched: Ids
    dropped: Ids
    bytes_read: Ids
    busy_s: Seconds
    robbed_s: Seconds
    outputs: torch.Tensor

    @property
    def hit_rate(self) -> float:
        """Hits among all chosen experts."""
        return float(self.hits.sum() / (self.hits.sum() + self.misses.sum()))


def run_stack(
    stack: Stack,
    topk: AnyIds,
    policy: str,
    slots: int,
    predicted: AnyIds | None = None,
    options: RunOptions | None = None,
) -> Measured:
    """Run tokens through a stack, experts read by a policy, every step timed; torch on one thread.

    topk       int[tokens, layers, k], the experts of each token, all of a layer different
    policy     one of policy.POLICIES
    slots      experts of each layer that can be resident
    predicted  int[tokens, layers, p], experts expected in each layer, -1 for none; those of a
               layer are used when the layer before it begins its experts, those of the first not
               at all; read by `lru_prefetch` alone, which needs it
    raises     KernelError naming what does not fit; OSError where a read fails
    """
    with Session(stack, topk, policy, slots, predicted, options) as session:
        session.advance(session.n_tokens)
        return session.measured()


@contextmanager
def quiet() -> Iterator[None]:
    """One thread of torch, no gradients and no garbage collection inside the block."""
    threads, collects = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    gc.disable()
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)
        if collects:
            gc.enable()


class _Log:
    """One row a token: what `Measured` hands out."""

    def __init__(self, n_tokens: int, n_layers: int) -> None:
        self.step_s, self.busy_s, self.robbed_s = np.zeros((3, n_tokens))
        self.dropped = np.zeros(n_tokens, np.int64)
        self.layer_s, self.stall_s = np.zeros((2, n_tokens, n_layers))
        counts = np.zeros((4, n_tokens, n_layers), np.int64)
        self.hits, self.late, self.misses, self.prefetched = counts


class Session:
    """A run that can stop between tokens: who decides, who reads, what it took; see `run_stack`.

    n_tokens  timed in all
    """

    def __init__(
        self,
        stack: Stack,
        topk: AnyIds,
        policy: str,
        slots: int,
        predicted: AnyIds | None = None,
        options: RunOptions | None = None,
    ) -> None:
        options = RunOptions() if options is None else options
        spec, warm_up = stack.spec, options.warm_up
        ids = checked_ids(spec, topk, slots, warm_up)
        ahead = checked_ahead(spec, predicted, ids, slots, needed=policy == "lru_prefetch")
        pinned = most_frequent(ids[: warm_up or None], spec.n_experts, slots)
        self._name, self._spec = policy, spec
        self._policy = policy_of(policy, spec, slots, pinned)
        self._skipped, self._done = min(warm_up, FULLY_RUN), 0
        begin = warm_up - self._skipped
        self.n_tokens = len(ids) - warm_up
        self._chosen, self._expected = ids[begin:].tolist(), ahead[begin:]
        self._log = _Log(len(ids) - begin, spec.n_layers)
        with ExitStack() as held:
            self._tier = held.enter_context(
                closing(open_tier(stack, self._policy.n_slots, options.tier))
            )
            _fill_slots(self._tier, self._policy, ids[:begin], ahead[:begin])
            background = self._policy.background
            self._reader: Reader = Background(self._tier) if background else Inline(self._tier)
            held.callback(self._reader.close)
            self._take_along(stack, begin)
            self.advance(self._skipped)
            self._held = held.pop_all()

    def _take_along(self, stack: Stack, begin: int) -> None:
        """Bring what computes without a tier to where it computes."""
        device = self._tier.device
        self._dense = [(up.to(device), down.to(device)) for up, down in stack.dense]
        self._inputs = stack.inputs(begin + len(self._chosen))[begin:].to(device)
        self._outputs = torch.zeros_like(self._inputs)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def advance(self, n_tokens: int) -> None:
        """Run the next tokens, at most those that are left; no read is under way afterwards."""
        first, self._done = self._done, min(self._done + n_tokens, len(self._chosen))
        reader, log = self._reader, self._log
        with quiet(), closing(Watch()) as watch:
            for row in range(first, self._done):
                n_read, dropped = len(reader.taken), reader.dropped
                robbed_s = watch.robbed_s() + reader.robbed_s()
                self._outputs[row] = self._step(row)[0]
                log.robbed_s[row] = watch.robbed_s() + reader.robbed_s() - robbed_s
                log.busy_s[row] = sum(read.seconds for read in reader.taken[n_read:])
                log.dropped[row] = reader.dropped - dropped
            reader.drain()

    def measured(self) -> Measured:
        """What the tokens run so far took, those of the warm-up left out."""
        log = self._log
        reads = (log.misses + log.prefetched).sum(1) - log.dropped
        columns = {
            "step_s": log.step_s, "layer_s": log.layer_s, "stall_s": log.stall_s,
            "hits": log.hits, "late": log.late, "misses": log.misses,
            "prefetched": log.prefetched, "dropped": log.dropped,
            "bytes_read": reads * self._spec.expert_bytes, "busy_s": log.busy_s,
            "robbed_s": log.robbed_s, "outputs": self._outputs.cpu(),
        }  # fmt: skip
        timed: dict[str, Any] = {
            name: column[self._skipped : self._done] for name, column in columns.items()
        }
        n_bytes = len(self._tier.weights) * self._spec.expert_bytes
        return Measured(self._name, self._tier.kind, n_bytes, **timed)

    def _step(self, row: int) -> torch.Tensor:
        """One token through all layers; the device has finished it when the clock stops."""
        x, chosen, expected = self._inputs[row : row + 1], self._chosen[row], self._expected[row]
        began = before = time.perf_counter_ns()
        for layer, (of_layer, of_next) in enumerate(zip(chosen, expected, strict=True)):
            x = self._layer((row, layer), x, of_layer, of_next)
            now = time.perf_counter_ns()
            self._log.layer_s[row, layer] = (now - before) * NS
            before = now
        self._tier.settle()
        self._log.step_s[row] = (time.perf_counter_ns() - began) * NS
        return x

    def _layer(
        self, at: tuple[int, int], x: torch.Tensor, chosen: list[int], expected: list[int]
    ) -> torch.Tensor:
        """One token through one layer: its experts are known after the dense part."""
        tier, reader, log = self._tier, self._reader, self._log
        x = dense_part(x, self._dense[at[1]])
        tier.settle()
        slots, order, demand, ahead = self._policy.decide(at[1], chosen, expected)
        n_hits = len(order) - len(demand)
        late = reader.hurry([slots[i] for i in order[:n_hits]])
        reader.ask(demand)
        reader.ask_ahead(ahead)
        if late:
            order = sorted(order[:n_hits], key=lambda i: slots[i] in late) + order[n_hits:]
        entering = normalised(x)
        results, stall_s = [x] * len(order), 0.0
        for i in order:
            stall_s += reader.wait(slots[i])
            results[i] = expert_part(entering, tier.weights[slots[i]])
        log.stall_s[at], log.late[at] = stall_s, len(late)
        log.hits[at], log.misses[at], log.prefetched[at] = n_hits, len(demand), len(ahead)
        return x + torch.cat(results).mean(0, keepdim=True)


def checked_ids(spec: StackSpec, topk: AnyIds, slots: int, warm_up: int) -> Ids:
    """topk as int64; KernelError where it, the slots or the warm-up do not fit the stack."""
    topk = np.asarray(topk)
    expected = f"integers [tokens, {spec.n_layers}, {spec.top_k}]"
    if topk.ndim != 3 or topk.shape[1:] != (spec.n_layers, spec.top_k):
        raise KernelError(f"topk: shape {list(topk.shape)}, expected {expected}")
    _check_range("topk", topk, 0, spec.n_experts)
    in_order = np.sort(topk, axis=2)
    if (twice := np.argwhere(in_order[:, :, 1:] == in_order[:, :, :-1])).size:
        token, layer = twice[0, :2]
        raise KernelError(f"topk: token {token}, layer {layer} names an expert twice")
    if not spec.top_k <= slots <= spec.n_experts:
        raise KernelError(
            f"slots={slots}, expected top_k={spec.top_k} to n_experts={spec.n_experts}"
        )
    if not 0 <= warm_up < len(topk):
        raise KernelError(f"warm_up={warm_up}, expected 0 to {len(topk) - 1} of the tokens")
    return topk.astype(np.int64)


def checked_ahead(
    spec: StackSpec, predicted: AnyIds | None, ids: Ids, slots: int, *, needed: bool
) -> Ahead:
    """For each token and layer the experts expected in the next layer, each once.

    raises  KernelError for predictions of a wrong shape or range, or needed and not given
    """
    n_tokens = len(ids)
    if not needed:
        return [[[]] * spec.n_layers] * n_tokens
    if predicted is None:
        raise KernelError("predicted: not given, and the policy reads ahead")
    predicted = np.asarray(predicted)
    if predicted.ndim != 3 or predicted.shape[:2] != ids.shape[:2] or predicted.shape[2] > slots:
        raise KernelError(
            f"predicted: shape {list(predicted.shape)}, expected integers "
            f"[{n_tokens}, {spec.n_layers}, at most slots={slots}]"
        )
    _check_range("predicted", predicted, -1, spec.n_experts)
    lists = predicted.tolist()
    return [
        [[e for e in dict.fromkeys(experts) if e >= 0] for experts in [*token[1:], []]]
        for token in lists
    ]


def _check_range(name: str, ids: AnyIds, least: int, end: int) -> None:
    if not np.issubdtype(ids.dtype, np.integer):
        raise KernelError(f"{name}: {ids.dtype}, expected integers")
    wrong = np.argwhere((ids < least) | (ids >= end))
    if wrong.size:
        at = tuple(int(i) for i in wrong[0])
        raise KernelError(f"{name}{list(at)}={ids[at]}, expected {least} to {end - 1}")


def _fill_slots(tier: Tier, policy: Policy, ids: Ids, expected: Ahead) -> None:
    """Let the policy decide for tokens that are not run, then read what it would hold."""
    for of_token, next_of_token in zip(ids.tolist(), expected, strict=True):
        for layer, (chosen, ahead) in enumerate(zip(of_token, next_of_token, strict=True)):
            policy.decide(layer, chosen, ahead)
    for read in policy.contents():
        tier.read(*read)
