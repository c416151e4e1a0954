"""Decode attention against float32 softmax, one sequence at a time."""

from __future__ import annotations

import os

import pytest
import torch
from moesim_kernels.attention import (
    Latent,
    decode_gqa,
    decode_gqa_reference,
    decode_mla,
    decode_mla_reference,
)
from moesim_kernels.errors import KernelError

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
if os.environ.get("TRITON_INTERPRET") == "0":  # the interpreter multiplies bf16 tiles wrongly
    TOLERANCE[torch.bfloat16] = 2e-2


def _draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 64), (3, 3, 40), (70, 1, 16)])
@pytest.mark.parametrize("n_splits", [1, None])
def test_grouped_query_attention_equals_softmax(
    heads, kv_heads, dim, n_splits, dtype, device
) -> None:
    lengths = torch.tensor([1, 130, 64], device=device)  # in one block, in all, at a border
    q = _draw(3, heads, dim, dtype=dtype).to(device)
    k, v = (_draw(3, 150, kv_heads, dim, dtype=dtype, seed=s).to(device) for s in (1, 2))
    y = decode_gqa(q, k, v, lengths, n_splits)
    expected = decode_gqa_reference(q, k, v, lengths)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "rank", "rope"), [(16, 64, 16), (37, 48, 8)])
@pytest.mark.parametrize("n_splits", [1, 2])
def test_latent_attention_equals_softmax(heads, rank, rope, n_splits, dtype, device) -> None:
    lengths = torch.tensor([70, 33], device=device)
    latent = Latent(
        _draw(2, heads, rank, dtype=dtype).to(device),
        _draw(2, heads, rope, dtype=dtype, seed=1).to(device),
        _draw(2, 75, rank, dtype=dtype, seed=2).to(device),
        _draw(2, 75, rope, dtype=dtype, seed=3).to(device),
        (rank + rope) ** -0.5,
    )
    y = decode_mla(latent, lengths, n_splits)
    expected = decode_mla_reference(latent, lengths)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_absorbed_latent_attention_equals_attention_on_expanded_keys_and_values(device) -> None:
    # The point of absorption: (q W_UK) . c = q . (W_UK c), and W_UV commutes with the weights.
    heads, rank, rope, dim = 4, 32, 16, 24
    w_uk, w_uv = _draw(heads, dim, rank, seed=4), _draw(heads, dim, rank, seed=5)
    q, q_rope = _draw(1, heads, dim), _draw(1, heads, rope, seed=1)
    cache, cache_rope = _draw(1, 40, rank, seed=2), _draw(1, 40, rope, seed=3)
    keys = torch.cat(
        [
            torch.einsum("hdr,blr->blhd", w_uk, cache),
            cache_rope[:, :, None].expand(-1, -1, heads, -1),
        ],
        3,
    )
    values = torch.einsum("hdr,blr->blhd", w_uv, cache)
    scale = (dim + rope) ** -0.5
    scores = torch.einsum("bhd,blhd->bhl", torch.cat([q, q_rope], 2), keys) * scale * 0.2
    expected = torch.einsum("bhl,blhd->bhd", scores.softmax(2), values)
    absorbed = torch.einsum("bhd,hdr->bhr", q, w_uk)
    parts = [t.contiguous().to(device) for t in (absorbed, q_rope, cache, cache_rope)]
    out = decode_mla(Latent(*parts, scale * 0.2), torch.tensor([40], device=device))
    y = torch.einsum("bhr,hdr->bhd", out.cpu(), w_uv)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_cache_rows_past_the_length_are_never_used(device) -> None:
    q, k, v = (_draw(*shape).to(device) for shape in ((1, 2, 16), (1, 70, 1, 16), (1, 70, 1, 16)))
    lengths = torch.tensor([10], device=device)
    before = decode_gqa(q, k, v, lengths, 2)
    k[:, 10:], v[:, 10:] = float("nan"), float("nan")
    assert torch.equal(decode_gqa(q, k, v, lengths, 2), before)


def test_shapes_that_do_not_match_are_refused() -> None:
    q, k = torch.zeros(2, 3, 16), torch.zeros(2, 5, 2, 16)
    lengths = torch.tensor([1, 1])
    with pytest.raises(KernelError, match="3 heads are not a multiple of 2 KV heads"):
        decode_gqa(q, k, k, lengths)
    with pytest.raises(KernelError, match="does not match the cache"):
        decode_gqa(torch.zeros(2, 4, 8), k, k, lengths)
    with pytest.raises(KernelError, match="lengths: shape"):
        decode_gqa(torch.zeros(2, 4, 16), k, k, lengths[:1])
    with pytest.raises(KernelError, match="of one dtype"):
        decode_gqa(torch.zeros(2, 4, 16), k.half(), k.half(), lengths)
