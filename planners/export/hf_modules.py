"""The tensors of a Hugging Face model, and which decoder layer and expert each belongs to.

Names come from the model class itself, built from its config.json without weights; since
transformers 5 most families keep the experts of a layer as two fused tensors, a few as modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from planners.errors import PlanError

Shape = tuple[int, ...]
_LAYER = re.compile(r"^(?P<stack>.*?)\b(layers|layer|blocks|block|h)\.(?P<index>\d+)\.")
_EXPERT = re.compile(r"\bexperts\.(?:expert_)?(?P<expert>\d+)\.")
_FUSED = re.compile(r"\bexperts\.")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the model.

    layer    absolute decoder layer, None outside of the layers
    expert   which expert's it is; None when it is no expert's, or fused
    fused    it holds all routed experts of its layer
    """

    name: str
    shape: Shape
    layer: int | None
    expert: int | None
    fused: bool


def tensor_shapes(config: Path) -> dict[str, Shape]:
    """Name and shape of every parameter and buffer of the model that a config.json describes.

    config  a config.json or a folder that holds one; nothing is fetched, no code of it is run
    raises  PlanError when it cannot be read, transformers does not know the model, or is missing
    """
    folder = config if config.is_dir() else config.parent
    if not (config if config.is_file() else folder / "config.json").is_file():
        raise PlanError(f"{config}: no config.json; a device map needs the model's own")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise PlanError(
            f"{error.name} is missing: a device map needs it, install moesim[capture]"
        ) from error
    try:
        settings = transformers.AutoConfig.from_pretrained(config, local_files_only=True)
        coder = bool(getattr(settings, "is_encoder_decoder", False))
        kind = transformers.AutoModelForSeq2SeqLM if coder else transformers.AutoModelForCausalLM
        with torch.device("meta"):
            model = kind.from_config(settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{config}: transformers: {' '.join(str(error).split())[:200]}") from error
    tensors = {**model.state_dict(), **dict(model.named_buffers())}
    return {name: tuple(value.shape) for name, value in tensors.items()}


def sort_tensors(shapes: Mapping[str, Shape], n_experts: int) -> list[Tensor]:
    """Every tensor with its layer and expert; stacks of layers count on, encoder before decoder."""
    sizes: dict[str, int] = {}
    for found in filter(None, map(_LAYER.match, shapes)):
        stack = found["stack"]
        sizes[stack] = max(sizes.get(stack, 0), int(found["index"]) + 1)
    first = {stack: sum(list(sizes.values())[:i]) for i, stack in enumerate(sizes)}
    return [_tensor(name, shape, first, n_experts) for name, shape in shapes.items()]


def _tensor(name: str, shape: Shape, first: Mapping[str, int], n_experts: int) -> Tensor:
    found = _LAYER.match(name)
    if found is None:
        return Tensor(name, shape, None, None, False)
    layer, rest = first[found["stack"]] + int(found["index"]), name[found.end() :]
    single = _EXPERT.search(rest)
    expert = int(single["expert"]) if single else None
    stacked = len(shape) == 3 and shape[0] == n_experts
    fused = expert is None and (bool(_FUSED.search(rest)) or stacked)
    return Tensor(name, shape, layer, expert, fused)
