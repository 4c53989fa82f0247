"""Batch invariance: a row's bits do not depend on the rows beside it, nor on how it is padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from kernel_cases import Case, make_data, run_kernel
from torch import Tensor

from hf_attn_kernels import flash_attn_func, flash_attn_with_kvcache, set_batch_invariant

F32, BF16 = torch.float32, torch.bfloat16
Backend = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def invariant() -> Iterator[None]:
    set_batch_invariant(True)
    yield
    set_batch_invariant(False)


LENGTHS = (300, 150, 299, 100, 300, 17)
SHAPES = ((1, 100), (1, 5000), (4, 300), (37, 300), (300, 300))  # (queries, keys)
FEATURES: list[dict[str, Any]] = [
    {},
    {"window_size": (40, 0)},
    {"window_size": (40, 0), "sink_tokens": 4},
    {"softcap": 3.0},
]
both = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def alone_and_beside(call: Callable[[list[int]], list[Tensor]], rows: int) -> None:
    """`call` gives the results of some rows of a batch: to the bit the same, whichever they are."""
    whole = call([*range(rows)])
    for chosen in ([3, 0, 5, 1, 4, 2], [2, 4], *([row] for row in range(rows))):
        for found, row in zip(call(chosen), chosen, strict=True):
            assert torch.equal(found, whole[row]), f"row {row} among {chosen}"


@both
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_a_row_does_not_depend_on_others(
    features: dict[str, Any], dtype: torch.dtype, invariant: None
) -> None:
    """Prefill, chunks and decode over a dense batch, and decode over a cache."""
    torch.manual_seed(0)
    for q_len, k_len in SHAPES:
        q = torch.randn(6, q_len, 4, 32).to(dtype)
        k, v = (torch.randn(6, k_len, 2, 32).to(dtype) for _ in range(2))
        alone_and_beside(
            lambda at, q=q, k=k, v=v: list(
                flash_attn_func(q[at], k[at], v[at], causal=True, **features)
            ),
            6,
        )
    cache = [torch.randn(6, 5008, 2, 32).to(dtype) for _ in range(2)]
    for ends in ((100, 33, 5000, 1, 700, 64), (4800,) * 6):
        held = torch.tensor(ends, dtype=torch.int32)
        alone_and_beside(
            lambda at, q=q[:, :1], held=held: list(
                flash_attn_with_kvcache(
                    q[at], cache[0][at], cache[1][at], cache_seqlens=held[at], causal=True,
                    **features,
                )
            ),
            6,
        )  # fmt: skip


@both
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_depend_on_its_padding(
    side: str, dtype: torch.dtype, invariant: None
) -> None:
    """As long as the longest beside it, or alone without padding: the same bits."""
    torch.manual_seed(0)
    longest = max(LENGTHS)
    q = torch.randn(6, longest, 4, 32).to(dtype)
    k, v = (torch.randn(6, longest, 2, 32).to(dtype) for _ in range(2))
    parts = [slice(longest - n, None) if side == "left" else slice(0, n) for n in LENGTHS]
    keep = torch.zeros(6, longest, dtype=torch.bool)
    for row, part in enumerate(parts):
        keep[row, part] = True
    both_ways = [{"causal": True, **f} for f in FEATURES]
    for options in (*both_ways, {}, {"window_size": (20, 20)}, {"softcap": 3.0}):

        def call(at: list[int], options: dict[str, Any] = options) -> list[Tensor]:
            if len(at) == 1:
                part = parts[at[0]]
                return [flash_attn_func(*(x[at][:, part] for x in (q, k, v)), **options)[0]]
            out = flash_attn_func(q[at], k[at], v[at], key_padding_mask=keep[at], **options)
            return [out[i, parts[row]] for i, row in enumerate(at)]

        alone_and_beside(call, 6)


@both
def test_a_paged_row_does_not_depend_on_others(dtype: torch.dtype) -> None:
    """Pages are read row by row: this holds without the option too."""
    torch.manual_seed(0)
    lengths, page = (100, 33, 5000, 1, 700, 64), 16
    blocks = [-(-n // page) for n in lengths]
    k, v = (torch.randn(sum(blocks), page, 2, 32).to(dtype) for _ in range(2))
    order = torch.randperm(sum(blocks)).to(torch.int32).split(blocks)
    table = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True, padding_value=-1)
    q, held = torch.randn(6, 1, 4, 32).to(dtype), torch.tensor(lengths, dtype=torch.int32)
    for features in FEATURES:
        alone_and_beside(
            lambda at, features=features: list(
                flash_attn_with_kvcache(
                    q[at], k, v, cache_seqlens=held[at], block_table=table[at], causal=True,
                    **features,
                )
            ),
            6,
        )  # fmt: skip


def test_batch_invariance_is_refused_where_it_does_not_hold(
    device: torch.device, triton_backend: Backend, invariant: None
) -> None:
    data = make_data(Case(q_len=5), device)
    with triton_backend(), pytest.raises(ValueError, match=r"possible on: cpu.*False"):
        run_kernel(data)


def test_negative_control_a_sum_in_another_order_is_seen() -> None:
    """The same numbers added in halves: what the comparison above must notice."""
    torch.manual_seed(0)
    q, k, v = torch.randn(6, 1, 4, 32), torch.randn(6, 300, 2, 32), torch.randn(6, 300, 2, 32)

    def call(at: list[int]) -> list[Tensor]:
        turn = torch.arange(300).roll(150 * len(at) % 300)  # another order for odd batches
        return list(flash_attn_func(q[at], k[at][:, turn], v[at][:, turn]))

    with pytest.raises(AssertionError, match="row 0 among"):
        alone_and_beside(call, 6)
