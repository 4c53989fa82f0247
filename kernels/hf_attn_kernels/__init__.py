"""FlashAttention-2's functions in Triton (GPU) and blockwise PyTorch (CPU).

Needs torch; Triton is imported on the first call with GPU tensors, never before.
"""

from .api import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from .batch_invariance import batch_invariant, set_batch_invariant
from .device import backend_name, use_backend
from .dispatch import build_cpu_extension
from .mla import mla_decode

__all__ = [
    "backend_name",
    "batch_invariant",
    "build_cpu_extension",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "mla_decode",
    "set_batch_invariant",
    "use_backend",
]
