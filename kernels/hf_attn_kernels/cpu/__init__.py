"""The CPU backend: FlashAttention's tiling in PyTorch's own operators.

:mod:`.segments` splits a call into rows and sequences without padding, :mod:`.tiling` these into
blocks of queries and tiles of keys, :mod:`.choice` picks the engine (:mod:`.engine_sdpa` or
:mod:`.engine_matmul`) and :mod:`.blockwise` drives it; :mod:`.kvcache` does the same over a KV
cache.
"""

from .choice import plan
from .kvcache import attention_with_cache
from .mla import mla_attention
from .op import attention

__all__ = ["attention", "attention_with_cache", "mla_attention", "plan"]
