"""What a launch may be: grids within CUDA's limits, addresses beyond 32 bits, softcaps near 0.

Launches are described, not run, where a call of that size would not fit; the tensors have no
storage then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_calls import DEVICE
from torch import Tensor

from hf_attn_kernels import flash_attn_func, use_backend
from hf_attn_kernels.problem import NewKeys, Pattern, Rotary
from hf_attn_kernels.reference import attention_reference

pytest.importorskip("triton")

from aot import attention_cases, mla_cases

from hf_attn_kernels.triton.append import append_launch
from hf_attn_kernels.triton.decode_launch import Cache, launches, new_outputs
from hf_attn_kernels.triton.forward_launch import Outputs
from hf_attn_kernels.triton.launch import GRID_LIMITS, Inputs, Launch
from hf_attn_kernels.triton.mla import launches as mla_launches

CHIPS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
CUDA = (2**31 - 1, 65535, 65535)
MANY = 2**17  # rows, or heads, or blocks of queries


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int32)


def attention_calls(chip: str) -> Iterator[Launch]:
    """Forward and backward, with the gradient of a bias in every shape that it may have."""
    for batch, length, heads in ((MANY, 3, 2), (1, 3, MANY), (1, 64 * MANY, 2), (2**10, 2**13, 32)):
        for of_rows, of_heads in ((batch, heads), (1, heads), (batch, 1), (1, 1)):
            for queries in (length, 1):
                q = meta(batch, length, heads, 64)
                k = meta(batch, 70, heads, 64)
                x = Inputs(
                    q, k, k, None, None, meta(of_rows, of_heads, queries, 70), None, None, None,
                    None, length, 70, Pattern(scaling=1.0, window_right=0),
                )  # fmt: skip
                o = Outputs.of(x)
                yield attention_cases.forward_launch(x, o, chip)
                assert x.bias is not None
                dbias = meta(*x.bias.shape, dtype=torch.float32)
                for dq_sum in (None, meta(*q.shape, dtype=torch.float32)):
                    grads = attention_cases.Gradients(q, k, k, dbias, dq_sum)
                    yield from attention_cases.backward_launches(
                        x, o, o.out, None, o.lse, grads, chip
                    )


def cache_calls(chip: str) -> Iterator[Launch]:
    """Appending, decoding and combining splits, batches and packed rows."""
    for batch, tokens, heads, packed in (
        (MANY, 1, 1, False), (MANY, 5, 8, False), (1, 1, MANY, False), (1, MANY * 16, 2, False),
        (MANY, 300, 4, True), (3, MANY * 16, 4, True),
    ):  # fmt: skip
        lead = (batch * tokens,) if packed else (batch, tokens)
        for splits in (1, 7, 0):
            k, lengths = meta(50, 16, heads, 64), ints(batch + packed)
            x = Cache(
                q=meta(*lead, heads * 2, 64), k=k, v=k, seqlens=lengths,
                cu_q=lengths if packed else None, block_table=ints(batch, 9), max_q=tokens,
                max_k=100,
            )  # fmt: skip
            if not packed:
                turn = meta(999, 16, dtype=torch.float32)
                rotary = Rotary(cos=turn, sin=turn, interleaved=True, ordered=True)
                new = meta(batch, tokens, heads, 64)
                yield append_launch(x, NewKeys(k=new, v=new))[0]
                yield append_launch(x, NewKeys(k=new, v=new, rotary=rotary))[0]
            yield from launches(
                x, Pattern(scaling=1.0), splits, *new_outputs(x.q, k, packed=packed), chip, 132
            )


def latent_calls(chip: str) -> Iterator[Launch]:
    call = mla_cases.CALLS[0]
    problem = mla_cases._problem(call)
    rank, rope = problem.q_latent.shape[-1], problem.q_rope.shape[-1]
    for batch, tokens, heads, splits in ((MANY, 1, 16, 1), (MANY, 1, 16, 5), (1, MANY, 128, 1)):
        q = meta(batch, tokens, heads, rank)
        large = replace(
            problem, q_latent=q, q_rope=meta(batch, tokens, heads, rope), latent=meta(50, 16, rank),
            k_rope=meta(50, 16, rope), seqlens_k=ints(batch), block_table=ints(batch, 9),
            num_splits=splits,
        )  # fmt: skip
        lse = meta(batch, heads, tokens, dtype=torch.float32)
        yield from mla_launches(large, q, lse, chip, 132)


@pytest.mark.parametrize("chip", CHIPS)
def test_every_grid_is_within_cudas_limits(chip: str) -> None:
    seen: dict[str, int] = {}
    for describe in (attention_calls, cache_calls, latent_calls):
        for launch in describe(chip):
            assert all(0 < n <= most for n, most in zip(launch.grid, CUDA, strict=False)), (
                launch.kernel, launch.grid,
            )  # fmt: skip
            seen[launch.kernel] = max(seen.get(launch.kernel, 0), launch.grid[0])
    kernels = {"forward", "delta", "dq", "dkdv", "joint", "bias_grad", "append", "decode", "reduce"}
    assert set(seen) == kernels | {"mla"}
    assert all(programs > 65535 for programs in seen.values()), seen  # or nothing is shown


def test_a_grid_beyond_the_limits_is_refused() -> None:
    assert GRID_LIMITS == CUDA
    launch = next(cache_calls("sm_90"))
    for grid in ((2**31,), (1, 65536), (1, 1, 65536)):
        with pytest.raises(ValueError, match=r"append kernel needs a grid.*up to \(2147483647"):
            replace(launch, grid=grid).run()


def test_many_rows_of_one_call() -> None:
    """Programs find their row, head and tile when all three are many: against the oracle."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(5, n, h, 16, device=DEVICE) for n, h in ((3, 6), (40, 3), (40, 3)))
    with use_backend("triton"):
        got = flash_attn_func(q, k, v, causal=True)
    want, _ = attention_reference(q, k, v, causal=True)
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


# -- addresses -------------------------------------------------------------------------------------


@pytest.fixture
def sparse(tmp_path: Path) -> Any:
    """`sparse(name, shape, strides)`: float32 numbers in a file of which only pages that are
    written take room."""

    def make(name: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        size = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        whole = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=torch.float16)
        return whole.as_strided(shape, strides)

    return make


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's would be real memory")
def test_tokens_of_a_tile_beyond_32_bits(sparse: Any) -> None:
    """Tokens first, a large batch: rows of one tile of 32 lie more than 2**31 elements apart."""
    step = 2**26 + 64
    made = {n: torch.randn(1, 34, h, 16).half() for n, h in (("q", 2), ("k", 1), ("v", 1))}
    far = {
        n: sparse(n, t.shape, (step * 34, step, 16, 1)).copy_(t).requires_grad_()
        for n, t in made.items()
    }
    near = {n: t.requires_grad_() for n, t in made.items()}
    found = []
    for leaves in (near, far):
        with use_backend("triton"):
            out = flash_attn_func(**leaves, causal=True)
        assert isinstance(out, Tensor)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), [*leaves.values()])])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_strides_are_wide_where_they_must_be() -> None:
    from hf_attn_kernels.triton.launch import shared_arguments

    near = meta(1, 2, 1, 16)
    for step, wide in ((64, False), (2**23 - 16, False), (2**23, True), (2**31, True)):
        far = torch.empty_strided((1, 2, 1, 16), (0, step, 16, 1), device="meta")
        for tensors in ((far, near, near), (near, far, near), (near, near, far)):
            x = Inputs(*tensors, *[None] * 7, 2, 2, Pattern(scaling=1.0))
            assert shared_arguments(x)["WIDE"] is wide
    many_heads = meta(1, 2, 2**17, 64)
    x = Inputs(many_heads, *[near] * 2, *[None] * 7, 2, 2, Pattern(scaling=1.0))
    assert shared_arguments(x)["WIDE"]


# -- softcap ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0, 1000.0, 30000.0])
def test_softcap_keeps_float32s_digits(softcap: float) -> None:
    """Forward, gradients and decoding at most three times as far from float64 as eager float32."""
    q, k, v, do = (torch.randn(1, 33, 1, 16, device=DEVICE) for _ in range(4))

    def all_of(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, do.to(dtype))
        with torch.no_grad():
            last = function(leaves[0][:, -1:], *leaves[1:])
        return [out.detach(), last, *grads]

    def eager(dtype: torch.dtype) -> list[Tensor]:
        return all_of(
            lambda q, k, v: attention_reference(q, k, v, softcap=softcap, dtype=dtype)[0], dtype
        )

    with use_backend("triton"):
        got = all_of(lambda q, k, v: flash_attn_func(q, k, v, softcap=softcap), torch.float32)
    for mine, near, true in zip(got, eager(torch.float32), eager(torch.float64), strict=True):
        budget = 3 * (near - true).abs().max() + 4 * 2**-24 * true.abs().max()
        assert (mine - true).abs().max() <= budget


def test_one_tanh_for_all_kernels() -> None:
    from hf_attn_kernels.triton import decode_kernel, primitives

    assert decode_kernel.tanh is primitives.tanh
