"""Duplex (arXiv 2409.01141): a GPU whose HBM stacks compute, for MoE and attention in decode.

The split of experts between the GPU (xPU) and the PIM stacks is `planners/co_processing.py`, the
stages of continuous batching are `moesim/lower/pim_stages.py`; here are the machines of the paper:

GPU     H100s, experts whole on one device each (several devices share one where there are more)
Duplex  the stacks compute decode attention and every expert that is faster there; one unit at a
        time
+PE     both units at once: experts split by the rule, prefill attention on the xPU meanwhile
+ET     and every expert cut over the devices of a node instead of whole on one
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hwmodels.cost import ExpertShape
from hwmodels.devices import load_device, load_link
from hwmodels.systems import load_system
from moesim.lower.pim_stages import (
    FLOP_J,
    Floats,
    Longs,
    Machine,
    Rule,
    Workload,
    pair_law,
    run,
    serve,
)
from moesim.reproduce.claim import Claim, Tier
from moesim.reproduce.sources import Sources
from planners.co_processing import (
    co_processing_split,
    crossover_tokens,
    device_rates,
    ridge_tokens,
    unit_seconds,
)
from traces.model import Attention, ModelSpec
from traces.models import load_model
from traces.synth import stream

NAME = "duplex"
PAPER = "Duplex, arXiv 2409.01141 (MICRO 2024)"

STACKS = 5  # HBM3 stacks of one device
MIXTRAL = ExpertShape(4096, 14336, 3)
# Square millimetres on a stack's logic die, and the die.
AREAS_MM2 = MappingProxyType({"tsv": 10.89, "gemm": 3.02, "buffers": 2.26, "softmax": 1.64})
DIE_MM2 = 121.0
GEMM_UNITS, MACS_OF_A_UNIT, CLOCK_HZ = 32, 512, 650e6
BATCHES = (32, 64, 128)
# Devices, and mean lengths of prompt and answer, of each model in Figure 11.
CASES = MappingProxyType(
    {
        "Mixtral": (4, (256, 1024, 4096)),
        "GLaM": (8, (512, 1024, 2048)),
        "Grok-1": (16, (256, 1024, 4096)),
    }
)

# The handbook's bands. It prints them for Mixtral; the other two models are held against them too.
_SPEED, _ENERGY, _PE = (1.6, 2.7), (-45.0, -25.0), (0.0, 10.0)
_HOW = (
    "uniform synthetic routing; rooflines at nominal rates, communication as NCCL on H100; spread"
    " of lengths (10 %) assumed"
)
_HIGH = (
    f"{_HOW}; the paper steps through DRAM cycle by cycle, here PIM reads at its nominal rate, so"
    " the gain is larger where an expert has few tokens"
)
_TIE = (
    f"{_HOW}; at batch 128 a Mixtral expert has 32 tokens, where both units tie: one unit at a time"
    " gains nothing, both at once up to twice"
)
_HONEST = "honest baseline; " + _HOW


@dataclass(frozen=True, slots=True)
class Grid:
    """The nine cells of one model in Figure 11 for every kind of machine, on the same stages.

    time_s, energy_j  of all stages together: kind of machine to float64[cells]
    """

    time_s: Mapping[str, Floats]
    energy_j: Mapping[str, Floats]

    def speedup(self, kind: str, over: str = "gpu") -> Floats:
        """float64[cells]: throughput over that of another kind."""
        return self.time_s[over] / self.time_s[kind]

    def energy_change(self, kind: str) -> Floats:
        """float64[cells]: joules a token against the GPU's, in percent."""
        return 100 * (self.energy_j[kind] / self.energy_j["gpu"] - 1)


def machine(kind: str, n_devices: int, path: str = "duplex-logic-pim-path") -> Machine:
    """A machine by name: "gpu", "gpu+et", "duplex", "pe", "pe+et", "bank-pim".

    path  link of the catalogue that carries the energy from memory cells to the logic die
    """
    if kind in ("gpu", "gpu+et"):
        return Machine(load_system(f"h100x{n_devices}"), cut=kind == "gpu+et")
    rules: Mapping[str, tuple[Rule, bool]] = {
        "duplex": ("faster", False),
        "bank-pim": ("faster", False),
        "pe": ("split", False),
        "pe+et": ("split", True),
    }
    rule, cut = rules[kind]
    bank = kind == "bank-pim"
    stack = load_device("duplex-bank-pim" if bank else "duplex-logic-pim")
    joules = load_link("duplex-bank-pim-path" if bank else path).energy_j_per_byte
    pim = device_rates(stack, STACKS)
    return Machine(load_system(f"duplexx{n_devices}"), pim, rule, cut, pim_j_per_byte=joules)


def glam_143b() -> ModelSpec:
    """GLaM as in the paper's Table I: 143 B, every second layer with 64 experts of 2 matrices."""
    return ModelSpec(
        name="glam-143b",
        n_layers=32,
        moe_layers=tuple(range(1, 32, 2)),
        hidden_size=4096,
        attention=Attention(n_heads=32, n_kv_heads=32, head_dim=128, v_head_dim=128),
        n_experts=64,
        top_k=2,
        expert_intermediate_size=16384,
        shared_intermediate_size=0,
        dense_intermediate_size=16384,
        vocab_size=256000,
        kv_layers=32,
        ffn_matrices=2,
    )


def workload(name: str, batch: int, length_in: int, length_out: int) -> Workload:
    """A workload on the model of one case."""
    known = {"Mixtral": "mixtral-8x7b", "Grok-1": "grok-1"}
    model = load_model(known[name]) if name in known else glam_143b()
    return Workload(model, batch, length_in, length_out)


def grid(name: str, seed: int) -> Grid:
    """Every cell of a case on every kind of machine."""
    n, lengths = CASES[name]
    kinds = {kind: machine(kind, n) for kind in ("gpu", "gpu+et", "duplex", "pe", "pe+et")}
    kinds |= {"2xgpu": machine("gpu", 2 * n), "bank-pim": machine("bank-pim", n)}
    kinds["free"] = replace(kinds["pe+et"], spaces=0)
    kinds["buffer die"] = machine("pe+et", n, "hbm3-buffer-die-path")
    works = [workload(name, batch, length, length) for batch in BATCHES for length in lengths]
    time_s = {kind: np.zeros(len(works)) for kind in kinds}
    energy_j = {kind: np.zeros(len(works)) for kind in kinds}
    for cell, work in enumerate(works):
        stages = serve(work, seed)
        for kind, on in kinds.items():
            done = run(work, stages, on)
            time_s[kind][cell], energy_j[kind][cell] = done.seconds.sum(), done.joules.sum()
    return Grid(time_s, energy_j)


def claims(sources: Sources) -> list[Claim]:
    """Identities of the device, then figures over cells of model, batch and lengths."""
    grids = {name: grid(name, sources.seed) for name in CASES}
    return [
        *_identities(),
        *_golden_splits(),
        *_throughput(grids),
        *_co_processing(grids),
        *_energy(grids),
        *_bank_pim(grids["Mixtral"]),
        *_latency(sources.seed),
        *_requests_per_second(sources.seed),
        *_skew(sources),
    ]


def _row(
    claim: str,
    published: float | None,
    simulated: float,
    band: tuple[float, float] | None,
    note: str,
    tier: Tier = "C",
    convention: str = "paper",
) -> Claim:
    low, high = band or (None, None)
    return Claim(NAME, claim, published, float(simulated), low, high, tier, convention, note)


def _exact(claim: str, published: float, simulated: float, note: str = "") -> Claim:
    """Tier A: within 1 %."""
    return _row(claim, published, simulated, (0.99 * published, 1.01 * published), note, "A")


def _identities() -> Iterator[Claim]:
    xpu = device_rates(load_device("duplex"))
    pim = device_rates(load_device("duplex-logic-pim"), STACKS)
    bank = device_rates(load_device("duplex-bank-pim"), STACKS)
    area = sum(AREAS_MM2.values())
    yield _exact("ridge of Logic-PIM, operations a byte", 8, ridge_tokens(pim))
    yield _exact("tokens of an expert where xPU and PIM tie", 31.8, crossover_tokens(xpu, pim))
    yield _exact("area on the logic die, mm2", 17.80, area, "sum of the four printed parts")
    yield _exact("share of the 121 mm2 logic die, %", 14.71, 100 * area / DIE_MM2)
    peak = GEMM_UNITS * MACS_OF_A_UNIT * 2 * CLOCK_HZ
    yield _exact("peak of a stack, TFLOPS", 21.3, peak / 1e12, "32 units x 512 MAC x 650 MHz")
    tie, twice = unit_seconds(bank, MIXTRAL, np.array([4, 8])) / unit_seconds(
        pim, MIXTRAL, np.array([4, 8])
    )
    yield _exact("time of an expert with 4 tokens, Bank-PIM over Logic-PIM", 1.0, tie)
    yield _exact("time of an expert with 8 tokens, Bank-PIM over Logic-PIM", 2.0, twice)


def _golden_splits() -> Iterator[Claim]:
    """Splits of one device's Mixtral experts that the handbook works out by hand."""
    n = np.arange(129)
    xpu = unit_seconds(device_rates(load_device("duplex")), MIXTRAL, n)
    pim = unit_seconds(device_rates(load_device("duplex-logic-pim"), STACKS), MIXTRAL, n)
    for label, counts, moved, makespan_us in (
        ("2,4,6,8,16,24,40,100", [2, 4, 6, 8, 16, 24, 40, 100], 6, 237.6),
        ("16 each", [16] * 8, 5, 315.3),
        ("8 each", [8] * 8, 7, 185.3),
    ):
        split = co_processing_split(np.array([counts]), xpu, pim)
        found = int(split.on_pim.sum())
        note = "experts move one by one, without the rule of memory spaces"
        yield _row(f"experts moved, tokens {label}", moved, found, (moved, moved), note, "A")
        yield _exact(f"makespan in us, tokens {label}", makespan_us, 1e6 * split.makespan_s[0])


def _throughput(grids: Mapping[str, Grid]) -> Iterator[Claim]:
    one = grids["Mixtral"]
    full, plain = one.speedup("pe+et"), one.speedup("duplex")
    every = np.concatenate([of.speedup("pe+et") for of in grids.values()])
    yield _row("+PE+ET over GPU, mean of 27 cells", 2.07, every.mean(), _SPEED, _HOW)
    yield _row("Mixtral: +PE+ET over GPU, mean", None, full.mean(), _SPEED, _HOW)
    yield _row("Mixtral: Duplex over GPU, highest", 2.51, plain.max(), _SPEED, _HOW)
    yield _row("Mixtral: Duplex over GPU, lowest", None, plain.min(), _SPEED, _TIE)
    yield _row("Mixtral: +PE+ET over GPU, highest", 2.67, full.max(), _SPEED, _HIGH)
    yield _row("Mixtral: +PE+ET over GPU, lowest", None, full.min(), _SPEED, _TIE)
    glam, grok = (grids[name].speedup("pe+et").max() for name in ("GLaM", "Grok-1"))
    yield _row("GLaM: +PE+ET over GPU, highest", None, glam, _SPEED, _HIGH)
    yield _row("Grok-1: +PE+ET over GPU, highest", None, grok, _SPEED, _HOW + "; two nodes")
    for name, of in grids.items():
        over = of.speedup("pe+et", "2xgpu").mean()
        yield _row(f"{name}: +PE+ET over 2xGPU, mean", None, over, None, _HONEST)
    over = one.speedup("pe+et", "gpu+et").mean()
    yield _row("Mixtral: +PE+ET over GPU+ET, mean", None, over, None, _HONEST)


def _co_processing(grids: Mapping[str, Grid]) -> Iterator[Claim]:
    gains = [100 * (of.speedup("pe", "duplex") - 1) for of in grids.values()]
    every = np.concatenate(gains).mean()
    yield _row("PE adds, %, mean of 27 cells", 4.0, every, _PE, _HOW)
    yield _row("Mixtral: PE adds, %, mean", None, gains[0].mean(), _PE, _TIE)
    most = max(of.speedup("pe+et", "duplex").max() for of in grids.values())
    yield _row("+PE+ET over Duplex, highest", 1.36, most, None, _TIE)
    free = 100 * (grids["Mixtral"].speedup("free", "pe+et").mean() - 1)
    note = _HOW + "; experts move one by one instead of space by space"
    yield _row("Mixtral: the rule of memory spaces costs, %", None, free, None, note)


def _energy(grids: Mapping[str, Grid]) -> Iterator[Claim]:
    note = (
        f"{_HOW}; DRAM and arithmetic only: 3.59 pJ/bit to the xPU, 1.92 to the logic die,"
        f" {FLOP_J.value * 1e12:.2f} pJ a FLOP, as in a public copy of the authors' simulator"
    )
    for name, published in (("Mixtral", -33.28), ("GLaM", -42.03), ("Grok-1", -34.59)):
        best = grids[name].energy_change("pe+et").min()
        yield _row(f"{name}: energy a token, %, best cell", published, best, _ENERGY, note)
    every = np.concatenate([of.energy_change("pe+et") for of in grids.values()])
    yield _row("energy a token, %, mean of 27 cells", -28.19, every.mean(), _ENERGY, note)
    best = grids["Mixtral"].energy_change("buffer die").min()
    note = (
        f"{_HOW}; 3.29 pJ/bit to the logic die, only the interposer left out: such a path saves"
        " less than 9 % of DRAM energy, so the paper's figure needs the shorter one it describes"
    )
    claim = "Mixtral: energy a token, %, best cell, AttAcc's path"
    yield _row(claim, -33.28, best, _ENERGY, note, convention="AttAcc simulator")


def _bank_pim(one: Grid) -> Iterator[Claim]:
    note = (
        f"{_HOW}; Bank-PIM without co-processing, every expert on its faster unit; band: above 1"
        " by sign, and the paper's 'at most'; with whole experts Bank-PIM loses here what its"
        " busiest device waits"
    )
    over = one.speedup("pe+et", "bank-pim")[:6]  # batches 32 and 64, as in Figure 14
    bank, full = one.speedup("bank-pim"), one.speedup("pe+et")
    yield _row("Mixtral: +PE+ET over Bank-PIM, highest", 1.80, over.max(), (1.0, 1.80), note)
    yield _row("Mixtral: +PE+ET over Bank-PIM, mean", 1.49, over.mean(), (1.0, 1.80), note)
    yield _row("Mixtral: Bank-PIM over GPU, batch 32, 4096", 2.17, bank[2], None, note)
    yield _row("Mixtral: Bank-PIM over GPU, batch 64, 256", 1.18, bank[3], None, note)
    yield _row("Mixtral: +PE+ET over GPU, batch 64, 256", 2.05, full[3], None, _HOW)


def _latency(seed: int) -> Iterator[Claim]:
    """GLaM at batch 64: +PE+ET against one and two GPUs a device, mean over three lengths."""
    kinds = (machine("gpu", 8), machine("gpu", 16), machine("pe+et", 8))
    change = []
    for length in CASES["GLaM"][1]:
        work = workload("GLaM", 64, length, length)
        stages = serve(work, seed)
        one, two, full = (run(work, stages, on).seconds for on in kinds)
        tail = np.quantile(full, 0.99) / np.quantile(two, 0.99)
        median = np.median(full) / np.median(one)
        change.append((median, full.sum() / one.sum(), full.sum() / two.sum(), tail))
    percent = 100 * (np.array(change) - 1)
    mean = percent.mean(axis=0)
    yield _row("GLaM: median TBT against GPU, %", -58.3, mean[0], None, _HIGH)
    yield _row("GLaM: E2E against GPU, %", -60.20, mean[1], None, _HIGH)
    yield _row("GLaM: E2E against 2xGPU, %", -35.38, mean[2], None, _HIGH)
    yield _row("GLaM: p99 TBT against 2xGPU, 512 in, %", -16.74, percent[0, 3], None, _HIGH)


def _requests_per_second(seed: int) -> Iterator[Claim]:
    """What Mixtral's largest batch serves; the paper raises the load until queues grow."""
    work = workload("Mixtral", 128, 4096, 512)
    stages = serve(work, seed)
    note = f"{_HOW}; a full batch of 128 all the time, an upper bound of what a queue can bear"
    for kind, published in (("gpu", 9.0), ("pe+et", 14.0)):
        stage_s = run(work, stages, machine(kind, 4)).seconds.mean()
        rate = work.batch / work.length_out / stage_s
        yield _row(
            f"Mixtral: requests a second, 4096 in, 512 out, {kind}", published, rate, None, note
        )


def co_processing_gain(counts: Longs, on: Machine) -> float:
    """Seconds of one unit at a time, the faster for each expert, over those of both at once.

    counts   int64[steps, experts], tokens of Mixtral's experts, all cut alike over the devices
    on       a machine with PIM; its memory spaces count
    returns  between 1 and 2 where experts may move one by one
    """
    n = np.arange(int(counts.max()) + 1)
    xpu = unit_seconds(on.xpu, MIXTRAL, n)
    pim = unit_seconds(on.pim or on.xpu, MIXTRAL, n)
    space = np.arange(counts.shape[1]) % on.spaces if on.spaces else None
    both_s = co_processing_split(counts, xpu, pim, space).makespan_s
    return float(np.minimum(xpu, pim)[counts].sum() / both_s.sum())


def _skew(sources: Sources) -> Iterator[Claim]:
    """What co-processing gains when routing is uneven, over what it gains when it is even."""
    on = replace(machine("pe+et", 4), spaces=0)
    rng = stream(sources.seed, "duplex skew")
    zipf = 1 / np.arange(1, 9)
    gain = []
    for popularity in (np.full(8, 1 / 8), zipf / zipf.sum()):
        odds, member = pair_law(popularity)
        gain.append(co_processing_gain(rng.multinomial(64, odds, 4096) @ member, on))
    even, uneven = gain
    note = "batch 64; the paper says skew raises it, without a figure; a gain lies in 1..2"
    claim = "Mixtral: co-processing gain over that with uniform routing"
    yield _row(f"{claim}, Zipf", None, uneven / even, (1.0, 2.0), note + "; exponent 1 assumed")
    trace = sources.captured("mixtral-8x7b-mtbench")
    if trace is not None:
        found = co_processing_gain(batches(trace.topk, 64, rng), on)
        note += "; MT-bench tokens drawn at random into batches"
        yield _row(f"{claim}, captured", None, found / even, (1.0, 2.0), note, "B")


def batches(topk: npt.NDArray[np.int16], size: int, rng: np.random.Generator) -> Longs:
    """int64[batches * layers, 8]: tokens of each expert when random tokens share a pass."""
    rows = rng.permutation(len(topk))[: len(topk) // size * size].reshape(-1, size)
    chosen = topk[rows].transpose(0, 2, 1, 3).reshape(len(rows) * topk.shape[1], -1)
    return np.asarray((chosen[:, :, None] == np.arange(8)).sum(axis=1), dtype=np.int64)
