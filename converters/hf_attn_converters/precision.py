"""Which dtypes a device multiplies fast: the one place where this is asked.

Processors without instructions for bfloat16 still take it, at a hundredth to a fifth of float32's
rate. The answer is read from the processor's flags and not timed: it is the same in every process
of a run, in a run that is resumed, and on a loaded machine. tests/converters/test_precision.py
holds the flags to what the products really take.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

# oneDNN multiplies; told to use no more than one of these, it has no narrow products
CAPS_WITHOUT = frozenset(("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"))


@dataclass(frozen=True)
class Products:
    """How a device multiplies a dtype: at least as fast as float32 or not, and why."""

    fast: bool
    why: str


def products(dtype: torch.dtype, device: torch.device | str = "cpu") -> Products:
    """Whether matrix products in `dtype` are at least as fast as float32's on the device."""
    name, kind = str(dtype).removeprefix("torch."), torch.device(device).type
    if dtype not in (torch.bfloat16, torch.float16):
        return Products(True, f"{name} is no half precision")
    if kind == "cpu":
        return _on_cpu(name)
    backend: Any = getattr(torch, kind, None)
    asks = getattr(backend, "is_bf16_supported", None) if dtype is torch.bfloat16 else None
    if asks is not None and not asks(including_emulation=False):
        return Products(False, f"this {kind} device only emulates bfloat16")
    return Products(True, f"a {kind} device multiplies {name} fast")


def _on_cpu(name: str) -> Products:
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if cap in CAPS_WITHOUT:
        return Products(False, f"ONEDNN_MAX_CPU_ISA={cap} leaves this processor no {name} products")
    for feature, there in _CPU_FEATURES[name].items():
        if there():
            return Products(True, f"this processor multiplies {name} by {feature}")
    return Products(
        False, f"this processor has no {name} products ({', '.join(_CPU_FEATURES[name])})"
    )


def _flag(name: str) -> bool:
    """One of torch.cpu's flags; False where torch is too old to know it."""
    return bool(getattr(torch.cpu, name, bool)())


def _onednn(name: str) -> bool:
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, name)())


def _arm_bfloat16() -> bool:
    """oneDNN's own answer, which on x86 is yes also where it only emulates."""
    return platform.machine() in ("aarch64", "arm64") and _onednn("_is_mkldnn_bf16_supported")


_CPU_FEATURES = {
    "bfloat16": {
        "AVX512-BF16": lambda: _flag("_is_avx512_bf16_supported"),
        "AMX": lambda: _flag("_is_amx_tile_supported"),
        "Arm BF16": _arm_bfloat16,
    },
    "float16": {
        "AVX512-FP16, AMX-FP16 or Arm FP16": lambda: _onednn("_is_mkldnn_fp16_supported"),
    },
}


def slow_note(dtype: torch.dtype, device: torch.device | str, instead: str) -> str | None:
    """One line for a user who is about to wait, with what to do `instead`; None where fast."""
    found = products(dtype, device)
    if found.fast:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"{name} will be slow, several times slower than float32: {found.why}; {instead}"


class WideProducts(TorchFunctionMode):
    """Within it, products of half-precision tensors are computed in float32, one at a time.

    Results keep the dtype they would have had. Weights stay as they are stored, on disk if they are
    mapped: only the product at hand takes twice its memory.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        dtype = next(x.dtype for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if dtype not in (torch.bfloat16, torch.float16):
            return func(*args, **kwargs)
        wide = func(*map(_wide, args), **{name: _wide(x) for name, x in kwargs.items()})
        return wide.to(dtype)


_PRODUCTS = frozenset(
    (
        *(linear, scaled_dot_product_attention),
        *(torch.matmul, torch.bmm, torch.addmm, torch.baddbmm),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.addmm, Tensor.baddbmm),
    )
)


def _wide(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value
