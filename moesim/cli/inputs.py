"""What commands take in: traces in any form, and the model that a trace is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from moesim.cli.output import note
from moesim.errors import SimulationError
from traces.errors import TraceError

if TYPE_CHECKING:
    from traces.formats.options import ImportOptions
    from traces.model import ModelSpec
    from traces.routing import ExpertCounts, RoutingTrace

BUNDLED = "bundled"
_BUNDLED_FILE = "data/tiny-moe-32e.parquet"
_USUAL_TOKENS: Mapping[str, int] = MappingProxyType({"decode": 128, "prefill": 2048})
_LEAST_STEPS = 4


def open_trace(
    text: str, model: str | None = None, options: ImportOptions | None = None
) -> tuple[RoutingTrace | ExpertCounts, ModelSpec | None]:
    """A trace or counts, and the model it is of.

    text     path of a file in any known format, or "bundled"
    model    catalogue name, alias or path of a config.json; None or "" takes the model named in the
             file, else the catalogue name that the file's name begins with (said on stderr)
    options  what else the caller knows of the file; its model is replaced
    returns  the model is None when nothing names it
    raises   TraceError when the file cannot be read, or is not of the model
    """
    from traces.formats.options import ImportOptions
    from traces.models import load_model

    known = options or ImportOptions()
    with _located(text) as path:
        if not model:
            return _with_found_model(path, known)
        spec = load_model(model)
        return _read(path, replace(known, model=spec)), spec


def require_model(model: ModelSpec | None, purpose: str) -> ModelSpec:
    """The model itself, or a SimulationError saying what needs one."""
    if model is None:
        raise SimulationError(f"{purpose} needs the model: pass --model NAME or a config.json")
    return model


@contextmanager
def _located(text: str) -> Iterator[Path]:
    """The path behind the text; the bundled trace may have to be unpacked for a while."""
    if text != BUNDLED:
        yield Path(text)
        return
    with resources.as_file(resources.files("traces").joinpath(_BUNDLED_FILE)) as path:
        if not path.exists():
            raise TraceError(f"the bundled trace {_BUNDLED_FILE} is not in this installation")
        yield path


def _read(path: Path, options: ImportOptions) -> RoutingTrace | ExpertCounts:
    from traces.formats.detect import read_any

    return read_any(path, options)


def _with_found_model(
    path: Path, options: ImportOptions
) -> tuple[RoutingTrace | ExpertCounts, ModelSpec | None]:
    """The trace with the model that the file or its name tells."""
    try:
        trace = _read(path, options)
    except TraceError:
        guess = _model_from_file_name(path)
        if guess is None:
            raise
        # Some formats cannot be read without the model's shape.
        return _assumed(guess, path, options), guess
    if trace.model:
        return trace, _model_named_in(trace, path)
    guess = _model_from_file_name(path)
    if guess is None:
        return trace, None
    try:  # with the model, the reader also knows which layers these are
        return _assumed(guess, path, options), guess
    except TraceError as error:
        note(f"{path.name}: not taken for a trace of {guess.name} ({error})")
        return trace, None


def _assumed(guess: ModelSpec, path: Path, options: ImportOptions) -> RoutingTrace | ExpertCounts:
    trace = _read(path, replace(options, model=guess))
    note(f"{path.name}: model {guess.name} assumed from the file's name")
    return trace


def _model_from_file_name(path: Path) -> ModelSpec | None:
    from traces.formats.common import name_from_file
    from traces.models import load_model, model_names

    name = name_from_file(path, model_names())
    return load_model(name) if name else None


def _model_named_in(trace: RoutingTrace | ExpertCounts, path: Path) -> ModelSpec | None:
    """The model of the name that the file gives, unless the trace contradicts it."""
    from traces.formats.common import check_model

    spec = _model_called(trace.model, path)
    if spec is None:
        return None
    try:
        check_model(path, trace.n_experts, trace.layers, trace.top_k, spec)
    except TraceError as error:
        note(f"{path.name}: not taken for a trace of {spec.name}, which it names ({error})")
        return None
    return spec


def _model_called(name: str, path: Path) -> ModelSpec | None:
    """By name or alias, else the one whose name it begins with; a name in a file is no path."""
    from traces.models import catalog_entry, load_model

    try:
        return load_model(catalog_entry(name).name)
    except TraceError:
        spec = _model_from_file_name(Path(name))
    known = "is not in the catalogue" if spec is None else f"taken for {spec.name}"
    note(f"{path.name}: model {name!r}, named in the file, {known}")
    return spec


def phase_of(evidence: RoutingTrace | ExpertCounts, name: str) -> str:
    """The phase of a trace: decode if it has decode tokens; of counts by their file's name."""
    from traces.routing import DECODE, ExpertCounts

    if isinstance(evidence, ExpertCounts):
        phase = "prefill" if "prefill" in Path(name).name else "decode"
        note(f"phase {phase} assumed for expert counts; pass --phase for the other")
        return phase
    return "decode" if (evidence.phase == DECODE).any() else "prefill"


def usual_tokens_per_rank(evidence: RoutingTrace | ExpertCounts, phase: str, n_ranks: int) -> int:
    """The usual size of a step, halved until the trace fills a few steps of it."""
    from traces.routing import DECODE, ExpertCounts

    tokens = _USUAL_TOKENS.get(phase, _USUAL_TOKENS["decode"])
    if isinstance(evidence, ExpertCounts):
        return tokens
    available = int(((evidence.phase == DECODE) == (phase == "decode")).sum())
    while tokens > 1 and tokens * n_ranks * _LEAST_STEPS > available:
        tokens //= 2
    return tokens
