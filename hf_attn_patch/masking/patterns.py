"""Reads what transformers composed: which keys does this mask function let a query see?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..transformers_compat import compat


@dataclass(frozen=True)
class Pattern:
    """A mask that the kernels know without being shown it."""

    causal: bool
    window: int | None = None  # causal: k > q - window; else |q - k| <= window
    packed: Tensor | None = None  # [B, Q], a number for each token's sequence


CAUSAL = Pattern(causal=True)


class MaskRequest(NamedTuple):  # one a step: a frozen dataclass takes three times as long to make
    """What transformers says when it asks for a mask; names and meanings are its own.

    Query i stands at position ``q_offset + i``, key j at ``kv_offset + j``. ``attention_mask`` is
    the padding ``[B, positions]`` (True = token), ``local_size`` the window or chunk. That the mask
    is bidirectional is known by ``bidirectional_skip`` being given at all.
    """

    batch_size: int
    q_length: int
    kv_length: int
    mask_function: compat.IndexMask
    q_offset: int | Tensor = 0
    kv_offset: int = 0
    attention_mask: Tensor | None = None
    causal_skip: bool = True
    bidirectional_skip: bool | None = None
    local_size: int | None = None
    use_vmap: bool = False
    device: torch.device | str = "cpu"
    config: Any = None
    named_flash: bool = False  # the model takes its attention for FlashAttention


def read_pattern(request: MaskRequest) -> Pattern | None:
    """The pattern of a request, None if it is none that the kernels know (chunks, images, ...)."""
    if request.use_vmap:  # a mask function of the model's or the user's own is composed in
        return None
    if torch.compiler.is_compiling():
        return _from_arguments(request)
    return _from_function(request.mask_function)


def _from_function(function: compat.IndexMask) -> Pattern | None:
    leaf, cells = compat.mask_leaf(function)
    if leaf == "causal":
        return CAUSAL
    if leaf == "bidirectional":
        return Pattern(causal=False)
    if leaf == "and":
        return _intersection(list(cells["mask_functions"]))
    return None


def _intersection(functions: list[compat.IndexMask]) -> Pattern | None:
    base: Pattern | None = None
    windows: dict[str, list[int]] = {"window": [], "window_both_sides": []}
    packed: Tensor | None = None
    remapped = False
    for function in functions:
        leaf, cells = compat.mask_leaf(function)
        if leaf in windows:
            windows[leaf].append(int(cells["sliding_window"]))
            continue
        if leaf == "packed":
            packed = cells["packed_sequence_mask"]
            continue
        # positions that restart in each sequence: nothing new once the sequences are told apart
        remapped = remapped or leaf == "remap"
        part = _from_function(cells["mask_function"] if leaf == "remap" else function)
        if part is None or base is not None:
            return None
        base = part
    if base is None or (remapped and packed is None):
        return None
    wrong_side = windows["window_both_sides" if base.causal else "window"]
    if wrong_side:
        return None
    right_side = windows["window" if base.causal else "window_both_sides"]
    if base.window is not None:
        right_side = [*right_side, base.window]
    return replace(
        base,
        window=min(right_side, default=None),
        packed=base.packed if packed is None else packed,
    )


def _from_arguments(request: MaskRequest) -> Pattern | None:
    # The compiler cannot look into closures, but the arguments tell the simple cases apart. Packing
    # and blocks come with causal_skip off, and so do decoding steps, whose dense mask is small.
    if request.bidirectional_skip is not None:
        return Pattern(causal=False, window=request.local_size)
    chunk = getattr(request.config, "attention_chunk_size", None)
    chunked = request.local_size is not None and chunk == request.local_size
    if chunked or not request.causal_skip:
        return None
    return Pattern(causal=True, window=request.local_size)
