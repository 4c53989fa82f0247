"""Batch invariance: the bits of a row's result do not depend on the rows beside it.

Sums in another order round differently, and the fastest order depends on how many rows there are
(He et al., "Defeating Nondeterminism in LLM Inference", 2025). On the CPU the order is the same for
every batch, except where a long cache is decoded and where a softcap, a dropout or float16 leads to
matmuls; switched on, these go row by row. On GPUs the number of splits and the tiles depend on the
batch, and nothing here changes that.
"""

from __future__ import annotations

import os

_on = os.environ.get("HF_ATTN_BATCH_INVARIANT", "0") == "1"


def set_batch_invariant(on: bool) -> None:
    """Switch it on or off for this process; the variable HF_ATTN_BATCH_INVARIANT=1 does it too.

    While it is on, a call with GPU tensors raises ValueError. Attention only: matrix products of a
    model's other layers belong to torch, and may depend on the batch.
    """
    global _on
    _on = bool(on)


def batch_invariant() -> bool:
    """Whether it is switched on."""
    return _on
