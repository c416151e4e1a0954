"""Plan DeepSeek-V3 placements on one workload, judge on every other: is it ever worse than EPLB?

python benchmarks/unseen_workloads.py FOLDER [--small]

FOLDER holds expert counts named deepseek-v3-*.npz. For 32 ranks with 288 slots on 4 nodes and 64
ranks with 320 slots on 8, every plan is compared with both forms of EPLB: balance in every layer
of its own workload, seconds to plan, the node-limited form against its bound, and the step time on
every unseen workload.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from hwmodels.systems import load_system
from moesim.lower.layer_costs import StepOptions
from moesim.placement_study import Study, StudyOptions, placement_study
from planners.dispatch import Mode
from traces.formats.detect import read_any
from traces.formats.options import ImportOptions
from traces.models import load_model
from traces.routing import ExpertCounts

SHAPES = ((32, 288), (64, 320))
EPLB = ("eplb_hierarchical", "eplb_global")


@dataclass(frozen=True)
class Workload:
    """One file of expert counts."""

    name: str
    phase: str
    counts: ExpertCounts


def workloads(folder: Path) -> list[Workload]:
    """All DeepSeek-V3 counts of a folder."""
    model = load_model("deepseek-v3")
    found = []
    for path in sorted(folder.glob("deepseek-v3-*.npz")):
        counts = read_any(path, ImportOptions(model=model))
        name = path.stem.removeprefix("deepseek-v3-")
        found.append(Workload(name, name.split("_")[0], counts))
    return found


def study(plan: Workload, judge: Workload, shape: tuple[int, int], mode: Mode) -> Study:
    """The study of one pair on H800 nodes of eight."""
    tokens = 128 if judge.phase == "decode" else 2048
    step = StepOptions(tokens_per_rank=tokens, phase=judge.phase, mode=mode)
    options = StudyOptions(n_slots=shape[1], step=step, most_steps=8)
    judged = None if judge is plan else judge.counts
    system = load_system(f"h800x{shape[0]}")
    return placement_study(load_model("deepseek-v3"), system, plan.counts, judged, options)


def main(arguments: list[str]) -> int:
    """Print the table; returns how many unseen pairs were worse than the better EPLB."""
    small = "--small" in arguments
    found = workloads(Path(arguments[0]))[: 2 if small else None]
    table = Table(title="Plans of DeepSeek-V3 on unseen workloads, against the better EPLB")
    for column in (
        "ranks", "send", "solve s (max)", "layers less balanced", "node-limited gap (max)",
        "own step time", "unseen step time: mean", "worst", "pairs", "worse",
        "of one phase: worst", "pairs ", "worse ",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    worse = 0
    for shape in SHAPES[:1] if small else SHAPES:
        for mode in ("device",) if small else ("device", "node"):
            own, unseen, akin, solve_s, gaps, unbalanced = [], [], [], [], [], 0
            for plan in found:
                for judge in found:
                    result = study(plan, judge, shape, mode)
                    seconds = {n: r.seconds.mean() for n, r in result.results.items()}
                    ratio = seconds["plan"] / min(seconds[form] for form in EPLB)
                    (own if judge is plan else unseen).append(ratio)
                    if judge is not plan and judge.phase == plan.phase:
                        akin.append(ratio)
                    if judge is plan:
                        solve_s.append(result.solve_s)
                        gaps.append(result.node_limited.gap)
                        balance = result.balance.by_placement
                        best = np.minimum(*(balance[form] for form in EPLB))
                        unbalanced += int((balance["plan"] > best * (1 + 1e-9)).sum())
            lost = int((np.array(unseen) > 1).sum())
            worse += lost
            table.add_row(
                str(shape[0]), mode, f"{max(solve_s):.2f}", str(unbalanced), f"{max(gaps):.2%}",
                f"{np.mean(own):.4f}", f"{np.mean(unseen):.4f}", f"{max(unseen):.4f}",
                str(len(unseen)), str(lost), f"{max(akin, default=0):.4f}", str(len(akin)),
                str(int((np.array(akin) > 1).sum())),
            )  # fmt: skip
    Console(width=200).print(table)
    return worse


if __name__ == "__main__":
    main(sys.argv[1:])
