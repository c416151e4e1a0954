"""What each part of a step costs on this machine, in seconds, measured on the spot.

The parts are timed one by one in the order in which a run does them: that decides what is in the
processor's caches and how long the disk has rested before a read, and both show.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from moesim_kernels.errors import KernelError
from moesim_kernels.offload.compute import dense_part, expert_part
from moesim_kernels.offload.policy import Read
from moesim_kernels.offload.reader import Background
from moesim_kernels.offload.robbed import Taken, Watch, undisturbed
from moesim_kernels.offload.run import RunOptions, Session, quiet
from moesim_kernels.offload.stack import Stack
from moesim_kernels.offload.storage import Tier, open_tier

TOKENS = (1, 2, 4, 8)
SHARES = (0.25, 0.5, 1.0, 2.0)  # of an expert: sizes of reads
SIZED_SLOTS = 8
QUANTILES = (0.05, 0.1, 0.5, 0.9, 0.95)
LOOP_TOKENS, MOST_LOOP_TOKENS = 2, 400  # without reads, in a sample and in all
QUEUED = 2  # reads kept waiting before the background thread
LOOPS = {"inline": "lru", "background": "lru_prefetch"}
PARTS = (
    "read", "read_next", "read_beside", "handoff", "dense", "dense_after_reads", "dense_beside",
    "expert", "expert_beside", "expert_read",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds of something done n times; middle, the mean of the middle nine tenths.

    The middle is what to add up: some parts have two speeds, and a median jumps between them.
    """

    median: float
    middle: float
    p10: float
    p90: float
    n: int


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of the parts of a step; each in the running thread and of one token unless said.

    read_s          one expert into a slot, after a layer was computed without reading
    read_next_s     the same, since the last read only one expert was computed
    read_beside_s   the same by the background thread, one upon another, while layers compute
    handoff_s       asking the background thread for a read and waiting, over what the read takes
    dense_s, expert_s                resident weights, gone from the processor's caches
    dense_after_reads_s              the dense part after a layer that read all its experts
    dense_beside_s, expert_beside_s  while the background thread reads
    expert_read_s   an expert that has just been read
    loop_s          what a layer without reads takes beyond its dense part and its experts:
                    "inline" where the running thread would read, "background" where another would
    expert_tokens_s  resident expert by number of tokens
    read_bytes_s    a read by its bytes, one upon another
    """

    expert_bytes: int
    read_s: Spread
    read_next_s: Spread
    read_beside_s: Spread
    handoff_s: Spread
    dense_s: Spread
    dense_after_reads_s: Spread
    dense_beside_s: Spread
    expert_s: Spread
    expert_beside_s: Spread
    expert_read_s: Spread
    loop_s: dict[str, Spread]
    expert_tokens_s: dict[int, Spread]
    read_bytes_s: dict[int, Spread]


def calibrate(stack: Stack, n_slots: int, kind: str = "auto", reps: int = 4) -> Costs:
    """Time the parts of a step, each about `reps` times the layers.

    n_slots  slots in all, as many as in the runs, so that weights are as far from the caches
    kind     of the tier, one of storage.KINDS
    """
    with Calibration(stack, n_slots, kind) as calibration:
        for _ in range(reps):
            calibration.sample()
        return calibration.costs()


class Calibration:
    """Samples of all parts, taken a little at a time, between other work."""

    def __init__(self, stack: Stack, n_slots: int, kind: str = "auto") -> None:
        self._stack, self._kind = stack, kind
        self._by_bytes: defaultdict[int, list[Taken]] = defaultdict(list)
        self._shares = [share for share in SHARES if share <= stack.spec.n_experts]
        with ExitStack() as held:
            tier = held.enter_context(closing(open_tier(stack, n_slots, kind)))
            self._parts = held.enter_context(closing(_Parts(stack, tier)))
            self._loops = {
                name: held.enter_context(_without_reads(stack, policy, kind))
                for name, policy in LOOPS.items()
            }
            self._held = held.pop_all()

    def __enter__(self) -> Calibration:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def sample(self) -> None:
        """Each part some more times: a few tenths of a second."""
        with quiet():
            self._parts.sample()
            for share in self._shares:
                size, taken = _sized_reads(self._stack, share, self._kind)
                self._by_bytes[size] += taken
        for session in self._loops.values():
            session.advance(LOOP_TOKENS)

    def costs(self) -> Costs:
        """The spread of each part over all samples, calm ones if there are enough."""
        part = {name: spread(undisturbed(taken)) for name, taken in self._parts.taken.items()}
        matrices = part["dense"].middle + self._stack.spec.top_k * part["expert"].middle
        return Costs(
            self._stack.spec.expert_bytes,
            **{f"{name}_s": part[name] for name in PARTS},
            loop_s={name: _loop(session, matrices) for name, session in self._loops.items()},
            expert_tokens_s={n: part[f"tokens_{n}"] for n in TOKENS},
            read_bytes_s={
                size: spread(undisturbed(taken)) for size, taken in sorted(self._by_bytes.items())
            },
        )


def _loop(session: Session, matrices_s: float) -> Spread:
    """Of layers that read nothing, what they took less their matrices."""
    run = session.measured()
    steps = [Taken(*both) for both in zip(run.step_s.tolist(), run.robbed_s.tolist(), strict=True)]
    calm = [i for i, step in enumerate(steps) if step.calm] or list(range(len(steps)))
    return spread(np.maximum(run.layer_s[calm].ravel() - matrices_s, 0.0).tolist())


def spread(seconds: Sequence[float]) -> Spread:
    """Median, middle, 10th and 90th percentile of seconds."""
    if not len(seconds):
        raise KernelError("calibrate: nothing was timed")
    low, p10, median, p90, high = (float(q) for q in np.quantile(seconds, QUANTILES))
    inner = [one for one in seconds if low <= one <= high]
    return Spread(median, float(np.mean(inner)), p10, p90, len(seconds))


class _Parts:
    """Does the parts of a layer in several patterns and keeps what each took."""

    def __init__(self, stack: Stack, tier: Tier) -> None:
        self._spec, self._tier = stack.spec, tier
        self._watch = Watch()
        self._dense = [(up.to(tier.device), down.to(tier.device)) for up, down in stack.dense]
        self._x = stack.inputs(1).to(tier.device)
        self._rng = np.random.default_rng(0)
        self.taken: defaultdict[str, list[Taken]] = defaultdict(list)

    def close(self) -> None:
        """Stop watching the thread."""
        self._watch.close()

    def sample(self) -> None:
        """Every part some more times."""
        k = self._spec.top_k
        self.sample_computation()
        for n_read in sorted({1, k}):
            for layer in range(self._spec.n_layers):
                self._layer(layer, n_read)
        for n_tokens in TOKENS:
            x = self._x.expand(n_tokens, -1).contiguous()
            for _ in range(self._spec.n_layers):
                self._expert(f"tokens_{n_tokens}", x, self._slot())
        self._beside()
        self._handed_off()
        if k == 1:  # no read ever follows another within a layer
            self.taken["read_next"] = self.taken["read"]

    def sample_computation(self) -> None:
        """Layers that read nothing."""
        for layer in range(self._spec.n_layers):
            self._layer(layer, 0)

    def _layer(self, layer: int, n_read: int) -> None:
        """One layer; the last n_read of its experts are read first."""
        k = self._spec.top_k
        self._dense_part("dense_after_reads" if n_read == k else "dense", layer)
        for i in range(k):
            read = self._random_read(layer)
            if i < k - n_read:
                self._expert("expert", self._x, read.slot)
                continue
            name = "read" if n_read == 1 else "read_next"
            if i or n_read == 1:
                self._time(name, self._tier.read, *read)
            else:
                self._tier.read(*read)
            self._expert("expert_read", self._x, read.slot)

    def _beside(self) -> None:
        """Layers compute while reads follow each other in the background, at least two of them."""
        done, n_layers = 0, self._spec.n_layers
        with closing(Background(self._tier)) as reader:
            while done < n_layers or len(reader.taken) < 2:
                layer, done = done % n_layers, done + 1
                self._ask_more(reader, layer)
                self._dense_part("dense_beside", layer)
                for _ in range(self._spec.top_k):
                    self._ask_more(reader, layer)
                    self._expert("expert_beside", self._x, self._slot())
            n_beside = len(reader.taken)
        self.taken["read_beside"] += reader.taken[:n_beside]

    def _handed_off(self) -> None:
        """One read a layer, asked of the background thread and waited for."""
        with closing(Background(self._tier)) as reader:
            for layer in range(self._spec.n_layers):
                self._dense_part("dense_before_handoff", layer)
                read = self._random_read(layer)
                robbed_s = reader.robbed_s()
                here = self._watch.timed(partial(_ask_and_wait, reader, read))
                seconds = here.seconds - reader.taken[-1].seconds
                robbed_s = reader.robbed_s() - robbed_s + here.robbed_s
                self.taken["handoff"].append(Taken(seconds, robbed_s))

    def _ask_more(self, reader: Background, layer: int) -> None:
        if reader.waiting < QUEUED:
            reader.ask_ahead([self._random_read(layer)])

    def _dense_part(self, name: str, layer: int) -> None:
        self._time(name, dense_part, self._x, self._dense[layer])

    def _expert(self, name: str, x: torch.Tensor, slot: int) -> None:
        self._time(name, expert_part, x, self._tier.weights[slot])

    def _time(self, name: str, call: Callable[..., object], *arguments: object) -> None:
        def settled() -> None:
            call(*arguments)
            self._tier.settle()

        self.taken[name].append(self._watch.timed(settled))

    def _slot(self) -> int:
        return int(self._rng.integers(len(self._tier.weights)))

    def _random_read(self, layer: int) -> Read:
        return Read(layer, int(self._rng.integers(self._spec.n_experts)), self._slot())


def _ask_and_wait(reader: Background, read: Read) -> None:
    reader.ask([read])
    reader.wait(read.slot)


def _sized_reads(stack: Stack, share: float, kind: str) -> tuple[int, list[Taken]]:
    """Bytes of reads that are a share of an expert, all over the same file, and what they took."""
    resized = stack.cut_into(share)
    spec, rng = resized.spec, np.random.default_rng(0)
    with closing(open_tier(resized, SIZED_SLOTS, kind)) as tier, closing(Watch()) as watch:
        taken = []
        for slot in range(SIZED_SLOTS):
            layer, expert = (int(rng.integers(n)) for n in (spec.n_layers, spec.n_experts))
            taken.append(watch.timed(partial(tier.read, layer, expert, slot)))
    return spec.expert_bytes, taken


def _without_reads(stack: Stack, policy: str, kind: str) -> Session:
    """A run whose tokens all choose the same experts; its first tokens have brought them."""
    spec = stack.spec
    ids = np.tile(np.arange(spec.top_k), (MOST_LOOP_TOKENS, spec.n_layers, 1))
    return Session(stack, ids, policy, spec.top_k, ids, RunOptions(3, kind))
