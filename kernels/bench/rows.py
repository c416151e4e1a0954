"""Result files: JSON lines, one file an operator, whole lines only, never the same point twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1


def row_file(folder: Path, op: str) -> Path:
    """The file that holds the rows of an operator."""
    return folder / f"{op}.jsonl"


def finished(folder: Path, op: str) -> set[str]:
    """Keys of the rows already measured; a line that a killed run left unfinished is cut off."""
    path = row_file(folder, op)
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return {str(json.loads(line).get("key")) for line in content[:whole].splitlines() if line}


def append(folder: Path, row: Mapping[str, Any]) -> None:
    """Add one row in a single write, so that a killed run leaves at most one line unfinished."""
    line = json.dumps(row, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    descriptor = os.open(row_file(folder, row["op"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)
