"""docs/cli.md, made from the commands themselves.

python -m moesim.cli.docs            write it
python -m moesim.cli.docs --check    exit code 1 when the file differs from the commands
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer import Typer
from typer.models import ArgumentInfo, OptionInfo

from moesim.cli import output
from moesim.cli.main import app, root
from traces.files import write_bytes

TARGET = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
_HEAD = """\
# The command line

Made from the code by `python -m moesim.cli.docs`; do not edit.

The answer goes to stdout, everything else to stderr; with `--json` stdout holds one JSON document.
Exit codes: 0 done, 1 answered "no" (checks failed, not worth it with `--strict`), 2 could not run
(one line on stderr says why), 130 interrupted. `NO_COLOR` turns colours off; a progress bar is
drawn only on a terminal. A trace is a file in any known format, or the word `bundled`.
"""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a command.

    flags    as typed ("--output", "-o"), empty for an argument
    kind     what follows the flag ("INTEGER"), "" for a switch
    default  as typed; "" where leaving it out means "not said"
    """

    name: str
    flags: tuple[str, ...]
    kind: str
    required: bool
    default: str
    help: str


def page() -> str:
    """The whole page as Markdown; equal commands give equal text."""
    sections = [_section(path, command) for path, command in commands(app, "moesim")]
    return "\n".join([_HEAD, _table(parameters(root)), *sections])


def commands(typer_app: Typer, path: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every command's full name and function, those of groups after the app's own."""
    for info in typer_app.registered_commands:
        if info.callback is not None:
            name = info.name or info.callback.__name__.replace("_", "-")
            yield f"{path} {name}", info.callback
    for group in typer_app.registered_groups:
        if group.typer_instance is not None:
            yield from commands(group.typer_instance, f"{path} {group.name}")


def parameters(command: Callable[..., Any]) -> list[Parameter]:
    """Arguments and flags of a command's function, in its order."""
    hints = typing.get_type_hints(command, include_extras=True)
    return [
        _parameter(name, hints[name], parameter.default)
        for name, parameter in inspect.signature(command).parameters.items()
        if hasattr(hints[name], "__metadata__")  # the library's own context is no flag
    ]


def _parameter(name: str, hint: Any, default: object) -> Parameter:
    plain, info = hint.__origin__, hint.__metadata__[0]
    required = default is inspect.Parameter.empty
    value = "" if required else _default(name, default)
    if isinstance(info, ArgumentInfo):
        shown = (info.metavar or name.upper()).strip("[]")
        return Parameter(shown, (), "", required, value, info.help or "")
    if not isinstance(info, OptionInfo):
        raise TypeError(f"{name}: {info!r}, expected typer.Argument or typer.Option")
    kind = _kind(plain)
    declared = (info.default, *(info.param_decls or ()))  # typer takes the first as a default
    flags = tuple(flag for flag in declared if isinstance(flag, str) and flag.startswith("-"))
    if not flags:
        flag = "--" + name.replace("_", "-")
        flags = (flag,) if kind else (flag, "--no-" + flag.removeprefix("--"))
    return Parameter(name, flags, kind, required, value, info.help or "")


def _kind(hint: Any) -> str:
    """INTEGER, FLOAT, TEXT or PATH; "" for a switch."""
    if isinstance(hint, types.UnionType):  # Path | None
        hint = next(part for part in hint.__args__ if part is not type(None))
    if typing.get_origin(hint) is list:
        return _kind(hint.__args__[0]) + ", repeated"
    return {bool: "", int: "INTEGER", float: "FLOAT", str: "TEXT", Path: "PATH"}[hint]


def _default(name: str, value: object) -> str:
    """Empty text and a whole 0 mean "not said", but for the seed."""
    if value is None or isinstance(value, bool) or value == "":
        return ""
    if isinstance(value, int) and value == 0 and name != "seed":
        return ""
    return str(value)


def _section(path: str, command: Callable[..., Any]) -> str:
    found = parameters(command)
    arguments = [p for p in found if not p.flags]
    texts = [p.name if p.required else f"[{p.name}]" for p in arguments]
    lines = [f"## {path}", "", inspect.cleandoc(command.__doc__ or ""), ""]
    lines += ["```", " ".join([path, *texts, "[flags]"]), "```", ""]
    lines += [f"* `{text}`: {p.help}" for text, p in zip(texts, arguments, strict=True)]
    lines += [""] if arguments else []
    return "\n".join([*lines, _table(found)])


def _table(found: list[Parameter]) -> str:
    rows = [_row(parameter) for parameter in found if parameter.flags]
    return "\n".join(["| flag | default | what |", "|---|---|---|", *rows]) + "\n"


def _row(parameter: Parameter) -> str:
    flags = ", ".join(f"`{flag}`" for flag in parameter.flags)
    default = f"`{parameter.default}`" if parameter.default else ""
    cells = (
        f"{flags} {parameter.kind}".strip(),
        "required" if parameter.required else default,
        parameter.help.replace("|", "\\|"),
    )
    return f"| {' | '.join(cells)} |"


def run(arguments: list[str]) -> int:
    """Write the page, or compare it; the exit code."""
    if arguments not in ([], ["--check"]):
        output.note("usage: python -m moesim.cli.docs [--check]")
        return 2
    text = page()
    if not arguments:
        write_bytes(TARGET, text.encode())
        output.note(f"wrote {TARGET}")
        return 0
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    output.note(f"{TARGET} is stale; write it with `python -m moesim.cli.docs`")
    return 1


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
