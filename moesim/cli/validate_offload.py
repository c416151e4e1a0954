"""`moesim validate offload`: run an offloading runtime here, and predict every step of it.

The runtime is `kernels/offload`, which shares no import with this package: it runs in a process of
its own, takes a file of routing, and hands back one JSON record.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli import output
from moesim.cli.inputs import BUNDLED, open_trace
from moesim.errors import SimulationError

if TYPE_CHECKING:
    from moesim.offload.truth import Asked, Compared, Truth
    from moesim.offload.truth_record import Record

RUNTIME = "moesim_kernels.offload"
OUT_OF_TOLERANCE = 1
USUAL_SHARE = 0.375  # of a layer's experts: slots unless said
ROBBED = "no round of the step was calm: other programs held the cores"
INCOMPLETE = "token of the trace without all its experts"
PICTURE = "predicted_against_measured.png"
SIDES = ("measured", "predicted")
COLUMNS = (
    *("policy", "steps", "median %", "p90 %", "bias %", "ms", "predicted", "stall ms", "predicted"),
    *("MB/token", "predicted", "hit rate", "decided alike"),
)
STEP_COLUMNS = (
    *("policy", "token", "measured_s", "predicted_s", "measured_stall_s", "predicted_stall_s"),
    *("robbed_s", "hits", "misses", "prefetched", "scored"),
)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for, as typed; 0 slots and a negative recall mean "not said"."""

    trace: str
    tier: str
    slots: int
    tokens: int
    warm_up: int
    rounds: int
    layers: int
    sizes: tuple[int, int, int]
    recall: float
    folder: Path | None
    keep: bool
    seed: int


def offload(
    trace: Annotated[str, typer.Option(help="Routing to run, token by token.")] = BUNDLED,
    tier: Annotated[
        str,
        typer.Option(
            help="Where experts wait: direct (disk), buffered (disk through the page cache), mapped"
            " (memory), pinned (memory, for a GPU), auto (direct, else buffered)."
        ),
    ] = "auto",
    slots: Annotated[
        int, typer.Option(min=0, help="Experts of a layer that fit; 3/8 of them unless said.")
    ] = 0,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are timed.")] = 64,
    warm_up: Annotated[int, typer.Option(min=0, help="Tokens before them that fill slots.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="How often each token is timed.")] = 3,
    layers: Annotated[int, typer.Option(min=1, help="First layers of the trace to run.")] = 8,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the model that runs.")] = 512,
    intermediate: Annotated[int, typer.Option(min=1, help="Width of its experts.")] = 512,
    dense: Annotated[
        int, typer.Option(min=1, help="Width of what stands in for attention.")
    ] = 4096,
    recall: Annotated[
        float,
        typer.Option(max=1.0, help="Of predicted experts; as published of the model unless said."),
    ] = -1.0,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where the file of experts goes; else among temporary files."),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave that file there, for another run.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Deals the prediction errors.")] = 0,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Median error in per cent that still passes.")
    ] = 10.0,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the record, the steps and a picture."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Run an offloading runtime on this machine, and predict each step of it.

    A small MoE stack with random weights runs the routing of a trace, experts in a slower tier,
    under four policies: read on demand, pin the most frequent, LRU, and LRU with reads ahead. Its
    parts (reads, matrix products) are timed in between. The simulator decides the same routing,
    clocks it from these parts alone, and never sees a step that it predicts.

    Exit code 1: the median error of a policy is beyond the tolerance, the order of the policies is
    not the measured one, or a decision differs.
    """
    wish = Wish(
        trace, tier, slots, tokens, warm_up, rounds, layers, (hidden, intermediate, dense), recall,
        folder, keep, seed,
    )  # fmt: skip
    _require_torch()
    if out is not None:
        output.result_folder(out)
    from moesim.offload.truth import compare
    from moesim.offload.truth_record import read_record

    asked, skipped, facts = _asked(wish)
    record = read_record(run_runtime(asked, _options(wish, asked)))
    truth = compare(record, asked)
    found = document(truth, record, skipped)
    found |= {"inputs": facts, "passed": truth.passes(tolerance), "tolerance_pct": tolerance}
    if out is not None:
        _write(found, truth, out)
    if as_json:
        output.emit_json(found)
    else:
        _show(found)
    if not found["passed"]:
        raise typer.Exit(OUT_OF_TOLERANCE)


def _require_torch() -> None:
    if find_spec("torch") is None:
        raise SimulationError("validate offload needs torch: pip install 'moesim[kernels]'")


def _asked(wish: Wish) -> tuple[Asked, int, dict[str, Any]]:
    """What the runtime is to run, tokens of the trace left out, and what the choice rests on."""
    from moesim.offload.truth import asked_for, cut
    from moesim.policies import prefetch
    from traces.layer_steps import forward_passes, layer_steps
    from traces.routing import content_hash, require_tokens

    whole = require_tokens(open_trace(wish.trace)[0], "running a trace")
    n_layers = min(wish.layers, whole.n_layers)
    part, skipped = cut(whole, n_layers, wish.warm_up + wish.tokens)
    recall: Any = wish.recall
    if wish.recall < 0:
        recall = prefetch.next_gate_recall(whole.model, n_layers)
    named = prefetch.oracle(layer_steps(part, forward_passes(part)), recall, seed=wish.seed)
    slots = wish.slots or max(part.top_k, round(USUAL_SHARE * part.n_experts))
    facts = {
        "trace": wish.trace, "model": whole.model, "trace_part_sha256": content_hash(part),
        "layers": n_layers, "n_experts": part.n_experts, "top_k": part.top_k, "slots": slots,
        "tokens": wish.tokens, "warm_up": wish.warm_up, "rounds": wish.rounds, "recall": recall,
        "seed": wish.seed,
    }  # fmt: skip
    return asked_for(part, named, slots, wish.warm_up), skipped, facts


def _options(wish: Wish, asked: Asked) -> dict[str, Any]:
    """The runtime's `MeasureOptions` as JSON."""
    hidden, intermediate, dense = wish.sizes
    work = asked.work
    spec = {
        "n_layers": work.n_layers, "n_experts": work.n_experts, "top_k": work.top_k,
        "hidden": hidden, "intermediate": intermediate, "dense": dense, "seed": wish.seed,
    }  # fmt: skip
    return {
        "spec": spec, "slots": asked.slots, "warm_up": asked.warm_up, "rounds": wish.rounds,
        "tier": wish.tier, "folder": None if wish.folder is None else str(wish.folder),
        "keep": wish.keep,
    }  # fmt: skip


def run_runtime(asked: Asked, options: Mapping[str, Any]) -> dict[str, Any]:
    """Run the runtime with a progress bar; its record.

    raises  SimulationError with its own words when it could not run
    """
    import numpy as np

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        routing = Path(folder) / "routing.npz"
        np.savez(routing, topk=asked.ids, predicted=asked.predicted)
        command = [sys.executable, "-m", RUNTIME, "--routing", str(routing),
                   "--options", json.dumps(options)]  # fmt: skip
        steps = (asked.n_tokens - asked.warm_up) * options["rounds"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process:
            try:
                record = _follow(process, steps)
            except BaseException:
                process.terminate()
                raise
            process.wait()
        said.seek(0)
        if record is None:
            lines = said.read().strip().splitlines()
            last = lines[-1].removeprefix("error: ") if lines else f"{RUNTIME} ended early"
            raise SimulationError(f"validate offload: {last}")
        return record


def _follow(process: subprocess.Popen[str], steps: int) -> dict[str, Any] | None:
    """The record at the end, None where there is none."""
    with output.progress(steps, "running") as step:
        done = 0
        for event in _events(process):
            if event["event"] == "turn":
                step(event["done"] - done)
                done = event["done"] % event["of"]
            elif event["event"] == "end":
                record: dict[str, Any] = event["result"]
                return record
    return None


def _events(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    for line in process.stdout or ():
        yield json.loads(line)


def document(truth: Truth, record: Record, skipped: int = 0) -> dict[str, Any]:
    """The keys that scripts rely on.

    rows     steps of all policies that are scored; skipped, steps and tokens of the trace that are
             not, `skipped_why` says for what reason
    """
    from moesim.lower.runtime import Beside

    robbed = sum(int((~of.scored).sum()) for of in truth.policies.values())
    beside = Beside.of(record.costs.parts())
    return asdict(truth.overall) | {
        "skipped": robbed + skipped,
        "skipped_why": {ROBBED: robbed, INCOMPLETE: skipped},
        "groups": {
            name: asdict(truth.groups[name]) | _figures(of, record.costs.expert_bytes)
            for name, of in truth.policies.items()
        },
        "rank_order_right": truth.order_predicted == truth.order_measured,
        "order_measured": list(truth.order_measured),
        "order_predicted": list(truth.order_predicted),
        "rounds_agree": truth.rounds_agree,
        "same_decisions": truth.same_decisions,
        "same_outputs": record.same_outputs,
        "tier": record.tier,
        "stack": record.stack,
        "costs": record.costs.model_dump(),
        "slow_down": asdict(beside),
        "environment": record.environment,
    }


def _figures(of: Compared, expert_bytes: int) -> dict[str, Any]:
    """Means over the steps of a policy that count, measured and predicted."""
    kept, clocked = of.scored, of.predicted.clocked
    pairs = {
        "step_s": ("step_s", clocked.step_s),
        "stall_s": ("stall_s", clocked.stall_s),
        "bytes_per_token": ("bytes_read", of.predicted.reads * expert_bytes),
        "late_per_token": ("late", clocked.late),
        "dropped_per_token": ("dropped", clocked.dropped),
    }
    means = {
        name: {
            "measured": float(of.measured.column(column)[kept].mean()),
            "predicted": float(predicted[kept].mean()),
        }
        for name, (column, predicted) in pairs.items()
    }
    rates = {"measured": of.measured.hit_rate, "predicted": of.predicted.hit_rate}
    return means | {
        "hit_rate": rates,
        "robbed": int((~of.calm).sum()),
        "robbed_share": of.robbed_share,
        "differing": dict(of.differing),
    }


def _write(found: Mapping[str, Any], truth: Truth, folder: Path) -> None:
    from moesim.report.offload_truth_picture import offload_truth_picture

    output.write_json(folder / "result.json", found)
    output.write_csv(folder / "steps.csv", STEP_COLUMNS, _steps(truth))
    offload_truth_picture(truth, folder / PICTURE)
    output.note(f"wrote result.json, steps.csv and {PICTURE} into {folder}")


def _steps(truth: Truth) -> Iterator[list[object]]:
    for name, of in truth.policies.items():
        clocked, counts, measured = of.predicted.clocked, of.predicted.counts, of.measured
        columns = (
            measured.column("step_s"), clocked.step_s, measured.column("stall_s"), clocked.stall_s,
            measured.column("robbed_s"), counts.hits.sum(1), counts.misses.sum(1),
            counts.prefetched.sum(1), of.scored,
        )  # fmt: skip
        for token, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            yield [name, token, *row]


def _show(found: Mapping[str, Any]) -> None:
    groups = found["groups"]
    title = f"Steps of {len(groups)} policies, experts read from tier {found['tier']}"
    output.table(title, COLUMNS, [_line(name, of) for name, of in groups.items()])
    output.say(f"all: {found['rows']} steps, median error {found['median_abs_pct_error']:.2f} %")
    _show_order(found)
    for name, of in groups.items():
        for count, n in of["differing"].items():
            output.say(f"{name}: {count} of {n} layers of tokens differ from what was measured")
        if of["robbed"] + of["rows"] > found["inputs"]["tokens"]:
            share = f"{of['robbed_share']:.0%} of their time"
            output.say(f"{name}: hardly a calm step, all scored; the cores were taken for {share}")
    if not found["same_outputs"]:
        output.say("the runs did not compute the same: the runtime is at fault")
    if found["slow_down"]["capped"]:
        output.say("a read slows the computation more than twofold; predicted as twofold")
    for reason, count in found["skipped_why"].items():
        if count:
            output.say(f"skipped, {reason}: {count}")
    word = "passed" if found["passed"] else "not passed"
    output.say(f"{word}, tolerance {found['tolerance_pct']:g} % (median of each policy)")


def _show_order(found: Mapping[str, Any]) -> None:
    output.say(f"fastest first, measured:  {', '.join(found['order_measured'])}")
    if not found["rank_order_right"]:
        output.say(f"fastest first, predicted: {', '.join(found['order_predicted'])}")
    if not found["rounds_agree"]:
        output.say("the rounds of measurements do not agree on the order themselves")


def _line(name: str, of: Mapping[str, Any]) -> list[object]:
    times = [1e3 * of[key][side] for key in ("step_s", "stall_s") for side in SIDES]
    moved = [of["bytes_per_token"][side] / 1e6 for side in SIDES]
    return [
        name, of["rows"], of["median_abs_pct_error"], of["p90_abs_pct_error"], of["bias_pct"],
        *times, *moved, of["hit_rate"]["measured"], not of["differing"],
    ]  # fmt: skip
