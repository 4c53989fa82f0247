"""Packed sequences that only position_ids tell of, by FlashAttention-2's rule in transformers.

`DataCollatorWithFlattening` puts several documents into one row and says so by positions that
start over, nothing else. A row of a batch of one whose positions are not consecutive is packed; a
document begins wherever the row's smallest position stands.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """The documents of one row of T tokens."""

    cu_seqlens: Tensor  # [documents + 1] int32
    longest: int


# Every layer of a step asks about the same tensor, and on a GPU looking at it waits.
_last: tuple[weakref.ref[Tensor], int, Documents | None] | None = None


def may_be_packed(position_ids: Tensor | None, batch: int, queries: int) -> bool:
    """Whether the shapes allow it; M-RoPE's positions, ``[3, B, Q]``, never do."""
    return (
        position_ids is not None
        and batch == 1
        and queries > 1
        and position_ids.shape == (1, queries)
    )


def documents(position_ids: Tensor) -> Documents | None:
    """The documents that positions ``[1, T]`` tell of, None if there is only one."""
    global _last
    if position_ids.is_inference():  # has no count of its changes
        return _look(position_ids)
    version = position_ids._version
    if _last is not None and _last[0]() is position_ids and _last[1] == version:
        return _last[2]
    told = _look(position_ids)
    _last = (weakref.ref(position_ids), version, told)
    return told


def _look(position_ids: Tensor) -> Documents | None:
    row = position_ids[0]
    begins = (row == row.min()).nonzero().flatten()
    if int(begins[0]) > 0:  # the end of a document that began in an earlier row
        begins = torch.cat([begins.new_zeros(1), begins])
    if begins.numel() == 1:  # one document, maybe with gaps
        return None
    offsets = torch.cat([begins, begins.new_tensor([row.numel()])]).to(torch.int32)
    return Documents(offsets, int(offsets.diff().max()))


def positions(cu_seqlens: Tensor) -> Tensor:
    """Positions ``[1, T]`` that tell of the documents at offsets ``[documents + 1]``."""
    token = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return (token - cu_seqlens[document])[None]


def starts_over(position_ids: Tensor) -> bool:
    """Whether positions ``[1, Q]`` ever fall."""
    return bool((position_ids.diff() < 0).any())


def assert_one_document(position_ids: Tensor) -> None:
    """For compiled code, which cannot look: positions ``[1, T]`` fail there when it runs."""
    row = position_ids[0]
    torch._assert_async(
        (row[1:] != row.min()).all(),
        "position_ids tell of packed sequences, which a compiled model cannot see: pass "
        "cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k, or use_cache=False",
    )


def same_document(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q: int, k: int) -> Tensor:
    """``[B, 1, Q, K]`` bool of B rows of `q` queries and `k` keys, packed one behind the other."""
    rows = [
        torch.searchsorted(
            offsets, torch.arange(int(offsets[-1]), device=offsets.device), right=True
        ).view(-1, columns)
        for offsets, columns in ((cu_seqlens_q, q), (cu_seqlens_k, k))
    ]
    return (rows[0][:, :, None] == rows[1][:, None, :])[:, None]
