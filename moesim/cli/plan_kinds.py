"""Which kind of plan a file holds, told before the reader of that kind is chosen."""

from __future__ import annotations

import json
from pathlib import Path

_MOST_BYTES = 1 << 30


def plan_kind(path: Path) -> str:
    """The file's `kind`, "" when it is no plan: its reader then says what is wrong."""
    if path.stat().st_size > _MOST_BYTES:
        return ""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return ""
    kind = content.get("kind") if isinstance(content, dict) else ""
    return kind if isinstance(kind, str) else ""


def is_residency(path: Path) -> bool:
    """Whether the file holds a residency plan."""
    return plan_kind(path) == "residency"
