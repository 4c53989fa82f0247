"""The shortest way, which transformers' plain calls take on a CPU: heads first, no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import assert_within_budget

from hf_attn_kernels import flash_attn_func, use_backend
from hf_attn_kernels.dispatch import plain_attention
from hf_attn_kernels.reference import attention_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("left", [-1, 0, 20, 500], ids=lambda left: f"left{left}")
@pytest.mark.parametrize(
    ("q_len", "k_len", "causal"),
    [(1, 1, True), (1, 63, True), (1, 4500, True), (63, 63, True), (5, 63, False)],
    ids=lambda value: str(value),
)
def test_matches_the_oracle(
    q_len: int, k_len: int, causal: bool, left: int, dtype: torch.dtype
) -> None:
    q, k, v = (
        torch.randn(2 if k_len < 4096 else 1, n, heads, 16).to(dtype).transpose(1, 2)
        for n, heads in ((q_len, 6), (k_len, 2), (k_len, 2))
    )
    with torch.no_grad():
        out = plain_attention(q, k, v, 0.3, causal=causal, window_left=left)
    hides = -1 != left < k_len - 1
    if hides and not (q_len == 1 and causal):
        assert out is None
        return
    assert out is not None and out.is_contiguous()
    exact, eager = (
        attention_reference(
            *(x.transpose(1, 2) for x in (q, k, v)), causal=causal, softmax_scale=0.3,
            window_size=(left if hides else -1, -1), dtype=dtype_,
        )[0]
        for dtype_ in (torch.float64, dtype)
    )  # fmt: skip
    assert_within_budget("out", out, eager, exact)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.double(), k.double(), v.double()),
        lambda q, k, v: (q.half(), k.half(), v.half()),
        lambda q, k, v: (q, k.bfloat16(), v),
        lambda q, k, v: (q[:1], k, v),
        lambda q, k, v: (q, k[:, :1].expand(-1, 4, -1, -1), v[:, :1].expand(-1, 4, -1, -1)),
        lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]),
        lambda q, k, v: (q[..., :8], k, v),
        lambda q, k, v: (q, k, v[..., :8]),
        lambda q, k, v: (torch.nn.Parameter(q), k, v),
    ],
    ids=["float64", "float16", "dtypes", "batch", "heads", "no-keys", "D", "DV", "parameter"],
)  # fmt: skip
def test_anything_else_takes_the_full_way(change: Any) -> None:
    q, k, v = (torch.randn(2, heads, 7, 16) for heads in (6, 2, 2))
    with torch.no_grad():
        assert plain_attention(q, k, v, 0.25, causal=True) is not None
        assert plain_attention(*change(q, k, v), 0.25, causal=True) is None
        assert plain_attention(q[:, :, :3], k, v, 0.25, causal=True) is None  # a chunk
        with use_backend("triton"):
            assert plain_attention(q, k, v, 0.25, causal=True) is None
        with torch.autocast("cpu"):
            assert plain_attention(q, k, v, 0.25, causal=True) is None
    assert plain_attention(q, k, v, 0.25, causal=True) is None  # a gradient may be wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("left", [-1, 2100], ids=["all", "window"])
@pytest.mark.parametrize("tokens_first", [True, False])
def test_one_query_over_many_keys_goes_by_the_extension(
    tokens_first: bool, left: int, dtype: torch.dtype, with_extension: list[object]
) -> None:
    """The same by both doors, in either layout; few keys stay with torch."""
    q, k, v = (
        torch.randn(2, n, heads, 64).to(dtype) for n, heads in ((1, 6), (2300, 2), (2300, 2))
    )
    if not tokens_first:
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    options: dict[str, Any] = {"softmax_scale": 0.3, "causal": True, "window_size": (left, 0)}
    with torch.no_grad():
        out = plain_attention(*heads_first, 0.3, causal=True, window_left=left)
        again, lse, _ = flash_attn_func(q, k, v, **options, return_attn_probs=True)
        assert out is not None and len(with_extension) == 2
        plain_attention(*(x[:, :, :300] for x in heads_first), 0.3, causal=True)
        other = plain_attention(*heads_first[:2], heads_first[2].flip(2), 0.3, causal=True)
    assert len(with_extension) == 3
    assert torch.equal(out, again) and not torch.allclose(other, out, atol=1e-2)
    exact, exact_lse = attention_reference(q, k, v, **options)
    eager, _ = attention_reference(q, k, v, **options, dtype=dtype)
    assert_within_budget("out", out, eager, exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)
