"""Kept first tokens: where they stand in a padded row, and in a cache that has dropped the rest.

S below counts sinks, ``columns`` are positions in the padded batch, as the 2D attention mask has
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import local

import torch
from torch import Tensor

from ..swa_config import SwaSettings
from ..transformers_compat import compat
from .patterns import MaskRequest, Pattern


def sink_columns(mask: Tensor, sinks: int) -> Tensor:
    """Columns ``[B, S]`` of each row's first `sinks` tokens.

    Args:
        mask: ``[B, length]`` bool, True = token. A row with fewer tokens has its next ones right
            behind the mask's end, where generation puts them.
    """
    nth = mask.cumsum(-1)
    wanted = torch.arange(1, sinks + 1, device=mask.device)
    # [B, S, length]: the column where the count reaches what is wanted
    here = (nth[:, None, :] == wanted[None, :, None]) & mask[:, None, :]
    behind = mask.shape[1] + wanted[None, :] - 1 - nth[:, -1:]
    return torch.where(here.any(-1), here.int().argmax(-1), behind)


def head_slots(columns: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Which sink stands in each of a rolled cache's S head slots, and whether any does: ``[B, S]``.

    Only sinks whose column is before `start` do; the others are still in the tail. They are pushed
    to the right, so that a row's visible keys are one stretch.
    """
    sinks = columns.shape[1]
    gone = (columns < start).sum(-1, keepdim=True)
    number = torch.arange(sinks, device=columns.device) - (sinks - gone)
    return number.clamp(min=0), number >= 0


class RowStarts:
    """Where the first tokens of a cache's rows stand; all layers of the cache share one.

    The mask function is part of every forward pass, however the model is called, and tells it.
    Nothing is computed until something is to be dropped.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing is held, nothing is known."""
        self.forget()
        self.moved = False  # what was kept of the dropped columns is not the first S of each row

    def forget(self) -> None:
        """The rows are others now: what was told does not hold for them."""
        self._told = -1
        self._mask: Tensor | None = None

    def tell(self, mask: Tensor | None, total: int) -> None:
        """The mask ``[B, columns]`` of a pass that ends at column `total`; None hides nothing.

        Raises:
            ValueError: padding was skipped in earlier passes, and now nobody says where it is.
        """
        if mask is None and self.moved:
            raise ValueError(
                "triton_swa has kept each row's first tokens by the attention mask of earlier "
                "calls, and this call has none: pass the 2D attention_mask of all tokens each time"
            )
        if mask is not None and mask.shape[1] < total:
            return self.forget()  # about other columns than there are
        self._told, self._mask = total, mask

    def told(self) -> int:
        """Columns up to which it is known where rows begin, -1 for nothing."""
        return self._told

    def columns(self, sinks: int, total: int) -> Tensor | None:
        """``[B, S]`` of what was told last; None: columns 0 to S - 1 of every row.

        Waits for the device: something is being dropped, which happens once in many steps.
        """
        if self._mask is None:
            return None
        found = sink_columns(self._mask[:, :total], sinks)
        self.moved = bool((found != torch.arange(sinks, device=found.device)).any())
        return found


class _Asked(local):
    """The cache that was asked last, in this thread, for the sizes of the mask to be made."""

    starts: RowStarts | None = None
    sizes: tuple[int, int] = (0, 0)


_asked = _Asked()


def ask(starts: RowStarts, kv_length: int, kv_offset: int) -> None:
    """A mask of these sizes is about to be made for the cache of `starts`."""
    if not torch.compiler.is_compiling():
        _asked.starts, _asked.sizes = starts, (kv_length, kv_offset)


def tell(request: MaskRequest, total: int | None) -> None:
    """Tell the cache that a mask is made for, if it is one that drops columns, its padding."""
    if torch.compiler.is_compiling():
        return
    starts, _asked.starts = _asked.starts, None
    if starts is None or _asked.sizes != (request.kv_length, request.kv_offset) or total is None:
        return
    starts.tell(request.attention_mask, total)


@dataclass(frozen=True)
class RolledColumns:
    """What a rolling cache holds: S sinks, then everything from column `start` on."""

    sink: Tensor | None  # [B, S], None: the first S columns of every row
    sinks: int
    start: int
    length: int  # keys held, sinks with them

    def gather(self, padding: Tensor | None) -> Tensor | None:
        """``[B, total]`` padding to ``[B, length]`` in the cache's order; None: nothing hidden."""
        if padding is None:
            return None
        columns, filled = self._head(padding.shape[1])
        head = padding.gather(1, columns) & filled
        return torch.cat([head, padding[:, self.start :]], dim=1)

    def gather_dense(self, mask: Tensor) -> Tensor:
        """``[B, 1, Q, total]`` to ``[B, 1, Q, length]``."""
        if self.sink is None:
            return torch.cat([mask[..., : self.sinks], mask[..., self.start :]], dim=-1)
        columns, filled = self._head(mask.shape[-1])
        index = columns[:, None, None, :].expand(-1, -1, mask.shape[2], -1)
        head = mask.gather(-1, index) & filled[:, None, None, :]
        return torch.cat([head, mask[..., self.start :]], dim=-1)

    def _head(self, total: int) -> tuple[Tensor, Tensor]:
        assert self.sink is not None
        number, filled = head_slots(self.sink, self.start)
        return self.sink.gather(1, number).clamp(max=total - 1), filled


def rolled_columns(request: MaskRequest, total: int, sinks: int) -> RolledColumns:
    """The columns behind the keys of a rolling cache that has seen `total` tokens."""
    mask = request.attention_mask
    return RolledColumns(
        sink=None if mask is None else sink_columns(mask, sinks),
        sinks=sinks,
        start=total - (request.kv_length - sinks),
        length=request.kv_length,
    )


def narrowed(r: MaskRequest, settings: SwaSettings, pattern: Pattern | None) -> compat.IndexMask:
    """The request's mask function within the configured window, first tokens kept visible.

    Of a pattern that is known, the sinks are seen past its own window too; anything else is only
    ever narrowed, so that what it hides (another image, another document) stays hidden.
    """
    own = None if pattern is None else pattern.window
    window = settings.narrow(own)
    assert window is not None
    visible = compat.sliding_window_overlay(window)
    if settings.sinks:
        visible = compat.or_masks(visible, _first_tokens(r, settings.sinks))
    if pattern is None or pattern.packed is not None:
        return compat.and_masks(r.mask_function, visible)
    return compat.and_masks(compat.causal_mask_function, visible)


def _first_tokens(r: MaskRequest, sinks: int) -> compat.IndexMask:
    if r.attention_mask is None:

        def among_first(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key < sinks

        return among_first

    kept = r.attention_mask & (r.attention_mask.cumsum(-1) <= sinks)
    missing = r.kv_offset + r.kv_length - kept.shape[1]
    if missing > 0:
        kept = torch.nn.functional.pad(kept, (0, missing))

    def among_kept(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return kept[batch, key]

    return among_kept
