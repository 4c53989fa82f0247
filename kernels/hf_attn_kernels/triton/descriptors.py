"""Tensor descriptors: what the copy engine (TMA, from Hopper on) must know to bring whole tiles.

They are made on the host, a call's own, and travel as kernel arguments. Made by the kernel they
would need memory from an allocator that is set for all of Triton, in each thread; autograd has its
own. A captured CUDA graph keeps them by value, as it keeps pointers.
"""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import COPY_ENGINE
from .launch import Inputs

ALIGNMENT = 16  # bytes, of the base and of every stride
# of fewer scores a call is over before another is launched, and describing it costs the CPU 7 us
# for each tensor; 2**26 are about 2,000 tokens with 16 heads
FEW_SCORES = 2**26


def refusal(x: Inputs, chip: str, others: tuple[Tensor, ...]) -> str | None:
    """Why the copy engine cannot bring k, v and the tensors `others` of a call; None if it can."""
    if chip not in COPY_ENGINE:
        return f"{chip} has no copy engine for tiles"
    if x.q.element_size() != 2:
        return f"{x.q.dtype} goes through the vector units, from registers"
    if x.key_mask is not None:
        return "padded keys must not be read: they may hold anything"
    if x.pattern.dropout_p > 0:
        return "dropout needs the registers that descriptors save"
    scores = x.shape.batch * x.shape.heads_q * x.shape.q_len * x.shape.k_len
    if scores < FEW_SCORES:
        return f"only {scores} scores"
    return next(filter(None, map(obstacle, (x.k, x.v, *others))), None)


def obstacle(x: Tensor) -> str | None:
    """Why the copy engine cannot read `x`, last dimension first; None if it can."""
    if x.numel() == 0:
        return "an empty tensor"
    if x.stride(-1) != 1:
        return f"a last stride of {x.stride(-1)}"
    if x.data_ptr() % ALIGNMENT:
        return f"a base that is no multiple of {ALIGNMENT} bytes"
    for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        # the stride of a dimension of one is never used, and may be anything; 0 is a repetition
        if size > 1 and (step <= 0 or step * x.element_size() % ALIGNMENT):
            return f"a stride of {step * x.element_size()} bytes"
    return None


def tiles_of(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """`x` ``[B, S, H, D]`` or ``[T, H, D]`` as ``[B, H, S, D]`` in tiles of rows x columns.

    A tile that reaches beyond S or D reads as zeros there, and writes nothing.
    """
    return _described((x if x.dim() == 4 else x[None]).transpose(1, 2), [1, 1, rows, columns])


def rows_of(x: Tensor, rows: int) -> TensorDescriptor:
    """A number for each row, `x` ``[B, H, S]``, by so many; beyond S it reads as zeros."""
    return _described(x, [1, 1, rows])


def _described(x: Tensor, block: list[int]) -> TensorDescriptor:
    unused = ALIGNMENT // x.element_size()
    steps = [
        step if size > 1 else unused
        for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    ]
    return TensorDescriptor(x, list(x.shape), [*steps, 1], block)
