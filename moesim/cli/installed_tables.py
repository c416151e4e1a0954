"""The operator tables that the optional package aiconfigurator-core holds, in our columns."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from moesim.errors import SimulationError

if TYPE_CHECKING:
    import pandas as pd

PACKAGE = "aiconfigurator_core"
# Name of a table there to how many milliseconds are called here.
TABLES = MappingProxyType(
    {
        "moe": "latency_ms", "gemm": "latency_ms", "context_attention": "latency",
        "generation_attention": "latency", "context_mla": "latency", "generation_mla": "latency",
    }
)  # fmt: skip


def write_tables(system: str, folder: Path) -> list[Path]:
    """Tables of a system ("h100_sxm") as Parquet files in a folder, one for each kind there is.

    raises  SimulationError when the package is not installed or has no such system
    """
    source = _system_folder(system)
    written = []
    for name in TABLES:
        if files := sorted(source.rglob(f"{name}_perf.parquet")):
            path = folder / f"aiconfigurator-{system}-{name}.parquet"
            _joined(files, system, name).to_parquet(path)
            written.append(path)
    if not written:
        raise SimulationError(f"{PACKAGE}: no operator table of {system!r}")
    return written


def _system_folder(system: str) -> Path:
    from hwmodels.fitted.tables import HARDWARE

    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SimulationError(
            f"aiconfigurator:{system} needs the package aiconfigurator-core (extra `measured`)"
        )
    data = Path(spec.submodule_search_locations[0]) / "systems" / "data"
    there = {path.name for path in data.iterdir() if path.is_dir()} if data.is_dir() else set()
    known = sorted(there & set(HARDWARE))
    if system not in known:
        raise SimulationError(f"aiconfigurator:{system}: no such system, known: {', '.join(known)}")
    return data / system


def _joined(files: list[Path], system: str, name: str) -> pd.DataFrame:
    """Rows of all frameworks and versions; decode and prefill told apart by the file's name."""
    import pandas as pd

    rows = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    rows = rows.rename(columns={"latency": TABLES[name]}).assign(hw=system, op_name=name)
    return rows.assign(framework=rows["framework"].str.lower())
