"""What one attention call costs on paper: the FLOPs and bytes behind every rate in results/.

Assumptions. Only visible (query, key) pairs count, exactly: causal halves the work, a window keeps
W pairs per query. One pair costs 2·D (scores) + 2·Dv (values) FLOPs per query head; softmax costs
nothing. The backward counts five matmuls for the forward's two, 2.5 times, however many an
implementation really does. Legend: B batch, H heads, Q/K tokens, D/Dv head sizes.
"""

from __future__ import annotations

BACKWARD_FACTOR = 2.5


def visible_pairs(seq_q: int, seq_k: int, *, causal: bool, window: int | None = None) -> int:
    """How many of the Q x K pairs are visible, bottom-right aligned.

    `window` is the number of tokens that a query sees to its left, itself included; without
    `causal` it sees as many to its right.
    """
    total = 0
    for row in range(seq_q):
        diagonal = row + seq_k - seq_q
        last = diagonal if causal else seq_k - 1
        first = 0
        if window is not None:
            first = diagonal - window + 1
            last = min(last, diagonal if causal else diagonal + window - 1)
        total += max(0, min(last, seq_k - 1) - max(first, 0) + 1)
    return total


def attention_flops(
    *,
    batch: int,
    heads_q: int,
    head_dim: int,
    seq_q: int,
    seq_k: int,
    causal: bool,
    window: int | None = None,
    head_dim_v: int | None = None,
    backward: bool = False,
) -> float:
    """FLOPs of one forward (or, with `backward`, of one backward alone)."""
    pairs = visible_pairs(seq_q, seq_k, causal=causal, window=window)
    per_pair = 2 * head_dim + 2 * (head_dim if head_dim_v is None else head_dim_v)
    forward = float(batch * heads_q * pairs * per_pair)
    return forward * BACKWARD_FACTOR if backward else forward


def kv_bytes(
    *,
    batch: int,
    heads_kv: int,
    head_dim: int,
    seq_k: int,
    itemsize: int,
    head_dim_v: int | None = None,
) -> int:
    """Bytes of K and V: what a decode step must read at least once."""
    dims = head_dim + (head_dim if head_dim_v is None else head_dim_v)
    return batch * heads_kv * seq_k * dims * itemsize


def rate_per_s(amount: float, milliseconds: float, *, unit: float) -> float:
    """`amount` per second in units of `unit` (1e12 for TFLOP/s, 1e9 for GB/s)."""
    return amount / (milliseconds * 1e-3) / unit
