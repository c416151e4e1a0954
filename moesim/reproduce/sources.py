"""Where a reproduction gets its routing from: captured traces in a folder, else synthetic ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from traces.routing import RoutingTrace


@dataclass(frozen=True, slots=True)
class Sources:
    """Captured traces to reproduce on, and how much of them.

    folder      folder of trace files (any format `moesim trace import` reads), None for none
    seed        of everything drawn at random
    max_tokens  most tokens of a captured trace that are replayed
    """

    folder: Path | None = None
    seed: int = 0
    max_tokens: int = 20_000

    def captured(self, stem: str) -> RoutingTrace | None:
        """The trace in the folder's file `<stem>.*`, cut to max_tokens; None when it has none."""
        if self.folder is None:
            return None
        files = sorted(self.folder.glob(f"{stem}.*"))
        if not files:
            return None
        from traces.formats.detect import read_any

        trace = read_any(files[0])
        return trace.rows(slice(0, self.max_tokens)) if isinstance(trace, RoutingTrace) else None
