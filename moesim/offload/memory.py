"""What a model takes of every memory, and how many experts fit beside the rest."""

from __future__ import annotations

from dataclasses import dataclass

from hwmodels.box import Box
from moesim.errors import SimulationError
from moesim.offload.prices import Weights
from traces.counting import attention_params, expert_bytes, kv_bytes, total_params
from traces.model import ModelSpec

DEFAULT_WORKSPACE_BYTES = 3 * 2**29  # activations, CUDA context, fragmentation; of each device
GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a model's parts, over all devices that share it.

    fixed_bytes      embeddings, dense layers, shared experts, routers, work space
    attention_bytes  attention weights of one layer
    kv_bytes         KV cache of one layer that keeps one, for all tokens held
    expert_bytes     one routed expert
    """

    fixed_bytes: int
    attention_bytes: int
    kv_bytes: int
    n_layers: int
    n_kv_layers: int
    expert_bytes: int
    n_experts: int

    @property
    def dense_bytes(self) -> int:
        """Everything but routed experts and KV cache."""
        return self.fixed_bytes + self.attention_bytes * self.n_layers

    @property
    def all_kv_bytes(self) -> int:
        """KV cache of all layers."""
        return self.kv_bytes * self.n_kv_layers


def footprint(
    model: ModelSpec,
    box: Box,
    weights: Weights,
    kv_tokens: int,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Footprint:
    """Bytes of a model's parts when kv_tokens tokens are held in the KV cache, all requests."""
    experts = model.n_moe_layers * model.n_experts * model.expert_params
    attention = attention_params(model)
    rest = total_params(model) - experts - attention * model.n_layers
    dense = weights.dense_bits / 8
    return Footprint(
        fixed_bytes=int(max(rest, 0) * dense) + workspace_bytes * box.n_devices,
        attention_bytes=int(attention * dense),
        kv_bytes=kv_bytes(model, kv_tokens) // max(1, model.kv_layers),
        n_layers=model.n_layers,
        n_kv_layers=model.kv_layers,
        expert_bytes=expert_bytes(model, weights.expert_bits),
        n_experts=model.n_moe_layers * model.n_experts,
    )


def expert_room_bytes(box: Box, foot: Footprint, device_bytes: int = 0) -> int:
    """Device bytes left for routed experts once dense weights and the KV cache are in.

    device_bytes  what may be used of the devices' memory, 0 for all
    raises        SimulationError when those alone do not fit, by how much
    """
    whole = device_bytes or box.device_bytes
    room = whole - foot.dense_bytes - foot.all_kv_bytes
    if room < 0:
        raise SimulationError(
            f"device memory is short by {-room / GIB:.2f} GiB of {whole / GIB:.2f} GiB before any"
            f" expert: {foot.dense_bytes / GIB:.2f} GiB of dense weights and work space,"
            f" {foot.all_kv_bytes / GIB:.2f} GiB of KV cache"
        )
    return room


def check_below(box: Box, foot: Footprint, on_device_bytes: int) -> int:
    """Experts that host memory holds; the others must be on the drive.

    raises  SimulationError when the experts outside the device fit neither host memory nor drive
    """
    below = foot.n_experts * foot.expert_bytes - on_device_bytes
    if below <= box.host_bytes or box.unified:
        return foot.n_experts
    if box.drive is None:
        raise SimulationError(
            f"host memory is short by {(below - box.host_bytes) / GIB:.2f} GiB of"
            f" {box.host_bytes / GIB:.2f} GiB for the experts outside the device, and there is no"
            " drive; name one with --drive, or take fewer bits"
        )
    return int(box.host_bytes // foot.expert_bytes)
