"""Families that no implementation here serves: what to do instead, and the error that says so."""

from __future__ import annotations

from typing import Any, NoReturn

DEFAULT_FIX = "load it with attn_implementation='eager' (or 'sdpa' where the model supports it)"
ALIBI_FIX = (
    "load it with attn_implementation='eager'; the ALiBi kernel itself is "
    "hf_attn_kernels.flash_attn_func(..., alibi_slopes=...)"
)
FIX_HINTS: dict[str, str] = {
    "bloom": ALIBI_FIX,
    "falcon": "load it with attn_implementation='triton_fa2' and call generate()",
    "mpt": ALIBI_FIX,
}

# model types that models/ brings to the interface, so that their masks are read here
ADAPTED = frozenset({"falcon"})


def fix_for(model_type: str) -> str:
    """What to do instead with a model of this type."""
    return FIX_HINTS.get(model_type, DEFAULT_FIX)


def raise_unsupported(config: Any, name: str) -> NoReturn:
    """For a config whose model never calls the attention function: a model whose implementation
    was changed after it was built."""
    model_type = getattr(config, "model_type", "")
    raise ValueError(
        f"a model of type {model_type!r} cannot use attn_implementation={name!r}: its code "
        f"never calls the attention function. Instead: {fix_for(model_type)}."
    )
