"""`--config FILE.toml`: flags from a file, a table per command; what is typed wins."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from moesim.errors import SimulationError


def flags_from(path: Path, root: Any) -> dict[str, Any]:
    """Default values for every command, as the command line library takes them.

    path   TOML such as `[plan.placement]` with `ranks = 32`; dashes and underscores are alike
    root   the root command group
    raises SimulationError for a key that is no command or flag, or a file that is not TOML
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SimulationError(f"{path}: not a TOML file ({error})") from error
    return _checked(tables, root, str(path), "")


def _checked(table: dict[str, Any], command: Any, path: str, above: str) -> dict[str, Any]:
    """The table with flag names as parameters, after every key was found."""
    commands = getattr(command, "commands", {})
    flags = {parameter.name for parameter in command.params}
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if isinstance(value, dict) and key in commands:
            found[key] = _checked(value, commands[key], path, f"{above}{key}.")
        elif name in flags and not isinstance(value, dict):
            found[name] = value
        else:
            known = ", ".join(sorted([*commands, *flags]))
            raise SimulationError(f"{path}: {above}{key} is no command or flag, known: {known}")
    return found
