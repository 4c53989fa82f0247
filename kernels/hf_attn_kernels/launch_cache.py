"""Calls of a kind that ran before: run again as they were compiled, without the way there.

Checking the arguments of a decode step, choosing its tiles and letting Triton look at sixty
arguments takes the CPU longer than the GPU needs for the step. All of it depends on shapes, strides
and numbers alone, so a backend may keep what it found under the call's kind. What depends on values
besides, such as lengths and pages on a CPU, a plan must look at itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class CacheTensors(NamedTuple):
    """The tensors of a call over a cache, as they were given."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    seqlens: Tensor  # with cu_q the keys' offsets
    cu_q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    block_table: Tensor | None = None
    batch_idx: Tensor | None = None
    leftpad: Tensor | None = None
    slopes: Tensor | None = None
    s_aux: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None


class KnownCall:
    """A call and its kind: those of one kind may be run alike."""

    def __init__(self, tensors: CacheTensors, numbers: tuple[Hashable, ...]) -> None:
        self.tensors, self._numbers = tensors, numbers

    @cached_property
    def kind(self) -> Hashable:
        tensors = (
            # a kernel is compiled for pointers that are multiples of 16, or not
            None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16, t.get_device())
            for t in self.tensors
        )
        return (*tensors, *self._numbers)


# -> out, lse; None where it must be looked at again
Plan: TypeAlias = Callable[[CacheTensors], tuple[Tensor, Tensor] | None]

MOST = 1024  # kinds kept; a cache that grows with every token would make new ones for ever
_PLANS: dict[Hashable, Plan] = {}


def known_call(tensors: CacheTensors, numbers: tuple[Hashable, ...]) -> KnownCall | None:
    """The call, or None for one to be looked at each time: one that asks for a gradient; while
    torch.compile or a fake mode traces; on a GPU that is not the current one.
    """
    if torch.compiler.is_compiling() or type(tensors.q) is not Tensor or not _is_here(tensors.q):
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return None
    return KnownCall(tensors, numbers)


def _is_here(q: Tensor) -> bool:
    """On the CPU, or the current CUDA (or ROCm) device, which is where Triton launches."""
    return q.is_cpu or (q.is_cuda and q.get_device() == torch.cuda.current_device())


def run_known(call: KnownCall | None) -> tuple[Tensor, Tensor] | None:
    """out and lse, if a call of this kind ran before and this one may be run alike."""
    if call is None or not _PLANS:
        return None
    plan = _PLANS.get(call.kind)
    return None if plan is None else plan(call.tensors)


def learn(call: KnownCall, plan: Plan) -> None:
    """Run calls of this kind by `plan` from now on."""
    if len(_PLANS) >= MOST:
        _PLANS.clear()
    _PLANS[call.kind] = plan
