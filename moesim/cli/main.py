"""`moesim`: the commands, and what an error means to the caller.

Exit codes: 0 done; 1 answered "no"; 2 could not run (one line on stderr says why); 130 interrupted.
A broken invariant is a bug of ours and keeps its traceback. Command modules import nothing heavy
before they run, so `moesim --help` is fast.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hwmodels.errors import HardwareError
from moesim import __version__
from moesim.cli import (
    bench,
    calibrate,
    catalog,
    demo,
    export,
    offload,
    output,
    plan,
    reproduce,
    simulate,
    trace,
)
from moesim.cli import validate as validate_commands
from moesim.errors import SimulationError
from planners.errors import PlanError
from traces.errors import TraceError

REFUSED = (TraceError, HardwareError, PlanError, SimulationError)
COULD_NOT_RUN, INTERRUPTED = 2, 130


class Commands(TyperGroup):
    """The root of all commands: takes --no-progress anywhere, and turns errors into exit codes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put --no-progress first, where the root looks for it."""
        flag = "--no-progress"
        rest = [word for word in args if word != flag]
        return super().parse_args(ctx, [flag, *rest] if flag in args else rest)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what the user can mend is one line and exit code 2."""
        try:
            return super().invoke(ctx)
        except REFUSED as error:
            raise _refuse(str(error)) from error
        except KeyboardInterrupt as error:
            output.note("interrupted")
            raise typer.Exit(INTERRUPTED) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone
                raise
            raise _refuse(_what_failed(error)) from error


app = typer.Typer(
    cls=Commands,
    name="moesim",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Routing trace of a Mixture-of-Experts model in, placement plan with proof out.",
)
app.command("demo")(demo.demo)
app.add_typer(trace.app, name="trace")
app.add_typer(catalog.app, name="catalog")
app.add_typer(plan.app, name="plan")
app.command("simulate")(simulate.simulate)
app.command("offload")(offload.offload)
app.command("export")(export.export)
app.command("bench")(bench.bench)
app.command("calibrate")(calibrate.calibrate)
app.add_typer(validate_commands.app, name="validate")
app.command("reproduce")(reproduce.reproduce)


def _version(wanted: bool) -> None:
    if wanted:
        output.say(f"moesim {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file of flags, a table per command; typed ones win."),
    ] = None,
    no_progress: Annotated[
        bool, typer.Option("--no-progress", help="Draw no progress bar; may stand anywhere.")
    ] = False,
) -> None:
    """Routing trace of a Mixture-of-Experts model in, placement plan with proof out."""
    output.show_progress.set(not no_progress)
    if config is not None:
        from moesim.cli.config import flags_from

        context.default_map = flags_from(config, context.command)


def run() -> None:
    """The entry point; ends the process with the exit code."""
    app(prog_name="moesim")


def _refuse(message: str) -> typer.Exit:
    output.note("error: " + " ".join(message.split()))
    return typer.Exit(COULD_NOT_RUN)


def _what_failed(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


if __name__ == "__main__":
    run()
