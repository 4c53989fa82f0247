"""Which backend serves a device's tensors: by the device's type, or forced by a test."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# backend of each torch device type; "xpu" and ROCm's "cuda" run the same Triton kernels
DEVICE_BACKENDS = {"cuda": "triton", "xpu": "triton", "cpu": "cpu"}
BACKENDS = ("triton", "cpu")

_forced: str | None = None


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


def forced_backend() -> str | None:
    """What :func:`use_backend` forces at the moment."""
    return _forced
