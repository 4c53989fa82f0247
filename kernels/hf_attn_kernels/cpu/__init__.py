"""The CPU backend: FlashAttention's tiling in PyTorch's own operators.

:mod:`.work` splits a call into rows and sequences without padding, :mod:`.tiling` these into blocks
of queries and tiles of keys, :mod:`.choice` picks the engine (:mod:`.flash` or :mod:`.matmul`) and
:mod:`.run` drives it; :mod:`.cached` does the same over a KV cache.
"""

from .cached import attention_with_cache
from .choice import plan
from .mla import mla_attention
from .op import attention

__all__ = ["attention", "attention_with_cache", "mla_attention", "plan"]
