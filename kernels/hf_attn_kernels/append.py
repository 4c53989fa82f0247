"""New keys into the cache in torch's own operators: rotate, quantise, write in place.

What the CPU backend runs; on a GPU one kernel does the same (:mod:`.triton.append`).

Shape letters as in :mod:`.problem`; Knew new keys of each row, R half of the rotated columns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .fp8 import is_float8, quantise
from .problem import CacheProblem, NewKeys, Rotary


def appended(problem: CacheProblem) -> CacheProblem:
    """`problem` after its new keys are written: q rotated, lengths counting them, `new` None.

    Raises:
        ValueError: the block_table has no page for some of them; nothing is written.
    """
    return written(rotated(problem))


def rotated(problem: CacheProblem) -> CacheProblem:
    """`problem` with q and the new keys rotated, where that is asked for."""
    new, held = problem.new, problem.seqlens_k
    if new is None or new.rotary is None:
        return problem
    assert held is not None  # new keys go behind those
    q, k = _rotated(problem.q, new.k, new.rotary, held)
    return replace(problem, q=q, new=NewKeys(k=k, v=new.v))


def written(problem: CacheProblem) -> CacheProblem:
    """`problem` after its new keys, which are rotated, are written; raises as :func:`appended`."""
    new, held = problem.new, problem.seqlens_k
    if new is None:
        return problem
    assert held is not None
    _write(problem, new, held)
    return replace(problem, new=None, seqlens_k=held + new.k.shape[1])


def _rotated(q: Tensor, k: Tensor, rotary: Rotary, held: Tensor) -> tuple[Tensor, Tensor]:
    first = held.long()[:, None]
    at_k = first + torch.arange(k.shape[1], device=k.device)
    at_q = first + torch.arange(q.shape[1], device=q.device) if rotary.ordered else first
    if q.shape[1] > k.shape[1]:  # positions behind the last appended key
        at_q = at_q.clamp(max=rotary.cos.shape[0] - 1)
    turn = (rotary.cos, rotary.sin)
    return (
        rotate(q, *(t[at_q] for t in turn), interleaved=rotary.interleaved),
        rotate(k, *(t[at_k] for t in turn), interleaved=rotary.interleaved),
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotary embedding (Su et al., "RoFormer", 2021) of the first 2R columns of `x`.

    Args:
        x: ``[B, L, H, D]``; cos, sin: ``[B, L or 1, R]``.
        interleaved: pairs (0, 1), (2, 3) ... instead of (0, R), (1, R + 1) ...

    Returns:
        Like `x`; computed in float32 at least.
    """
    half = cos.shape[-1]
    work = torch.promote_types(x.dtype, torch.float32)
    c, s = cos.to(work)[:, :, None, :], sin.to(work)[:, :, None, :]
    turned, rest = x[..., : 2 * half].to(work), x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = (first * c - second * s, first * s + second * c)
    out = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([out.to(x.dtype), rest], dim=-1) if rest.shape[-1] else out.to(x.dtype)


def _write(problem: CacheProblem, new: NewKeys, held: Tensor) -> None:
    """k and v at positions held, held + 1, ... of each row, in place."""
    k, v, device = new.k, new.v, new.k.device
    position = held.long()[:, None] + torch.arange(k.shape[1], device=device)  # [B, Knew]
    if problem.block_table is None:
        idx = problem.batch_idx
        row = torch.arange(k.shape[0], device=device) if idx is None else idx.long()
        where: tuple[Tensor, Tensor] = (row[:, None].expand_as(position), position)
    else:
        page_size = problem.k_cache.shape[1]
        page = problem.block_table.gather(1, position // page_size).long()
        # a negative index would count from the end and overwrite another's page
        if page.device.type == "cpu" and page.numel() and int(page.amin()) < 0:
            raise ValueError(
                f"block_table has no page for some of the {k.shape[1]} new keys (negative "
                "entries); allocate pages before appending"
            )
        where = (page, position % page_size)
    for cache, x, descale in (
        (problem.k_cache, k, problem.k_descale),
        (problem.v_cache, v, problem.v_descale),
    ):
        if is_float8(cache):  # index_put_ knows no float8: the bits are written
            cache.view(torch.uint8).index_put_(where, quantise(x, descale).view(torch.uint8))
        else:
            cache.index_put_(where, x)
