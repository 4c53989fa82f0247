"""Which program computes which block of which head: the longest blocks of many heads first."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from kernel_cases import Case, gradients, make_data, run_kernel

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from hf_attn_kernels.problem import Pattern
from hf_attn_kernels.triton import launch, options
from hf_attn_kernels.triton.primitives import place

Backend = Callable[[], AbstractContextManager[None]]


@triton.jit
def _places(Found, blocks, together):
    pid = tl.program_id(0)
    block, head = place(pid, blocks, together)
    tl.store(Found + 2 * pid, block)
    tl.store(Found + 2 * pid + 1, head)


@pytest.mark.parametrize("together", [1, 2, 3, 5, 7])
def test_every_block_of_every_head_has_one_program(together: int, device: torch.device) -> None:
    """Sets of heads take turns, block by block; the last set is what is left."""
    blocks, heads = 4, 5
    found = torch.full((blocks * heads, 2), -1, dtype=torch.int32, device=device)
    _places[(blocks * heads,)](found, blocks, together)
    sets = [range(at, min(heads, at + together)) for at in range(0, heads, together)]
    want = [[block, head] for some in sets for block in range(blocks) for head in some]
    assert found.tolist() == want


@pytest.mark.parametrize(
    ("pattern", "head_bytes", "want"),
    [
        ({"window_right": 0}, 2**20, 16),
        ({"window_right": 0}, 3 * 2**20, 4),  # a power of two of the five that fit
        ({"window_right": 0}, 2**30, 1),
        ({"window_right": 0}, 2**10, 40),  # all there are
        ({"window_right": 0}, 0, 1),
        ({}, 2**20, 1),  # all blocks are alike
        ({"window_right": 0, "window_left": 9}, 2**20, 1),
    ],
    ids=str,
)
def test_how_many_heads_go_together(pattern: dict[str, int], head_bytes: int, want: int) -> None:
    pattern_ = Pattern(scaling=1.0, **pattern)
    assert launch.heads_together(pattern_, 40, head_bytes) == want
    with options.without("heavy_first"):
        assert launch.heads_together(pattern_, 40, head_bytes) == 1


def test_the_order_does_not_matter(
    device: torch.device, triton_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads by twos, with one left over, give the same bits as one after the other."""
    monkeypatch.setattr(launch, "CACHE_BYTES", 2 * 63 * 2 * 32 * 4)
    data = make_data(Case(batch=1, heads_q=6, heads_kv=3, causal=True), device)
    results = []
    for ways in ((), ("heavy_first",)):
        with triton_backend(), options.without(*ways):
            assert launch.heads_together(Pattern(scaling=1.0, window_right=0), 3, 63 * 256) == (
                1 if ways else 2
            )
            out, lse = run_kernel(data)
            results.append([out, lse, *gradients(data, out, lse).values()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
