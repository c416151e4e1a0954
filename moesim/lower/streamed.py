"""Decode steps with weights streamed through a small GPU, as Programs of the engine.

Four schedules over the same resources: `cgopipe` (MoE-Lightning), `zigzag` (FlexGen, and FlexGen(c)
when attention runs on the CPU), `vslpipe` (MoE-Lens), and `whole_batch` (ZeRO-Inference: one batch,
KV cache on the GPU). A box has a stream for GPU kernels, one for each direction of the link, one
for staging copies into pinned memory and one for every CPU thread. Host memory is a pool: CPU
attention, copies and staging draw on it, and it is split fairly among requesters, of which every
CPU thread is one and every copy engine is one.

A layer is like the next and a schedule goes on from the last layer to the first of the next step,
so `iteration_time` runs layers until their time is steady and extrapolates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesim.builder import NO_DRAW, Draw, ProgramBuilder
from moesim.engine import run
from moesim.errors import SimulationError
from moesim.program import Names, Program
from planners.streamed import LayerShape, Lengths, StreamBox, StreamedPolicy

PACKET_BYTES = 100e6  # MoE-Lens moves weights in packets of 100 MB
LOOKAHEAD = 2  # CGOPipe: the CPU may attend to micro-batch j + 2 while the GPU finishes j


@dataclass(frozen=True, slots=True)
class MicroStep:
    """One layer of a decode step for each of n_micro equal micro-batches.

    weight_bytes       streamed per layer (for all micro-batches together)
    before_s, after_s  GPU: projections before attention; output projection and experts after it
    scores_s           GPU: attention, 0 when it runs on the CPU
    cpu_bytes, cpu_s   CPU attention: KV bytes read and seconds of arithmetic, 0 when on the GPU
    kv_bytes           KV cache that comes over the link for attention on the GPU
    down_bytes, up_bytes  what leaves the GPU before attention and comes back after it
    """

    n_micro: int
    weight_bytes: float
    before_s: float
    after_s: float
    scores_s: float = 0.0
    cpu_bytes: float = 0.0
    cpu_s: float = 0.0
    kv_bytes: float = 0.0
    down_bytes: float = 0.0
    up_bytes: float = 0.0

    def __post_init__(self) -> None:
        if self.n_micro < 1:
            raise SimulationError(f"n_micro={self.n_micro}, expected at least 1 micro-batch")


def micro_step(
    shape: LayerShape, box: StreamBox, lengths: Lengths, policy: StreamedPolicy
) -> MicroStep:
    """The work of a policy with scalar batch; experts run on the GPU.

    Attention weights stay on the GPU; the KV cache is read at its mean length.
    raises  SimulationError for experts on the CPU, which no schedule here expresses
    """
    if not policy.ffn_on_gpu:
        raise SimulationError("ffn_on_gpu=False, expected a policy with experts on the GPU")
    n_micro = math.ceil(policy.batch / policy.micro_batch)
    tokens = policy.batch / n_micro
    kv_bytes = tokens * lengths.mean_context * shape.kv_token_bytes
    score_flops = tokens * lengths.mean_context * shape.score_flops
    qkv_share = shape.qkv_bytes / (shape.qkv_bytes + shape.hidden_bytes)
    dense_s = _roof_s(box, tokens * shape.dense_flops, shape.dense_bytes)
    experts_s = _roof_s(box, tokens * shape.expert_flops, float(shape.touched_bytes(tokens)))
    on_gpu = policy.attention_on_gpu
    new_kv = tokens * shape.kv_token_bytes
    return MicroStep(
        n_micro=n_micro,
        weight_bytes=shape.expert_bytes * (1.0 - policy.weights_share),
        before_s=dense_s * qkv_share,
        after_s=dense_s * (1.0 - qkv_share) + experts_s,
        scores_s=_roof_s(box, score_flops, kv_bytes) if on_gpu else 0.0,
        cpu_bytes=0.0 if on_gpu else kv_bytes,
        cpu_s=0.0 if on_gpu else score_flops / box.cpu_flop_per_s,
        kv_bytes=kv_bytes * (1.0 - policy.kv_share) if on_gpu else 0.0,
        down_bytes=new_kv * (1.0 - policy.kv_share) if on_gpu else tokens * shape.qkv_bytes,
        up_bytes=0.0 if on_gpu else tokens * shape.hidden_bytes,
    )


def _roof_s(box: StreamBox, flops: float, n_bytes: float) -> float:
    return max(flops / box.gpu_flop_per_s, n_bytes / box.gpu_bytes_per_s)


class _Lines:
    """The box's streams and pools; every method appends work and returns its end.

    The link to the GPU has two queues that share its rate: one for weights, one for the rest.
    """

    def __init__(self, box: StreamBox) -> None:
        self.builder = ProgramBuilder()
        make = self.builder.stream
        self._box = box
        self._gpu, self._staging, self._joints = make("GPU"), make("staging"), make("joints")
        self._up = (make("link up: weights"), make("link up: states"))
        self._down = make("link down")
        self._threads = np.array([make(f"CPU thread {i}") for i in range(box.cpu_threads)])
        self._dram = self.builder.pool("host memory", box.dram_bytes_per_s)
        self._link = self.builder.pool("link up", box.link_bytes_per_s)

    def gpu(self, seconds: float, waits: list[int], name: str) -> int:
        """A kernel."""
        return self.builder.append(self._gpu, seconds, waits, label=self.builder.label(name, "GPU"))

    def weights(self, n_bytes: float, waits: list[int], layer: int) -> int:
        """Weights to the GPU, first copied into pinned memory if the box needs that."""
        rate = self._box.staging_bytes_per_s
        name = f"weights of layer {layer}"
        if rate > 0 and n_bytes:
            copied = Draw(2 * n_bytes, self._dram, 2 * rate)  # one read, one write
            label = self.builder.label(f"stage {name}", "staging")
            waits = [self.builder.append(self._staging, 0.0, waits, copied, label)]
        return self.up(n_bytes, waits, name, queue=0)

    def up(self, n_bytes: float, waits: list[int], name: str, queue: int = 1) -> int:
        """Host to GPU, over the queue of the weights (0) or the other one (1)."""
        draw = Draw(n_bytes, (self._dram, self._link)) if n_bytes else NO_DRAW
        return self.builder.append(
            self._up[queue], 0.0, waits, draw, self.builder.label(name, "link")
        )

    def down(self, n_bytes: float, waits: list[int], name: str) -> int:
        """GPU to host."""
        draw = Draw(n_bytes, self._dram, self._box.link_bytes_per_s) if n_bytes else NO_DRAW
        return self.builder.append(self._down, 0.0, waits, draw, self.builder.label(name, "link"))

    def attend(self, n_bytes: float, seconds: float, waits: list[int], layer: int) -> int:
        """CPU attention, split over all threads."""
        label = self.builder.label(f"attention {layer}", "CPU")
        ready = self.join(waits)
        draw = Draw(n_bytes / len(self._threads), self._dram)
        ends = self.builder.extend(self._threads, seconds, ready, draw, label)
        return self.join(ends.tolist())

    def join(self, waits: list[int]) -> int:
        """The moment all of these have ended."""
        return self.builder.append(self._joints, waits=waits)


def cgopipe(step: MicroStep, box: StreamBox, n_layers: int) -> tuple[Program, Names]:
    """MoE-Lightning's schedule of n_layers layers of one decode step.

    The weights of the next layer come in one page per micro-batch, in one queue with the states
    that CPU attention gives back, into the buffer of the layer before. With attention on the GPU
    the KV cache of a micro-batch comes two micro-batches ahead.
    source  MoE-Lightning (arXiv 2411.11217), section 3 and algorithm 1
    """
    lines, n = _Lines(box), step.n_micro
    ahead = min(LOOKAHEAD, n - 1)
    page = step.weight_bytes / n
    loaded = [[lines.weights(page, [], 0) for _ in range(n)][-1]]
    attended: list[int] = []
    after: list[int] = []

    def begin(t: int) -> None:
        before = lines.gpu(step.before_s, after[t - n : t - n + 1] if t >= n else [], "before")
        free = attended[t - 2 : t - 1] if t > 1 else []
        attended.append(_attention(lines, step, before, free, t // n))

    for t in range(ahead):
        begin(t)
    for t in range(n_layers * n):
        if t + ahead < n_layers * n:
            begin(t + ahead)
        layer, ready = t // n, [attended[t]]
        if step.up_bytes:
            ready = [lines.up(step.up_bytes, ready, f"states {layer}", queue=0)]
        ready.append(loaded[layer])
        if layer + 1 < n_layers:
            free = after[layer * n - 1 : layer * n] if layer else []
            last = lines.weights(page, free, layer + 1)
            if t % n == n - 1:
                loaded.append(last)
        after.append(lines.gpu(step.after_s, ready, f"after {layer}"))
    return lines.builder.build(), lines.builder.names()


def _attention(lines: _Lines, step: MicroStep, before: int, free: list[int], layer: int) -> int:
    """Attention of one micro-batch wherever it runs; returns its end."""
    if step.cpu_bytes:
        down = lines.down(step.down_bytes, [before], "queries, keys, values")
        return lines.attend(step.cpu_bytes, step.cpu_s, [down], layer)
    waits = [before]
    if step.kv_bytes:
        waits.append(lines.up(step.kv_bytes, free, f"KV cache {layer}"))
    scores = lines.gpu(step.scores_s, waits, f"attention {layer}")
    if step.down_bytes:
        lines.down(step.down_bytes, [scores], "new keys, values")
    return scores


def zigzag(step: MicroStep, box: StreamBox, n_layers: int) -> tuple[Program, Names]:
    """FlexGen's block schedule: layer by layer over all micro-batches, which share the weights.

    Beside the computation of micro-batch j run the copy in of the cache of j + 1 and the copy out
    of what j - 1 made; the next layer's weights come beside the first micro-batch. All wait for
    each other at the end of every micro-batch, hence the sum, not the maximum, of weights and
    the rest in FlexGen's own cost model. CPU attention is part of a micro-batch's computation.
    source  FlexGen (arXiv 2303.06865), algorithm 1; FMInference/FlexiGen flexgen/flex_opt.py
    """
    lines, n = _Lines(box), step.n_micro
    met = lines.join([lines.weights(step.weight_bytes, [], 0)])
    made: list[int] = []
    for t in range(n_layers * n):
        layer, beside = t // n, []
        if t % n == 0 and layer + 1 < n_layers:
            beside.append(lines.weights(step.weight_bytes, [met], layer + 1))
        if step.kv_bytes:
            beside.append(lines.up(step.kv_bytes, [met], f"KV cache {layer}"))
        if made and not step.cpu_bytes:
            beside.append(lines.down(step.down_bytes, [met, *made], "new keys, values"))
        made = [_compute(lines, step, met, layer)]
        met = lines.join([*beside, *made])
    return lines.builder.build(), lines.builder.names()


def _compute(lines: _Lines, step: MicroStep, start: int, layer: int) -> int:
    """One micro-batch through one layer, one part after the other."""
    before = lines.gpu(step.before_s, [start], "before")
    if not step.cpu_bytes:
        return lines.gpu(step.scores_s + step.after_s, [before], f"attention and after {layer}")
    down = lines.down(step.down_bytes, [before], "queries, keys, values")
    scores = lines.attend(step.cpu_bytes, step.cpu_s, [down], layer)
    up = lines.up(step.up_bytes, [scores], f"states {layer}")
    return lines.gpu(step.after_s, [up], f"after {layer}")


def whole_batch(step: MicroStep, box: StreamBox, n_layers: int) -> tuple[Program, Names]:
    """ZeRO-Inference: the next layer's weights come while the whole batch passes this layer.

    raises  SimulationError for more than one micro-batch
    source  DeepSpeed ZeRO-Inference (arXiv 2207.00032), section on prefetching
    """
    if step.n_micro != 1:
        raise SimulationError(f"n_micro={step.n_micro}, expected the whole batch as one")
    return cgopipe(step, box, n_layers)


@dataclass(frozen=True, slots=True)
class MixedStep:
    """One layer of an iteration that decodes and prefills, for each of two equal groups.

    weight_bytes      streamed per layer, dense_bytes of them first (attention)
    before_s, after_s GPU of one group: GA (projections, attention of prompts), GB (output
                      projection and experts)
    cpu_bytes, cpu_s  attention of the group's decoding sequences on the CPU
    down_bytes, up_bytes  states of the decoding sequences, to the CPU and back
    """

    weight_bytes: float
    dense_bytes: float
    before_s: float
    after_s: float
    cpu_bytes: float
    cpu_s: float
    down_bytes: float
    up_bytes: float


@dataclass(frozen=True, slots=True)
class IterationLoad:
    """Tokens of one iteration: of decoding sequences, of prompts, and the KV bytes resident."""

    decode_tokens: float
    prefill_tokens: float
    kv_bytes: float
    prompt: float


def mixed_step(shape: LayerShape, box: StreamBox, load: IterationLoad) -> MixedStep:
    """The work of one of two groups; GPU memory is not read again within a group's kernels."""
    tokens = (load.decode_tokens + load.prefill_tokens) / 2
    prompts = load.prefill_tokens / 2 * load.prompt / 2 * shape.score_flops
    qkv_share = shape.qkv_bytes / (shape.qkv_bytes + shape.hidden_bytes)
    before = tokens * shape.dense_flops * qkv_share + prompts
    after = tokens * (shape.dense_flops * (1.0 - qkv_share) + shape.expert_flops)
    kv_bytes = load.kv_bytes / 2 / shape.n_layers
    score_flops = kv_bytes / shape.kv_token_bytes * shape.score_flops
    return MixedStep(
        weight_bytes=shape.layer_bytes,
        dense_bytes=shape.dense_bytes,
        before_s=_roof_s(box, before, shape.dense_bytes * qkv_share),
        after_s=_roof_s(box, after, shape.layer_bytes - shape.dense_bytes * qkv_share),
        cpu_bytes=kv_bytes,
        cpu_s=score_flops / box.cpu_flop_per_s,
        down_bytes=load.decode_tokens / 2 * shape.qkv_bytes,
        up_bytes=load.decode_tokens / 2 * shape.hidden_bytes,
    )


def vslpipe(step: MixedStep, box: StreamBox, n_layers: int) -> tuple[Program, Names]:
    """MoE-Lens' schedule: while the CPU attends for one group the GPU works for the other.

    Weights move in packets into a buffer of two layers; the first packets of a layer have its
    attention weights.
    source  MoE-Lens (arXiv 2504.09345), VSLPipe: GA, C, GB of groups alpha and beta
    """
    lines = _Lines(box)
    first, last = _packets(lines, step, 0, [])
    attended = [_group_begin(lines, step, [first], 0) for _ in range(2)]
    done: list[int] = []
    for layer in range(n_layers):
        has_next = layer + 1 < n_layers
        ahead = _packets(lines, step, layer + 1, done[-1:]) if has_next else (last, last)
        for group in range(2):
            end = _group_end(lines, step, [attended[group], last], layer)
            if has_next:
                attended[group] = _group_begin(lines, step, [ahead[0], end], layer + 1)
        done.append(end)
        last = ahead[1]
    return lines.builder.build(), lines.builder.names()


def _packets(lines: _Lines, step: MixedStep, layer: int, free: list[int]) -> tuple[int, int]:
    """A layer's weights; the ends of the last packet with attention weights and of the last."""
    count = max(1, math.ceil(step.weight_bytes / PACKET_BYTES))
    ends = [lines.weights(step.weight_bytes / count, free, layer) for _ in range(count)]
    dense = max(1, math.ceil(step.dense_bytes / step.weight_bytes * count))
    return ends[dense - 1], ends[-1]


def _group_begin(lines: _Lines, step: MixedStep, waits: list[int], layer: int) -> int:
    """GA of a group, then C on the CPU if it has decoding sequences; returns the end."""
    before = lines.gpu(step.before_s, waits, f"GA {layer}")
    if not step.cpu_bytes:
        return before
    down = lines.down(step.down_bytes, [before], "queries, keys, values")
    return lines.attend(step.cpu_bytes, step.cpu_s, [down], layer)


def _group_end(lines: _Lines, step: MixedStep, waits: list[int], layer: int) -> int:
    """GB of a group, once its attention and the layer's weights are there."""
    if step.cpu_bytes:
        waits = [lines.up(step.up_bytes, waits[:1], f"states {layer}"), *waits[1:]]
    return lines.gpu(step.after_s, waits, f"GB {layer}")


@dataclass(frozen=True, slots=True)
class IterationTime:
    """Seconds of one pass over all layers.

    n_run  layers that were simulated; fewer than all: the steady time of a layer, extrapolated
    """

    seconds: float
    n_run: int
    is_extrapolated: bool


FIRST_LAYERS, MOST_LAYERS = 4, 128
STEADY = 1e-3  # relative change of a layer's time, from one doubling to the next, that ends the run


def iteration_time(
    schedule: Callable[[int], tuple[Program, Names]], n_layers: int
) -> IterationTime:
    """One pass over n_layers in a long row of passes: n_layers times the steady time of a layer.

    The layers run are doubled, 4, 8, 16, ..., until (T(2n) - T(n)) / n is steady: a pipeline whose
    parts are nearly in balance takes many layers to fill.
    schedule  the program of so many layers, such as `lambda n: cgopipe(step, box, n)`
    """
    run_layers = FIRST_LAYERS
    warm, each = run(schedule(run_layers)[0]).makespan_s, math.inf
    while run_layers < MOST_LAYERS:
        whole = run(schedule(2 * run_layers)[0]).makespan_s
        before, each = each, (whole - warm) / run_layers
        run_layers, warm = 2 * run_layers, whole
        if abs(each - before) <= STEADY * each:
            break
    return IterationTime(each * n_layers, run_layers, n_layers > run_layers)
