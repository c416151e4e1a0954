"""The catalogue of models: one TOML file each under `catalog/`, found by name or alias.

`load_model` also takes the path of any Hugging Face config.json, so a model that is not in the
catalogue needs no entry.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from traces.errors import TraceError
from traces.huggingface import model_from_config, read_config
from traces.model import Attention, ModelSpec

Status = Literal["config", "doc", "derived", "part-recalled", "recalled"]
Router = Literal[
    "softmax",
    "softmax-raw",
    "softmax-bias",
    "sigmoid",
    "sigmoid-bias",
    "sparsemixer",
    "group-top1",
    "relu",
]

ROUTERS: Mapping[Router, str] = MappingProxyType(
    {
        "softmax": "softmax over the chosen experts (the same as softmax, top-k, renormalise)",
        "softmax-raw": "softmax over all experts, then top-k, weights not renormalised",
        "softmax-bias": "softmax; a learnt bias takes part in the choice only",
        "sigmoid": "sigmoid of each score, then top-k",
        "sigmoid-bias": "sigmoid; a learnt bias takes part in the choice only",
        "sparsemixer": "SparseMixer: one expert after the other, the first masked for the second",
        "group-top1": "the best expert of each group",
        "relu": "every expert with a positive score",
    }
)

_PACKAGE = Path(__file__).parent
_CATALOG = _PACKAGE / "catalog"
_Count = Annotated[int, Field(ge=0, le=2**40, strict=True)]
_Positive = Annotated[int, Field(ge=1, le=2**40, strict=True)]
_Layers = Annotated[int, Field(ge=1, le=10_000, strict=True)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _MoeLayers(_Closed):
    first: _Count
    step: _Positive
    count: _Layers


class _Shape(_Closed):
    """The fields of ModelSpec of the same names."""

    n_layers: _Layers
    moe_layers: _MoeLayers
    hidden_size: _Positive
    n_experts: _Positive
    top_k: _Positive
    expert_intermediate_size: _Positive
    shared_intermediate_size: _Count = 0
    dense_intermediate_size: _Count = 0
    ffn_matrices: Literal[2, 3] = 3
    dense_ffn_matrices: Literal[0, 2, 3] = 0
    vocab_size: _Positive
    kv_layers: _Count
    n_groups: _Positive = 1
    topk_groups: _Positive = 1
    router: Router = "softmax"
    tied_embeddings: bool = False
    n_encoder_layers: _Count = 0
    mixer_params: _Count = 0
    n_mixer_layers: _Count = 0


class _AttentionShape(_Closed):
    """The fields of Attention of the same names."""

    n_heads: _Positive
    n_kv_heads: _Positive
    head_dim: _Positive
    v_head_dim: _Positive
    q_lora_rank: _Count = 0
    kv_lora_rank: _Count = 0
    qk_nope_dim: _Count = 0
    qk_rope_dim: _Count = 0
    sliding_window: _Count = 0
    n_sliding_layers: _Count = 0
    output_gate: bool = False
    n_experts: _Positive = 1
    top_k: _Positive = 1


class _Published(_Closed):
    total_params: Annotated[float, Field(gt=0)] | None = None
    active_params: Annotated[float, Field(gt=0)] | None = None


class CatalogFile(_Closed):
    """One file as written; either shape and attention, or config, a file of this package."""

    name: str
    title: str
    aliases: tuple[str, ...] = ()
    status: Status
    source: str
    note: str = ""
    config: str = ""
    published: _Published = _Published()
    shape: _Shape | None = None
    attention: _AttentionShape | None = None


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """What the catalogue says of a model beside its shape.

    status         how the shape is known: from a config file, a vendor's document, derived from a
                   sibling's config, or partly or wholly recalled (then treat it with care)
    total_params   published count, None where none is known; active_params likewise
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    status: Status
    source: str
    note: str
    total_params: float | None
    active_params: float | None


def model_names() -> tuple[str, ...]:
    """Names in the catalogue, sorted."""
    return tuple(sorted(_files()))


def catalog_entry(name: str) -> CatalogEntry:
    """Status, source and published figures of a model, by name or alias; TraceError if unknown."""
    file = _find(name)
    if file is None:
        raise _unknown(name)
    return CatalogEntry(
        name=file.name,
        title=file.title,
        aliases=file.aliases,
        status=file.status,
        source=file.source,
        note=" ".join(file.note.split()),
        total_params=file.published.total_params,
        active_params=file.published.active_params,
    )


def load_model(name_or_path: str | Path) -> ModelSpec:
    """A model by name or alias (case does not matter), or by the path of a config.json.

    A path may also be a model folder that holds a config.json.

    raises  TraceError for a name that is neither, with the close matches
    """
    file = _find(str(name_or_path))
    if file is not None:
        return _spec(file)
    if not os.path.exists(name_or_path):
        raise _unknown(str(name_or_path))
    path = Path(name_or_path)
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return model_from_config(read_config(path), name)


def _spec(file: CatalogFile) -> ModelSpec:
    if file.shape is None or file.attention is None:
        return model_from_config(read_config(_PACKAGE / file.config), file.name)
    shape = file.shape.model_dump()
    layers = file.shape.moe_layers
    last = layers.first + layers.step * layers.count
    shape["moe_layers"] = tuple(range(layers.first, last, layers.step))
    return ModelSpec(file.name, attention=Attention(**file.attention.model_dump()), **shape)


def _find(name: str) -> CatalogFile | None:
    known = _aliases().get(name.lower())
    return None if known is None else _files()[known]


def _unknown(name: str) -> TraceError:
    close = difflib.get_close_matches(name.lower(), list(_aliases()), n=4, cutoff=0.5)
    names = list(dict.fromkeys(_aliases()[match] for match in close))
    hint = f"close: {', '.join(names)}" if names else f"{len(_files())} names are known"
    shown = name if len(name) <= 80 else name[:77] + "..."
    return TraceError(
        f"model {shown!r} is neither in the catalogue nor a file; {hint}"
        " (`moesim catalog models` lists all)"
    )


@cache
def _files() -> Mapping[str, CatalogFile]:
    return MappingProxyType(
        {file.name: file for file in map(read_catalog_file, sorted(_CATALOG.glob("*.toml")))}
    )


@cache
def _aliases() -> Mapping[str, str]:
    """Every spelling in lower case, to the name."""
    spellings: dict[str, str] = {}
    for file in _files().values():
        for spelling in (file.name, file.title, *file.aliases):
            owner = spellings.setdefault(spelling.lower(), file.name)
            if owner != file.name:
                raise TraceError(
                    f"catalogue: {spelling!r} is claimed by both {owner} and {file.name}"
                )
    return MappingProxyType(spellings)


def read_catalog_file(path: Path) -> CatalogFile:
    """One catalogue file, checked: known keys only, named like the file, and one kind of shape.

    raises  TraceError naming the file and the first key that is wrong
    """
    try:
        file = CatalogFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TraceError(f"{path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise TraceError(f"{path}: {key}={first['input']!r}: {first['msg']}") from error
    if file.name != path.stem:
        raise TraceError(f"{path}: name={file.name!r}, expected the file's name {path.stem!r}")
    if (file.shape is None or file.attention is None) == (file.config == ""):
        raise TraceError(f"{path}: expected either config, or both shape and attention")
    return file
