"""Parquet tables of measured operators, as commands take them: files, folders, or a package's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.errors import SimulationError

if TYPE_CHECKING:
    from hwmodels.fitted.tables import Measured, Table

INSTALLED = "aiconfigurator:"  # before a system's name, in place of a path
_MAGIC = b"PAR1"


@dataclass(frozen=True, slots=True)
class TableInputs:
    """Tables and the files they come from; files, name to sha256."""

    table: Table
    files: Mapping[str, str]

    @property
    def groups(self) -> tuple[Measured, ...]:
        """Rows by kernel and device."""
        return self.table.groups


def are_tables(paths: Sequence[Path]) -> bool:
    """True for Parquet tables, False for rows in JSON lines.

    raises  SimulationError when there are some of both; OSError
    """
    tables = [path for path in paths if _is_table(path)]
    if tables and len(tables) < len(paths):
        rows = next(path for path in paths if path not in tables)
        raise SimulationError(f"{tables[0]} is a Parquet table and {rows} is not: pass one kind")
    return bool(tables)


def read(paths: Sequence[Path]) -> TableInputs:
    """Every kernel of the tables.

    raises  SimulationError or HardwareError naming the file that cannot be used; OSError
    """
    from hwmodels.fitted.tables import read_tables

    with table_files(paths) as files:
        digests = {path.name: _digest(path) for path in files}
        table = read_tables(files)
    if not table.groups:
        reasons = ", ".join(f"{reason} {n}" for reason, n in table.skipped.items()) or "empty"
        raise SimulationError(f"{', '.join(digests)}: no row that can be used ({reasons})")
    return TableInputs(table, digests)


def refuse_shared(data: Sequence[Path], fit: Sequence[Path]) -> None:
    """SimulationError when a file, under any name, is fitted to and scored."""
    with table_files(data) as of_data, table_files(fit) as of_fit:
        scored = {_digest(path): path for path in of_data}
        for path in of_fit:
            if (same := scored.get(_digest(path))) is not None:
                raise SimulationError(f"{path}: is to be fitted and, as {same.name}, to be scored")


@contextmanager
def table_files(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """The files behind paths, folders and names of installed tables, in that order."""
    from tempfile import TemporaryDirectory

    from moesim.cli.installed_tables import write_tables

    with TemporaryDirectory(prefix="moesim-tables-") as beside:
        found: list[Path] = []
        for path in paths:
            if (text := str(path)).startswith(INSTALLED):
                found += write_tables(text.removeprefix(INSTALLED), Path(beside))
            else:
                found += sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        yield found


def _is_table(path: Path) -> bool:
    if str(path).startswith(INSTALLED):
        return True
    if path.is_dir():
        return any(path.glob("*.parquet")) and not any(path.glob("*.jsonl"))
    if path.suffix == ".parquet":
        return True
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
