"""The Triton backend. Importing this imports triton; nothing else in the package does."""

from .decode import attention_with_cache
from .mla import mla_attention
from .op import attention

__all__ = ["attention", "attention_with_cache", "mla_attention"]
