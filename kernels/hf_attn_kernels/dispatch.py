"""The backends behind one door: the one that serves a device, and the CPU's shortcuts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .batch_invariance import batch_invariant
from .device import backend_name, forced_backend

_plain: Callable[..., Tensor | None] | None = None


def load(device: torch.device) -> ModuleType:
    """The backend's package. It has ``attention(Problem)``, ``attention_with_cache(CacheProblem)``
    and ``mla_attention(MlaProblem)``, each returning ``(out, lse)``."""
    if backend_name(device) == "triton":
        if batch_invariant():
            raise ValueError(
                f"batch invariance is switched on, which the kernels for {device.type!r} do not "
                "give; possible on: cpu. Switch it off: set_batch_invariant(False), or unset "
                "HF_ATTN_BATCH_INVARIANT"
            )
        from . import triton as backend
    else:
        from . import cpu as backend  # type: ignore[no-redef]
    return backend


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, *, causal: bool, window_left: int = -1
) -> Tensor | None:
    """A call without extras in the shortest time, where a backend has a way of its own for it.

    Args:
        q: ``[B, Hq, Q, D]``; k, v: ``[B, Hkv, K, D]``: heads first, as transformers has them.
        window_left: keys to the left of the diagonal that are seen, -1 for all.

    Returns:
        ``[B, Q, Hq, D]``, or None: :func:`.api.flash_attn_func` does it, or says what is wrong.
    """
    if not q.is_cpu or forced_backend() not in (None, "cpu"):
        return None
    global _plain
    if _plain is None:  # once: finding a relative import costs as much as a small step's arithmetic
        from .cpu import direct

        _plain = direct.plain
    return _plain(q, k, v, scaling, causal=causal, window_left=window_left)


def build_cpu_extension() -> Path:
    """Compile the CPU backend's optional extension, which needs a C++ compiler.

    Once built it is used by this and every later process, see :mod:`.cpu.extension`.

    Returns:
        Path of the library, in the folder of torch's extensions.

    Raises:
        RuntimeError: there is no compiler, or it failed.
    """
    from .cpu import extension

    return extension.build_cpu_extension()
