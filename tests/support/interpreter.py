"""Triton's interpreter for tests without a GPU, with its bf16 matrix product put right.

It also gets the addition of a whole tile through a descriptor, which it lacks.

The interpreter keeps bf16 values as their raw uint16 bits and `tl.dot` multiplies those bits as if
they were numbers: silently wrong (triton issue 11585). Widening both operands to float32, which
holds every bf16 exactly, before the product gives what the hardware computes.
"""

from __future__ import annotations

import os
from typing import Any


def interpreting() -> bool:
    """Whether Triton was, or will be, imported as an interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def fix_bf16_dot() -> None:
    """Make the interpreter's `tl.dot` right for bf16 operands; a second call changes nothing."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot
    if getattr(create_dot, "widens_bf16", False):
        return

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def widened_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return create_dot(self, widen(a), widen(b), d, *rest)

    widened_dot.widens_bf16 = True  # type: ignore[attr-defined]
    interpreter.InterpreterBuilder.create_dot = widened_dot


def add_descriptor_sums() -> None:
    """Give the interpreter `descriptor.atomic_add`, unless it has it."""
    import numpy as np
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    if hasattr(interpreter.InterpreterBuilder, "create_descriptor_reduce"):
        return

    def create_descriptor_reduce(self: Any, kind: Any, desc: Any, value: Any, at: Any) -> Any:
        assert kind == ir.DESCRIPTOR_REDUCE_KIND.ADD
        pointers, inside = desc.materialize_pointers(at)
        mask = interpreter.TensorHandle(np.ascontiguousarray(inside), tl.int1)
        relaxed, gpu = ir.MEM_SEMANTIC.RELAXED, ir.MEM_SYNC_SCOPE.GPU
        return self.create_atomic_rmw(ir.ATOMIC_OP.FADD, pointers, value, mask, relaxed, gpu)

    interpreter.InterpreterBuilder.create_descriptor_reduce = create_descriptor_reduce
