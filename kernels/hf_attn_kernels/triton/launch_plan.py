"""A call over a cache as its kernels were compiled: what running it again takes.

Triton's own launcher looks at each of sixty arguments to find the compiled kernel; here it is at
hand, and so are all arguments behind the tensors. Outputs are allocated as always, so a plan may be
captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..launch_cache import CacheTensors
from .decode_launch import new_outputs
from .launch import Launch


@dataclass(frozen=True)
class Ready:
    """A compiled kernel with its grid, and the arguments that follow the tensors."""

    launch: Callable[..., None]
    numbers: tuple[Any, ...]

    @staticmethod
    def of(launch: Launch, compiled: Any) -> Ready:
        """`compiled` is what Triton returned from `launch`. Kernels take their tensors first."""
        values = [launch.arguments[name] for name in launch.fn.arg_names]
        tensors = sum(value is None or isinstance(value, Tensor) for value in values)
        assert not any(value is None or isinstance(value, Tensor) for value in values[tensors:])
        grid = (*launch.grid, 1, 1)[:3]
        return Ready(compiled[grid], tuple(values[tensors:]))


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """The kernels of a call, in order, and what they need beside the call's tensors."""

    append: Ready | None
    turns: bool  # append rotates q
    decode: Ready
    reduce: Ready | None
    partial: int  # float32 numbers of the splits' results

    def __call__(self, x: CacheTensors) -> tuple[Tensor, Tensor]:
        """out and lse, as :func:`.decode.attention_with_cache`."""
        q, partial = x.q, None
        if self.append is not None:
            turned = q.new_empty(q.shape) if self.turns else None
            self.append.launch(
                q, x.k, x.v, turned, x.k_cache, x.v_cache, x.seqlens, x.block_table, x.batch_idx,
                x.k_descale, x.v_descale, x.cos, x.sin, *self.append.numbers,
            )  # fmt: skip
            q = q if turned is None else turned
        out, lse = new_outputs(q, x.v_cache, packed=x.cu_q is not None)
        if self.partial:
            partial = q.new_empty(self.partial, dtype=torch.float32)
        self.decode.launch(
            q, x.k_cache, x.v_cache, out, lse, partial, x.seqlens, x.cu_q, x.block_table,
            x.batch_idx, x.leftpad, None, x.slopes, x.s_aux, x.k_descale, x.v_descale,
            *self.decode.numbers,
        )  # fmt: skip
        if self.reduce is not None:
            self.reduce.launch(partial, x.s_aux, out, lse, x.cu_q, *self.reduce.numbers)
        return out, lse
