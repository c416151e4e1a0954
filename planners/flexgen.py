"""FlexGen's linear program: shares of weights, KV cache and activations on GPU, host and disk.

`flexgen_plan` solves it for one block of the zig-zag schedule, `flexgen_search` over all blocks.
All quantities of the program are in `flexgen_terms`, which is affine in the shares: the program's
coefficients are read off that function, so there is one statement of the cost model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planners.errors import PlanError
from planners.streamed import LayerShape, Lengths
from planners.streamed_policy import tightest

Floats = npt.NDArray[np.float64]
GIB = float(2**30)


@dataclass(frozen=True, slots=True)
class FlexgenRates:
    """Rates of FlexGen's cost model; the defaults were fitted by its authors on a cloud T4.

    Bytes per second between GPU, CPU and disk by what is moved; FLOP per second of dense
    products (mm) and batched attention products (bmm) in prefill and generation, and of the CPU.
    gpu_bytes_per_s  reading weights from GPU memory, once per micro-batch (infinite: not counted,
                     as in the source, which knows dense layers and large micro-batches only)
    cpu_bend         how the CPU's rate falls with micro-batches below 64 and hidden sizes below
                     4096 (c1, c2, c3)
    source  FMInference/FlexiGen experimental/cost_model.py; its GB is 2**30 bytes
    """

    host_to_gpu: float = 12.89 * GIB
    gpu_to_host_cache: float = 0.97 * GIB
    gpu_to_host_hidden: float = 4.82 * GIB
    disk_to_host: float = 0.473 * GIB
    host_to_disk_cache_prefill: float = 0.746 * GIB
    host_to_disk: float = 2.015 * GIB
    mm_prefill: float = 21.24e12
    mm_generate: float = 4.3e12
    bmm_prefill: float = 9.97e12
    bmm_generate: float = 0.079e12
    cpu: float = 0.0123e12
    gpu_bytes_per_s: float = math.inf
    cpu_bend: tuple[float, float, float] = (0.0168, 0.0328, 0.0621)

    def cpu_flop_per_s(self, micro_batch: int, hidden_size: float) -> float:
        """The CPU's rate at attention for a micro-batch and a hidden size."""
        few = max(0.0, math.log2(64 / micro_batch))
        narrow = max(0.0, math.log2(4096 / hidden_size))
        c1, c2, c3 = self.cpu_bend
        return self.cpu * max(0.1, 1 + c1 * few * narrow - c2 * few - c3 * narrow)


@dataclass(frozen=True, slots=True)
class FlexgenProblem:
    """What the linear program decides on.

    usable         share of each memory that may be planned (alpha)
    cpu_attention  attention to the cache in host memory runs there (FlexGen(c)); otherwise the
                   cache moves to the GPU for every step
    """

    shape: LayerShape
    lengths: Lengths
    gpu_memory_bytes: float
    host_memory_bytes: float
    disk_bytes: float
    rates: FlexgenRates = FlexgenRates()
    usable: float = 0.8
    cpu_attention: bool = True


SHARES = ("weights", "cache", "hidden")
"""What is split over (GPU, host, disk), in the order of FlexgenPlan.shares."""


@dataclass(frozen=True, slots=True)
class FlexgenPlan:
    """A block schedule with its shares and cost.

    shares  float64[3, 3]: rows SHARES, columns GPU, host, disk; each row adds up to 1
    seconds of prefill and generation of one block: T_pre * l + T_gen * (n - 1) * l
    """

    block: int
    micro_batch: int
    shares: Floats
    seconds: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class FlexgenTerms:
    """Every quantity of the program for given shares, affine in them.

    prefill_s   float64[3]: in (host and disk to GPU), out, compute; T_pre is the largest
    generate_s  float64[4]: out, disk in, disk out, compute, each after the copy to the GPU;
                T_gen is the largest
    memory_bytes  float64[5]: GPU in prefill, GPU in generation, host likewise, disk
    """

    prefill_s: Floats
    generate_s: Floats
    memory_bytes: Floats

    def seconds(self, n_layers: int, output: float) -> float:
        """T = T_pre * l + T_gen * (n - 1) * l."""
        steps = self.generate_s.max() * (output - 1)
        return float((self.prefill_s.max() + steps) * n_layers)


def flexgen_terms(
    problem: FlexgenProblem, block: int, micro_batch: int, shares: Floats
) -> FlexgenTerms:
    """The program's quantities for shares float64[3, 3] (see FlexgenPlan)."""
    (_, _, wd), (_, cc, cd), (_, hc, hd) = shares
    s, r, p = problem.shape, problem.rates, problem.lengths
    weights, hidden = s.layer_bytes, s.hidden_bytes * block
    off_gpu = 1.0 - shares[:, 0]
    kv, context = s.kv_token_bytes * block, p.mean_context
    to_gpu = (weights * off_gpu[0] + p.prompt * hidden * off_gpu[2]) / r.host_to_gpu
    from_disk = (weights * wd + p.prompt * hidden * hd) / r.disk_to_host
    out = kv * (p.prompt + 1) * off_gpu[1] / r.gpu_to_host_cache
    out += p.prompt * hidden * off_gpu[2] / r.gpu_to_host_hidden
    out += kv * (p.prompt + 1) * cd / r.host_to_disk_cache_prefill
    out += p.prompt * hidden * hd / r.host_to_disk
    compute = block * p.prompt * s.token_flops / r.mm_prefill
    compute += block * p.prompt**2 * s.score_flops / r.bmm_prefill
    up = (weights * off_gpu[0] + hidden * off_gpu[2]) / r.host_to_gpu
    scores = block * context * s.score_flops
    reads = block / micro_batch * (s.dense_bytes + s.touched_bytes(micro_batch))
    step = max(block * s.token_flops / r.mm_generate, reads / r.gpu_bytes_per_s)
    if problem.cpu_attention:
        step += scores * shares[1, 0] / r.bmm_generate
        step += scores * (cc + cd) / r.cpu_flop_per_s(micro_batch, s.hidden_bytes / 2)
    else:
        step += scores / r.bmm_generate
        up += kv * context * off_gpu[1] / r.host_to_gpu
    down = hidden * off_gpu[2] / r.gpu_to_host_hidden
    disk_in = (kv * context * cd + hidden * hd + weights * wd / 0.95) / r.disk_to_host
    disk_out = (kv * cd + hidden * hd) / r.host_to_disk
    return FlexgenTerms(
        np.array([to_gpu + from_disk, out, compute]),
        up + np.array([down, disk_in, disk_out, step]),
        _flexgen_memory(problem, block, micro_batch, shares),
    )


def _flexgen_memory(
    problem: FlexgenProblem, block: int, micro_batch: int, shares: Floats
) -> Floats:
    """Peak bytes: GPU in prefill and generation, host in both, disk."""
    s, p = problem.shape, problem.lengths
    (wg, wc, wd), (cg, cc, cd), (hg, hc, hd) = shares
    weights, hidden = s.layer_bytes, s.hidden_bytes
    all_weights, all_kv = weights * s.n_layers, block * s.kv_token_bytes * s.n_layers
    between = micro_batch * p.prompt * (9 * hidden + s.workspace_bytes)
    between += micro_batch * 2 * s.n_heads * p.prompt**2
    kept = all_weights * wg + all_kv * p.total * cg
    buffers = 2 * weights * (1 - wg)
    gpu_prefill = kept + p.prompt * hidden * (block * hg + micro_batch * (1 - hg))
    state = 2 * p.total * hidden + 2 * s.n_heads * p.total + 2 * hidden
    gpu_step = kept + hidden * (block * hg + micro_batch * (1 - hg))
    gpu_step += micro_batch * (8 * hidden + s.workspace_bytes + state * cg)
    gpu_step += 2 * micro_batch * p.total * s.kv_token_bytes * cg
    host_prefill = all_weights * wc + p.prompt * hidden * block * hc + all_kv * p.prompt * cc
    host_prefill += weights * (1 - wg) + p.prompt * hidden * micro_batch * (1 - hg)
    host_step = all_weights * wc + hidden * block * hc + all_kv * p.total * cc + weights * wd
    host_step += 2 * p.total * s.kv_token_bytes * micro_batch * cd
    host_step += (2 * s.n_heads * p.total + hidden * (1 + 2 * hd)) * micro_batch
    disk = all_weights * wd + p.prompt * hidden * block * hd + all_kv * p.total * cd
    gpu = (gpu_prefill + buffers + between, gpu_step + buffers)
    return np.array([*gpu, host_prefill, host_step, disk])


def flexgen_plan(problem: FlexgenProblem, block: int, micro_batch: int) -> FlexgenPlan:
    """The best shares for blocks of `block` sequences in micro-batches, by linear programming.

    Hidden states may not go to disk, since the runtime cannot.
    raises  PlanError naming the memory that lacks most and by how much, at the shares that lack
            least
    """
    shares = _solve(problem, block, micro_batch, may_lack=False)
    if shares is None:
        raise PlanError(f"block of {block} sequences: {_shortage(problem, block, micro_batch)}")
    terms = flexgen_terms(problem, block, micro_batch, shares)
    seconds = terms.seconds(problem.shape.n_layers, problem.lengths.output)
    return FlexgenPlan(
        block, micro_batch, shares, seconds, block * problem.lengths.output / seconds
    )


_MEMORIES = (
    "GPU memory in prefill",
    "GPU memory in generation",
    "host memory in prefill",
    "host memory in generation",
    "disk",
)


def _shortage(problem: FlexgenProblem, block: int, micro_batch: int) -> str:
    shares = _solve(problem, block, micro_batch, may_lack=True)
    if shares is None:
        raise PlanError(f"block of {block} sequences: the linear program has no solution")
    need = flexgen_terms(problem, block, micro_batch, shares).memory_bytes.tolist()
    return tightest(tuple(zip(_MEMORIES, need, flexgen_capacity(problem).tolist(), strict=True)))


def flexgen_capacity(problem: FlexgenProblem) -> Floats:
    """float64[5]: usable bytes, in the order of FlexgenTerms.memory_bytes."""
    gpu, host = problem.gpu_memory_bytes, problem.host_memory_bytes
    return problem.usable * np.array([gpu, gpu, host, host, problem.disk_bytes])


# Columns of the program: nine shares, T_pre, T_gen, and GiB that GPU, host and disk lack.
_TIMES, _LACKS, _COLUMNS = slice(9, 11), slice(11, 14), 14
_LACK_OF_ROW = (11, 11, 12, 12, 13)


def _solve(problem: FlexgenProblem, block: int, micro_batch: int, may_lack: bool) -> Floats | None:
    """Shares of least time, or (may_lack) of least lack of memory; None when nothing fits.

    A byte that lacks in host memory weighs less than one on the disk or the GPU, since host memory
    is the easiest to add.
    """
    from scipy.optimize import linprog

    at_zero, slopes = _affine(problem, block, micro_batch)
    rows = np.hstack([slopes, np.zeros((12, _COLUMNS - 9))])
    rows[:3, 9], rows[3:7, 10] = -1.0, -1.0
    rows[7:] /= GIB
    rows[range(7, 12), _LACK_OF_ROW] = -1.0
    limits = np.concatenate([-at_zero[:7], (flexgen_capacity(problem) - at_zero[7:]) / GIB])
    cost = np.zeros(_COLUMNS)
    layers = problem.shape.n_layers
    cost[_TIMES] = 0.0 if may_lack else (layers, layers * (problem.lengths.output - 1))
    cost[_LACKS] = (3.0, 1.0, 2.0) if may_lack else 0.0
    sums = np.hstack([np.kron(np.eye(3), np.ones(3)), np.zeros((3, _COLUMNS - 9))])
    lack = (0.0, None if may_lack else 0.0)
    bounds = [(0.0, 1.0)] * 8 + [(0.0, 0.0)] + [(0.0, None)] * 2 + [lack] * 3
    found = linprog(cost, A_ub=rows, b_ub=limits, A_eq=sums, b_eq=np.ones(3), bounds=bounds)
    return np.array(found.x)[:9].reshape(3, 3) if found.status == 0 else None


def _affine(problem: FlexgenProblem, block: int, micro_batch: int) -> tuple[Floats, Floats]:
    """float64[12] at zero shares and float64[12, 9] slopes of all terms."""

    def at(shares: Floats) -> Floats:
        terms = flexgen_terms(problem, block, micro_batch, shares.reshape(3, 3))
        return np.concatenate([terms.prefill_s, terms.generate_s, terms.memory_bytes])

    at_zero = at(np.zeros(9))
    return at_zero, np.column_stack([at(unit) - at_zero for unit in np.eye(9)])


def flexgen_search(problem: FlexgenProblem) -> FlexgenPlan:
    """The best block: micro-batches double, their number grows by a quarter until memory ends.

    raises  PlanError of the smallest block when nothing fits
    """
    best = flexgen_plan(problem, 1, 1)
    micro = 1
    while (plan := _best_block(problem, micro)) is not None:
        best = max(best, plan, key=lambda p: p.tokens_per_s)
        micro *= 2
    return best


def _best_block(problem: FlexgenProblem, micro_batch: int) -> FlexgenPlan | None:
    best, count = None, 1
    while True:
        try:
            plan = flexgen_plan(problem, micro_batch * count, micro_batch)
        except PlanError:
            return best
        if best is None or plan.tokens_per_s > best.tokens_per_s:
            best = plan
        count = max(count + 1, count * 5 // 4)
