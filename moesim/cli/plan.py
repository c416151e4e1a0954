"""`moesim plan`: decide, with incumbents, a bound, an error bar and a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli import output
from moesim.cli.placement import Request, run, show
from moesim.cli.residency import residency

app = typer.Typer(no_args_is_help=True, help="Make a plan and prove it.")


@app.callback()
def plans() -> None:
    """Make a plan and prove it."""


@app.command()
def placement(
    trace: Annotated[str, typer.Argument(help="Routing trace or expert counts to plan on.")] = "",
    trace_option: Annotated[
        str, typer.Option("--trace", help="The same, as an option.", show_default=False)
    ] = "",
    judge: Annotated[
        str, typer.Option(help="Judge on this trace or counts; else on a held-out part.")
    ] = "",
    share: Annotated[
        float, typer.Option(min=0.05, max=0.95, help="Share of the trace that is planned on.")
    ] = 0.5,
    split: Annotated[
        str, typer.Option(help="Hold out requests at random (request) or the last ones (order).")
    ] = "request",
    model: Annotated[str, typer.Option(help="Name or config.json; else from the trace.")] = "",
    system: Annotated[str, typer.Option(help="Cluster, such as h800x32; see `catalog`.")] = "",
    ranks: Annotated[
        int, typer.Option("--ranks", "--ep", min=0, help="Expert-parallel ranks.")
    ] = 0,
    nodes: Annotated[int, typer.Option(min=0, help="Nodes the ranks are on.")] = 0,
    slots: Annotated[int, typer.Option(min=0, help="Physical expert slots of a layer.")] = 0,
    phase: Annotated[str, typer.Option(help="decode or prefill; else what the trace has.")] = "",
    tokens_per_rank: Annotated[
        int, typer.Option(min=0, help="Tokens of a step on a rank [128 decode, 2048 prefill].")
    ] = 0,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the KV cache per request.")] = 2048,
    send: Annotated[str, typer.Option(help="One copy per device, node or expert.")] = "device",
    replica_rule: Annotated[
        str, typer.Option(help="even, or local: the nearest replica, as SGLang's static dispatch.")
    ] = "even",
    two_batch_overlap: Annotated[
        bool, typer.Option("--two-batch-overlap", help="Judge with two half batches overlapped.")
    ] = False,
    node_limited: Annotated[
        bool, typer.Option("--node-limited", help="Keep every expert group inside one node.")
    ] = False,
    keep_balance: Annotated[
        bool | None,
        typer.Option(help="Never busier than under EPLB [yes for counts, no for tokens]."),
    ] = None,
    current: Annotated[
        str, typer.Option(help="What runs today: an incumbent's name or a plan file.")
    ] = "contiguous",
    drift: Annotated[
        float,
        typer.Option(min=0.0, help="Standard deviation of expert loads until the plan is used."),
    ] = 0.3,
    least_gain: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of a step that a plan must save.")
    ] = 0.01,
    steps: Annotated[int, typer.Option(min=1, help="Steps to judge at most.")] = 32,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the plan and its proof.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 when the plan is not worth it.")
    ] = False,
) -> None:
    """Decide which rank holds which expert, with replicas, and judge it on unseen routing."""
    request = Request(
        trace=_one_of(trace, trace_option),
        judge=judge,
        share=share,
        split=split,
        model=model,
        system=system,
        ranks=ranks,
        nodes=nodes,
        slots=slots,
        phase=phase,
        tokens_per_rank=tokens_per_rank,
        context=context,
        send=send,
        replica_rule=replica_rule,
        two_batch_overlap=two_batch_overlap,
        node_limited=node_limited,
        keep_balance=keep_balance,
        current=current,
        drift=drift,
        least_gain=least_gain,
        steps=steps,
        seed=seed,
    )
    document = run(request, out)
    if as_json:
        output.emit_json(document)
    else:
        show(document)
    if strict and document["verdict"] != "deploy":
        raise typer.Exit(1)


app.command("residency")(residency)


def _one_of(argument: str, option: str) -> str:
    if bool(argument) == bool(option):
        raise typer.BadParameter("give one trace, as the argument or with --trace")
    return argument or option
