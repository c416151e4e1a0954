"""`moesim export`: a plan as the file of the engine that will run it, and the flags."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from moesim.cli import output

ENGINES = ("sglang",)


def export(
    plan: Annotated[Path, typer.Argument(help="Plan file that `moesim plan` wrote.")],
    to: Annotated[str, typer.Option("--to", help=f"Engine: {', '.join(ENGINES)}.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="The engine's file.")],
    all_to_all: Annotated[
        str, typer.Option(help="SGLang's --moe-a2a-backend for the launch line.")
    ] = "deepep",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Write a plan as an engine's own file and say how to launch with it."""
    from planners.errors import PlanError
    from planners.export import sglang
    from planners.planfile import read_plan

    if to not in ENGINES:
        raise PlanError(f"engine {to!r} is unknown, known: {', '.join(ENGINES)}")
    written = sglang.write(read_plan(plan), out, all_to_all)
    if as_json:
        output.emit_json(
            {"file": written.map_file, "sidecar": written.sidecar, "flags": list(written.flags)}
        )
        return
    output.say(f"Wrote {written.map_file}; where it comes from is in {written.sidecar}.")
    output.say("Launch with:")
    output.say("  python -m sglang.launch_server --model-path MODEL " + shlex.join(written.flags))
