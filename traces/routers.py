"""The routers of a Hugging Face model, and what each of them says in a forward pass.

A router is told by its class name (MixtralTopKRouter, DeepseekV3TopkRouter, Llama4Router, ...) or,
in classes without a router of their own, it is the linear gate beside a block's experts. Where a
router hands out expert ids, those ids are taken: with a bias or with groups the choice does not
follow from the logits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from traces.config_keys import ConfigKeys, flatten
from traces.errors import TraceError
from traces.huggingface import N_EXPERTS, TOP_K

_ROUTER_CLASS = re.compile(r"Router$|TopKGating$|MoE\w*Gate$", re.IGNORECASE)
_GATE_NAMES = ("gate", "router", "wg")
_NOT_OF_TEXT_EXPERTS = re.compile(r"(^|\.)((vision|visual|audio|image)\w*|self_att\w*)\.")
_BIAS = re.compile(r"correction_bias|expert_bias|moe_statics")
_N_GROUPS = ("n_group", "n_groups", "num_expert_group")


class CaptureError(TraceError):
    """A model's routing cannot be captured; the message names the model class or the router."""


@dataclass(frozen=True, slots=True)
class Router:
    """One router of a model.

    layer      absolute index of its layer, from the module's name
    name       the module's name within the model
    module     the module whose output says the choice
    n_experts  routed experts of the layer, from the config
    top_k      experts chosen per token, from the config
    from_logits_alone  whether the choice is the top_k of the logits when no ids are handed out
    """

    layer: int
    name: str
    module: Any
    n_experts: int
    top_k: int
    from_logits_alone: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """What a router chose, as tensors.

    indices  integers [tokens, top_k]
    weights  floats [tokens, top_k], the gate weights, or None where the router does not say
    logits   floats [tokens, experts], before softmax or sigmoid unless the class hands out
             probabilities only (Gemma 4); None where the router does not say
    """

    indices: Any
    weights: Any | None
    logits: Any | None


def find_routers(model: Any) -> tuple[Router, ...]:
    """The routers of a model in the order of their layers.

    raises  CaptureError when there are none, or two in one layer
    """
    kind = type(model).__name__
    keys = flatten(model.config.to_dict(), kind)
    n_experts, top_k = keys.optional(*N_EXPERTS), keys.optional(*TOP_K)
    modules = dict(_router_modules(model, n_experts))
    if not modules:
        raise CaptureError(f"{kind}: no router found, expected a Mixture-of-Experts model")
    if not n_experts or not top_k:
        missing = ", ".join(TOP_K if n_experts else N_EXPERTS)
        raise CaptureError(f"{kind}: its config has none of {missing}")
    by_layer: dict[int, Router] = {}
    for name, module in modules.items():
        router = Router(
            _layer_of(name, kind), name, module, n_experts, top_k, _is_plain(model, name, keys)
        )
        other = by_layer.setdefault(router.layer, router)
        if other is not router:
            raise CaptureError(
                f"{kind}: layer {router.layer} has routers {other.name} and {name}, expected one"
            )
    return tuple(by_layer[layer] for layer in sorted(by_layer))


def read_output(router: Router, output: Any, n_tokens: int) -> Choice:
    """The choice in the output of a router's forward pass over n_tokens tokens, padding included.

    raises  CaptureError when the output holds no choice of each token
    """
    rows = [t for t in _matrices(output) if t.shape[0] == n_tokens]
    floats = [t for t in rows if t.is_floating_point()]
    wide = [t for t in floats if t.shape[1] >= router.n_experts]
    ids = [t for t in rows if not t.is_floating_point() and t.shape[1] <= router.n_experts]
    if not ids:
        return _choice_of_logits(router, wide, n_tokens)
    logits = wide[0] if wide else None
    narrow = [t for t in floats if t is not logits and t.shape == ids[0].shape]
    return Choice(ids[0], narrow[-1] if narrow else None, logits)


def _choice_of_logits(router: Router, wide: list[Any], n_tokens: int) -> Choice:
    """The top_k logits, for routers that hand out no ids; a matrix before the logits is gates."""
    what = f"router {router.name} ({type(router.module).__name__})"
    if not wide:
        raise CaptureError(
            f"{what}: its output has no ids or logits of {router.n_experts} experts"
            f" for each of {n_tokens} tokens"
        )
    if not router.from_logits_alone:
        raise CaptureError(f"{what}: hands out no ids, and a bias or groups shape its choice")
    logits = wide[-1]
    indices = logits.topk(router.top_k, dim=-1).indices
    return Choice(indices, wide[0].gather(1, indices) if len(wide) > 1 else None, logits)


def _matrices(output: Any) -> Iterator[Any]:
    """Tensors of an output with one row a token; batch and sequence become one dimension."""
    import torch

    for part in output if isinstance(output, tuple | list) else (output,):
        if isinstance(part, torch.Tensor) and part.dim() >= 2 and part.dtype != torch.bool:
            yield part.detach().reshape(-1, part.shape[-1])


def _router_modules(model: Any, n_experts: int | None) -> Iterator[tuple[str, Any]]:
    """(name, module) of every router, but for vision, audio and attention experts (JetMoE)."""
    for name, module in model.named_modules():
        if _NOT_OF_TEXT_EXPERTS.search(name):
            continue
        if _ROUTER_CLASS.search(type(module).__name__) or _is_gate(model, name, module, n_experts):
            yield name, module


def _is_gate(model: Any, name: str, module: Any, n_experts: int | None) -> bool:
    """Whether a module is a linear gate with one output an expert, beside the experts."""
    parent, _, own = name.rpartition(".")
    return (
        own in _GATE_NAMES
        and n_experts is not None
        and getattr(module, "out_features", None) == n_experts
        and hasattr(model.get_submodule(parent), "experts")
    )


def _is_plain(model: Any, name: str, keys: ConfigKeys) -> bool:
    """Whether nothing but the logits shapes the choice: no selection bias, no expert groups."""
    block = model.get_submodule(name.rpartition(".")[0])
    tensors = [key for key, _ in (*block.named_parameters(), *block.named_buffers())]
    return not any(map(_BIAS.search, tensors)) and (keys.optional(*_N_GROUPS) or 1) == 1


def _layer_of(name: str, kind: str) -> int:
    """The first whole number among the parts of a module's name."""
    for part in name.split("."):
        if part.isdecimal():
            return int(part)
    raise CaptureError(f"{kind}: router {name} has no layer index in its name")
