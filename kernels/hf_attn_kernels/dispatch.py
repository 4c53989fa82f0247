"""Which backend runs: decided by the device of the tensors, or forced by a test."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .batch_invariance import batch_invariant

# backend of each torch device type; "xpu" and ROCm's "cuda" run the same Triton kernels
DEVICE_BACKENDS = {"cuda": "triton", "xpu": "triton", "cpu": "cpu"}
BACKENDS = ("triton", "cpu")

_forced: str | None = None
_plain: Callable[..., Tensor | None] | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block: ``"triton"`` or ``"cpu"``.

    For tests and benchmarks. Triton on CPU tensors needs its interpreter: the environment variable
    ``TRITON_INTERPRET=1`` must be set before triton is first imported. Not thread-local.

    Raises:
        ValueError: the name is none of the backends.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} does not exist; possible: {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def backend_name(device: torch.device) -> str:
    """Name of the backend for tensors on `device`.

    Raises:
        ValueError: no backend serves this device.
        ImportError: the device needs Triton and it is not installed.
    """
    name = _forced or DEVICE_BACKENDS.get(device.type)
    if name is None:
        raise ValueError(
            f"no attention backend for tensors on {device.type!r}; possible devices: "
            f"{', '.join(DEVICE_BACKENDS)}. Move the model there, or use "
            "attn_implementation='sdpa'."
        )
    if name == "triton":
        if not triton_installed():
            raise ImportError(
                f"tensors on {device.type!r} need Triton, which is not installed: "
                "pip install 'hf-attn-patch[gpu]'"
            )
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                "the Triton backend was forced for CPU tensors, which works only in Triton's "
                "interpreter: set TRITON_INTERPRET=1 before triton is imported"
            )
    return name


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
    if not q.is_cpu or _forced not in (None, "cpu"):
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
