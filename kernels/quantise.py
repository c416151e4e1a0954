"""Expert weights in the formats the grouped GEMM reads, and the float32 meaning of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moesim_kernels.errors import KernelError

GROUP = 128  # values that share a scale along K; also the side of an fp8 block
FP8_MAX = 448.0  # largest finite e4m3 value
FORMATS = ("dense", "int8", "int4", "fp8")
_LEAST_SCALE = 1e-12  # of a group of zeros
_ROWS_OF_A_PROGRAM = 8


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One projection of all experts: y = x @ w[e].T.

    values   dense  bf16, fp16 or fp32 [n_experts, n_out, n_in]
             int8   int8 [n_experts, n_out, n_in]
             int4   uint8 [n_experts, n_out, groups * 64]; byte j of a group of 128 holds value j
                    in the low nibble and value j + 64 in the high one, each plus 8
             fp8    float8_e4m3fn [n_experts, n_out, n_in]
    scales   int8, int4  float32 [n_experts, n_out, groups], one per 128 values along n_in
             fp8         float32 [n_experts, ceil(n_out / 128), groups], one per 128x128 block
             dense       None
    n_in     input width (int4 storage is padded to whole groups)
    """

    values: torch.Tensor
    scales: torch.Tensor | None
    weight_format: str
    n_in: int

    def __post_init__(self) -> None:
        if self.weight_format not in FORMATS:
            raise KernelError(f"weight_format={self.weight_format!r}: expected one of {FORMATS}")
        if self.values.dim() != 3 or not self.values.is_contiguous():
            raise KernelError(
                f"values: shape {list(self.values.shape)}, expected contiguous [experts, out, in]"
            )
        shape = self._scale_shape()
        found = None if self.scales is None else list(self.scales.shape)
        if found != shape or (self.scales is not None and not self.scales.is_contiguous()):
            raise KernelError(f"scales: shape {found}, {self.weight_format} needs {shape}")

    def _scale_shape(self) -> list[int] | None:
        if self.weight_format == "dense":
            return None
        n_out = -(-self.n_out // GROUP) if self.weight_format == "fp8" else self.n_out
        return [self.n_experts, n_out, -(-self.n_in // GROUP)]

    @property
    def n_experts(self) -> int:
        """Experts held."""
        return int(self.values.shape[0])

    @property
    def n_out(self) -> int:
        """Output width."""
        return int(self.values.shape[1])

    def n_bytes(self) -> int:
        """Bytes of values and scales together."""
        scales = 0 if self.scales is None else self.scales.numel() * self.scales.element_size()
        return int(self.values.numel() * self.values.element_size() + scales)


def dense(w: torch.Tensor) -> ExpertWeights:
    """16- or 32-bit weights [n_experts, n_out, n_in] as they are."""
    return ExpertWeights(w.contiguous(), None, "dense", w.shape[2])


def _grouped(w: torch.Tensor) -> torch.Tensor:
    """float32 [experts, out, groups, 128], padded with zeros."""
    short = -w.shape[2] % GROUP
    padded = torch.nn.functional.pad(w.float(), (0, short))
    return padded.reshape(*w.shape[:2], -1, GROUP)


def _to_integers(w: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    grouped = _grouped(w)
    scales = (grouped.abs().amax(-1) / largest).clamp_min(1e-12)
    return torch.round(grouped / scales[..., None]).clamp(-largest, largest), scales


def int8(w: torch.Tensor) -> ExpertWeights:
    """Symmetric round-to-nearest int8, one scale per 128 values along n_in."""
    integers, scales = _to_integers(w, 127)
    values = integers.flatten(2)[..., : w.shape[2]].to(torch.int8).contiguous()
    return ExpertWeights(values, scales, "int8", w.shape[2])


def int4(w: torch.Tensor) -> ExpertWeights:
    """Symmetric round-to-nearest int4 in -7..7, one scale per 128 values along n_in, packed."""
    integers, scales = _to_integers(w, 7)
    nibbles = (integers + 8).to(torch.uint8)
    packed = nibbles[..., : GROUP // 2] | (nibbles[..., GROUP // 2 :] << 4)
    return ExpertWeights(packed.flatten(2).contiguous(), scales, "int4", w.shape[2])


def fp8(w: torch.Tensor) -> ExpertWeights:
    """e4m3 with one float32 scale per 128x128 block (the DeepSeek-V3 layout)."""
    n_experts, n_out, n_in = w.shape
    padded = torch.nn.functional.pad(w.float(), (0, -n_in % GROUP, 0, -n_out % GROUP))
    blocks = padded.reshape(n_experts, -(-n_out // GROUP), GROUP, -(-n_in // GROUP), GROUP)
    scales = (blocks.abs().amax((2, 4)) / FP8_MAX).clamp_min(1e-12)
    scaled = (blocks / scales[:, :, None, :, None]).reshape(padded.shape)[:, :n_out, :n_in]
    return ExpertWeights(
        scaled.to(torch.float8_e4m3fn).contiguous(), scales.contiguous(), "fp8", n_in
    )


def fp8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations as e4m3 [rows, n_in] with float32 scales [rows, groups], one per 128 values.

    x  [rows, n_in], contiguous; values past the largest e4m3 saturate, one launch makes all
    """
    import triton
    from moesim_kernels.fp8_rows_kernel import fp8_rows_kernel

    n_rows, width = x.shape
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(n_rows, -(-width // GROUP), dtype=torch.float32, device=x.device)
    if x.numel():
        grid = (triton.cdiv(n_rows, _ROWS_OF_A_PROGRAM), scales.shape[1])
        fp8_rows_kernel[grid](
            *(x, values, scales, n_rows, width),
            BLOCK_ROWS=_ROWS_OF_A_PROGRAM,
            # The interpreter's cast drops the carry into the exponent (triton 3.6, 3.7).
            ROUND_FIRST=triton.knobs.runtime.interpret,
        )
    return values, scales


def fp8_rows_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `fp8_rows` returns, in plain torch."""
    grouped = _grouped(x[None])[0]
    scales = (grouped.abs().amax(-1) / FP8_MAX).clamp_min(_LEAST_SCALE)
    scaled = (grouped / scales[..., None]).flatten(1)[:, : x.shape[1]].clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn).contiguous(), scales.contiguous()


def fp8_rows_to_float(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [rows, n_in] of what `fp8_rows` made."""
    return values.float() * scales.repeat_interleave(GROUP, 1)[:, : values.shape[1]]


def dequantise(weights: ExpertWeights) -> torch.Tensor:
    """float32 [n_experts, n_out, n_in] of any format."""
    values, scales = weights.values, weights.scales
    if scales is None:
        return values.float()
    if weights.weight_format == "int4":
        packed = values.reshape(*values.shape[:2], -1, GROUP // 2)
        values = torch.cat([packed & 0xF, packed >> 4], -1).flatten(2)[..., : weights.n_in]
        values = values.to(torch.int8) - 8
    per_value = scales.repeat_interleave(GROUP, 2)[..., : weights.n_in]
    if weights.weight_format == "fp8":
        per_value = per_value.repeat_interleave(GROUP, 1)[:, : weights.n_out]
    return values.float() * per_value
