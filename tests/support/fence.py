"""Every load and store of an interpreted kernel is checked to lie within the tensors of its call.

On a GPU a read beyond a tensor goes unnoticed as long as something is there. Triton's interpreter
works with real addresses, so each can be compared with where the arguments' elements begin and end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]


class Fence:
    """Where the tensors of the running launch lie; `checked` counts the elements seen so far."""

    def __init__(self) -> None:
        self.starts = self.ends = np.zeros(0, dtype=np.uint64)
        self.checked = 0

    def around(self, arguments: Any) -> None:
        """From now on only the elements of these tensors may be touched."""
        spans = sorted(_spans(arguments))
        merged: list[list[int]] = []
        for start, end in spans:
            if merged and start <= merged[-1][1]:  # views of one storage
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        self.starts = np.array([start for start, _ in merged], dtype=np.uint64)
        self.ends = np.array([end for _, end in merged], dtype=np.uint64)

    def check(self, what: str, pointers: Any, mask: Array | None) -> None:
        """Raises IndexError unless all addresses that `mask` lets through lie inside."""
        addresses = np.atleast_1d(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask, dtype=bool), addresses.shape)]
        addresses = addresses.reshape(-1).astype(np.uint64)
        self.checked += len(addresses)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        at = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        inside = at >= 0
        if len(self.ends):
            inside &= addresses + np.uint64(size) <= self.ends[np.maximum(at, 0)]
        if not inside.all():
            raise IndexError(
                f"{what} of {int((~inside).sum())} of {len(addresses)} elements outside of the "
                "tensors that the kernel was given"
            )


FENCE = Fence()


def _spans(value: Any) -> Iterator[tuple[int, int]]:
    if isinstance(value, Tensor):
        if value.numel():
            steps = zip(value.shape, value.stride(), strict=True)
            last = sum((size - 1) * step for size, step in steps)
            yield value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()
    elif hasattr(value, "block_shape"):  # a tensor descriptor
        yield from _spans(value.base)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _spans(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _spans(part)


def put_up_fence() -> None:
    """Have every launch of the interpreter checked; a second call changes nothing."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    if getattr(executor, "fenced", False):
        return
    executor.fenced = True
    to_host = executor._init_args_hst
    load, store = builder.create_masked_load, builder.create_masked_store
    swap, change = builder.create_atomic_cas, builder.create_atomic_rmw

    def fenced_host(self: Any, args: Any, kwargs: Any) -> Any:
        found = to_host(self, args, kwargs)
        FENCE.around(found)
        return found

    def fenced_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        FENCE.check("load", pointers, mask.data)
        return load(self, pointers, mask, *rest, **options)

    def fenced_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        FENCE.check("store", pointers, mask.data)
        return store(self, pointers, value, mask, *rest)

    def fenced_swap(self: Any, pointers: Any, *rest: Any) -> Any:
        FENCE.check("atomic", pointers, None)
        return swap(self, pointers, *rest)

    def fenced_change(
        self: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        FENCE.check("atomic", pointers, mask.data)
        return change(self, kind, pointers, value, mask, *rest)

    executor._init_args_hst = fenced_host
    builder.create_masked_load, builder.create_masked_store = fenced_load, fenced_store
    builder.create_atomic_cas, builder.create_atomic_rmw = fenced_swap, fenced_change
