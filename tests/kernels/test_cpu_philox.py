"""The CPU's dropout generator against Random123's published answer, and against the oracle's."""

from __future__ import annotations

import pytest
import torch

from hf_attn_kernels.cpu.philox import first_word, keep_scale
from hf_attn_kernels.reference import _dropout_keep


def test_published_answer():
    """Random123's kat_vectors, philox4x32 with 10 rounds: all zeros."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert int(first_word(0, zero, zero, zero)) == 0x6627E8D5


@pytest.mark.parametrize("seed", [1, 2**32 - 1, 2**61 + 12345], ids=str)
def test_same_weights_as_the_oracle(seed):
    p, row, heads, queries, keys = 0.3, 5, 3, 40, 70
    want = _dropout_keep(seed, row, heads, queries, keys, p)
    got = keep_scale(
        seed,
        p,
        torch.arange(row * heads, row * heads + heads),
        torch.arange(queries),
        torch.arange(keys),
        torch.float64,
    )
    assert torch.equal(got, torch.from_numpy(want).double() / (1 - p))
    assert abs(float((got == 0).double().mean()) - p) < 0.02
