"""The forms a mask takes between the mask function and the attention call, read and written here.

A mask travels through the model as one tensor or None, so its shape and dtype say what it means:

========================  ========================================================================
None                      causal and windowed as the layer says, nothing hidden
bool ``[B, L]``           the same, keys where it is False hidden; only the first L keys take part
int8 ``[B, L]``           the same and causal, whatever the layer says of itself
bool ``[B, 1, 1, K]``     it says all there is to say, and the same for every query
any ``[B|1, H|1, Q, K]``  it says all there is to say; bool (True = keep) or added to the scores
int32 ``[L, R + 1]``      R packed sequences, each row their offsets; the longest has L tokens
int32 ``[0, 0]``          packed sequences that could not be counted; whoever reads it, raises
========================  ========================================================================

Where nothing is hidden but the form needs a tensor, it is one True expanded: strides of 0 say so,
and whoever copies it loses speed, not meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STATED = torch.int8  # the dtype that says: causal
POSITIONS_TELL = "hf_attn_positions_tell"


@dataclass(frozen=True, kw_only=True)
class Visible:
    """What a mask lets an attention call see."""

    keys: int  # leading keys that take part
    banded: bool  # the layer's causality and window apply; False: the mask has said it all
    padding: Tensor | None = None  # [B, keys] bool, True = keep
    dense: Tensor | None = None  # [B|1, H|1, Q|1, keys] bool or added
    offsets: Tensor | None = None  # [R + 1] int32 of packed sequences
    longest: int = 0


def first_keys(batch: int, length: int, device: torch.device | str) -> Tensor:
    """The form "only the first `length` keys take part, none of them hidden"."""
    return torch.ones((1, 1), dtype=torch.bool, device=device).expand(batch, length)


def stated(mask: Tensor) -> Tensor:
    """``[B, L]`` bool to the form that says by itself that it is causal."""
    if _one_expanded(mask):
        return mask[:1, :1].to(STATED).expand(mask.shape)
    return mask.to(STATED)


def unstated(mask: Tensor) -> Tensor | None:
    """Back to bool ``[B, L]``, for a call that knows by now that it is causal."""
    if _one_expanded(mask):
        return mask[:1, :1].to(torch.bool).expand(mask.shape)
    return mask.to(torch.bool)


def let_positions_tell(mask: Tensor) -> None:
    """Mark a dense mask that was made here, of one row without padding: positions that start over
    hide more than it knows of. Somebody else's mask says all there is to say."""
    setattr(mask, POSITIONS_TELL, True)


def positions_tell(mask: Tensor | None) -> bool:
    """Whether positions may still tell packed sequences apart."""
    return mask is None or getattr(mask, POSITIONS_TELL, False)


def same_for_all_queries(padding: Tensor) -> Tensor:
    """``[B, K]`` to the form that overrules the layer's causality."""
    return padding[:, None, None, :]


def packed(sequence_of_token: Tensor) -> Tensor:
    """The packed form from ``[B, Q]`` numbers that change where a new sequence begins.

    Waits for the device once (the count of sequences is not known before).
    """
    rows, columns = sequence_of_token.shape
    starts = torch.ones_like(sequence_of_token, dtype=torch.bool)
    starts[:, 1:] = sequence_of_token[:, 1:] != sequence_of_token[:, :-1]
    begins = starts.flatten().nonzero().flatten()
    end = torch.full_like(begins[:1], rows * columns)
    offsets = torch.cat([begins, end]).to(torch.int32)
    longest = int((offsets[1:] - offsets[:-1]).max())
    return offsets[None].expand(longest, -1)


def uncounted(device: torch.device | str) -> Tensor:
    """The form for a CUDA graph that is being captured, where counting sequences is impossible.

    Continuous batching captures such graphs, and brings its offsets along instead of reading this.
    """
    return torch.empty((0, 0), dtype=torch.int32, device=device)


def read(mask: Tensor | None, key_length: int) -> Visible:
    """What `mask` means to a call with `key_length` keys.

    Raises:
        ValueError: a form that is none of the table's, more columns than keys, or packed sequences
            that were not counted.
    """
    if mask is None:
        return Visible(keys=key_length, banded=True)
    if mask.numel() == 0 and mask.dtype == torch.int32:
        raise ValueError(
            "packed sequences cannot be captured in a CUDA graph: their number is in position_ids, "
            "which a graph cannot look at. Pass cu_seq_lens_q, cu_seq_lens_k, max_length_q and "
            "max_length_k with the call, or pad the batch."
        )
    if mask.dim() == 2 and mask.dtype == torch.int32:
        return Visible(keys=key_length, banded=True, offsets=mask[0], longest=mask.shape[0])
    columns = mask.shape[-1]
    known = (mask.dim() == 2 and mask.dtype == torch.bool) or (
        mask.dim() == 4 and (mask.dtype == torch.bool or mask.is_floating_point())
    )
    if not known:
        raise ValueError(
            f"attention mask of shape {tuple(mask.shape)} and dtype {mask.dtype} is not "
            "understood; possible: bool [batch, keys], or bool (True = keep) or floating (added) "
            "[batch|1, heads|1, queries|1, keys]"
        )
    if mask.dim() == 4 and columns == 1:  # as eager attention broadcasts it
        mask = mask.expand(-1, -1, -1, key_length).contiguous()  # not to be taken for one True
        columns = key_length
    if columns > key_length or (mask.dim() == 4 and columns < key_length):
        raise ValueError(
            f"the attention mask has {columns} key columns, but there are {key_length} keys; "
            f"possible: [batch|1, heads|1, queries|1, {key_length} or 1], or a 2D mask [batch, "
            "keys] given to the model, which makes the rest of it"
        )
    if mask.dim() == 2:
        hidden = None if _one_expanded(mask) else mask
        return Visible(keys=columns, banded=True, padding=hidden)
    if mask.dtype == torch.bool and mask.shape[1] == 1 and mask.shape[2] == 1:
        hidden = None if _one_expanded(mask) else mask[:, 0, 0]
        return Visible(keys=columns, banded=False, padding=hidden)
    return Visible(keys=columns, banded=False, dense=mask)


def _one_expanded(mask: Tensor) -> bool:
    # expanding a batch of one leaves its stride as it was
    return mask.stride(-1) == 0 and (mask.stride(0) == 0 or mask.shape[0] == 1)
