"""The slots of transformers' manager as block tables.

Tensor arithmetic of fixed shapes that never looks at a value: nothing waits for the device, and a
CUDA graph can hold it.

Letters: R requests, T tokens of the batch, K keys of all requests, blocks of one request.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_table(
    slots: Tensor,
    cu_k: Tensor,
    longest: int,
    page_size: int,
    turn: Tensor | None = None,
    ring: int = 0,
) -> Tensor:
    """Page numbers of each request.

    Args:
        slots: ``[K]`` int64, the slot of each key, oldest first, one request behind the other.
        cu_k: ``[R + 1]`` int32, where each request begins in it.
        longest: keys of the longest request, or more.
        turn: ``[R]``, where in its ring the oldest key of a request stands; None: at the start.
        ring: slots of a ring, given with `turn`.

    Returns:
        ``[R, ceil(longest / page_size)]`` int32, -1 behind a request's last page.
    """
    place = torch.arange(0, longest, page_size, device=slots.device)  # of each page's first key
    age = place if turn is None else (place - turn[:, None]) % ring  # [R | none, blocks]
    which = (cu_k[:-1, None] + age).clamp(max=slots.shape[0] - 1)
    pages = slots[which] // page_size
    in_use = place < cu_k.diff()[:, None]
    return torch.where(in_use, pages, -1).to(torch.int32)


def ring_starts(positions: Tensor, cu_q: Tensor, ring: int) -> Tensor:
    """Where in its ring each request's oldest visible key stands ``[R]``.

    Args:
        positions: ``[T]`` of the new tokens. A request whose ring is full has one new token, whose
            window reaches back to position ``p - ring + 1``.
        cu_q: ``[R + 1]`` int32.
    """
    first = positions[cu_q[:-1].clamp(max=positions.shape[0] - 1)].long()
    return torch.where(first >= ring, (first + 1) % ring, 0)


def decode_rows(table: Tensor, cu_k: Tensor, trash_page: int) -> tuple[Tensor, Tensor]:
    """The manager's block table for one new token each, and how many keys came before it.

    The manager pads a batch with rows of length -1 without pages; they get the page that is there
    to be written and never read.

    Args:
        table: ``[R, blocks]`` int32; cu_k: ``[R + 1]``, the new token included.

    Returns:
        ``[R, blocks]`` int32 and ``[R]`` int32, 0 or more.
    """
    earlier = cu_k[: table.shape[0] + 1].diff().to(torch.int32) - 1
    padding = earlier < 0
    return torch.where(padding[:, None], trash_page, table), earlier.clamp(min=0)
