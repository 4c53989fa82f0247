"""The tests' own tools: a broken interpreter or a poison that does not bite would prove nothing."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl


@triton.jit
def _matmul(A, B, C, N: tl.constexpr):
    rows = tl.arange(0, N)[:, None]
    cols = tl.arange(0, N)[None, :]
    a = tl.load(A + rows * N + cols)
    b = tl.load(B + rows * N + cols)
    tl.store(C + rows * N + cols, tl.dot(a, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_dot_multiplies_numbers_not_bits(dtype, device):
    a, b = torch.randn(2, 16, 16, device=device).to(dtype)
    c = torch.empty(16, 16, device=device)
    _matmul[(1,)](a, b, c, N=16)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_poison_reaches_every_empty(poison_memory):
    like = torch.zeros(3)
    fresh = [torch.empty(3), torch.empty_like(like), torch.empty_strided((3,), (1,))]
    fresh += [like.new_empty(3), like.new_empty_strided((3,), (1,))]
    assert all(t.isnan().all() for t in fresh)
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


def test_fence_surrounds_the_tensor_with_nan(fenced):
    inside = fenced(torch.ones(2, 3, 4, requires_grad=True))
    assert inside.requires_grad and inside.stride(-1) == 1 and (inside == 1).all()
    offset, size = inside.storage_offset(), inside.untyped_storage().nbytes() // 4
    around = inside.detach().as_strided((size,), (1,), 0)
    assert around.isnan().sum() == size - 24 and offset > 0


@triton.jit
def _copy(X, Y, first, count, limit, N: tl.constexpr):
    at = first + tl.arange(0, N)
    x = tl.load(X + at, mask=at < limit, other=0.0)
    tl.store(Y + at, x, mask=at < count)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
@pytest.mark.parametrize(
    ("first", "count", "limit", "wrong"),
    [(0, 12, 12, ""), (0, 12, 13, "load of 1 of 13"), (0, 13, 12, "store of 1 of 13"),
     (-1, 12, 12, "load of 1 of 13")],
)  # fmt: skip
def test_no_kernel_leaves_its_tensors(first: int, count: int, limit: int, wrong: str) -> None:
    """Memory behind and before the twelve elements is there, and still not to be touched."""
    x, y = (torch.zeros(40)[8:20] for _ in range(2))
    if not wrong:
        _copy[(1,)](x, y, first, count, limit, N=16)
        return
    with pytest.raises(Exception, match=f"{wrong} elements outside of the tensors"):
        _copy[(1,)](x, y, first, count, limit, N=16)
