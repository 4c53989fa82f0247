"""Lets transformers take a name with "flash" in it for FlashAttention of this package.

transformers wants FlashAttention's functions for every such name, and from 5.19 on serves
continuous batching to no other name. Two plain tables of it are written, and cleared again:

- ``modeling_flash_attention_utils._lazy_imports``, where it looks the functions up by name, is
  wrapped; every name but ours goes on to what was there before.
- ``_compatible_flash_implementations`` of the few models that list what they take; any other name
  is silently replaced by the first of the list.

Both are private names of transformers: see :mod:`.private_names`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

# Modelling files with such a list, whose attention is one that the kernels know. minimax_m3_vl is
# left out: it asks for a sparse kernel of its own.
LISTING = tuple(
    f"transformers.models.{name}.modeling_{name}"
    for name in (
        "flint",
        "gpt_oss",
        "granite_swa",
        "granitemoe_swa",
        "mimo_v2_flash",
        "openai_privacy_filter",
    )
)

_names: frozenset[str] = frozenset()


def install(names: frozenset[str]) -> None:
    """Make transformers find our functions under `names`; replaces the earlier set."""
    global _names
    if _names - names:
        remove()
    if not names:
        return
    _names = names
    utils = _utils()
    there = utils._lazy_imports
    # wrapped anew each time: after a reload of this package the old one would read the old names
    utils._lazy_imports = _door(there.theirs if _is_ours(there) else there)
    admit()


def remove() -> None:
    """Forget the names; what transformers had before is put back."""
    global _names
    for accepted in _lists():
        accepted[:] = [name for name in accepted if name not in _names]
    utils = _utils()
    if utils._loaded_implementation in _names:  # it would not ask again
        utils._loaded_implementation = None
    _names = frozenset()
    # somebody may have wrapped it after us; then ours stays below theirs and passes everything on
    if _is_ours(utils._lazy_imports):
        utils._lazy_imports = utils._lazy_imports.theirs


def _utils() -> Any:
    from transformers import modeling_flash_attention_utils

    return modeling_flash_attention_utils


def _is_ours(function: object) -> bool:
    return getattr(function, "__module__", None) == __name__ and hasattr(function, "theirs")


def _door(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation is None or implementation.removeprefix("paged|") not in _names:
            return theirs(implementation, *args, **kwargs)
        import hf_attn_kernels as kernels

        utils = _utils()
        return (
            kernels.flash_attn_func,
            kernels.flash_attn_varlen_func,
            kernels.flash_attn_with_kvcache,
            utils._pad_input,
            utils._unpad_input,
        )

    lazy_imports.theirs = theirs  # type: ignore[attr-defined]
    return lazy_imports


def admit() -> None:
    """Enter the names in the lists of the modelling files imported so far."""
    for accepted in _lists():
        accepted.extend(sorted(_names - set(accepted)))


def _lists() -> Iterator[list[str]]:
    for name in LISTING:
        module = sys.modules.get(name)
        if isinstance(module, ModuleType):
            for value in list(vars(module).values()):
                accepted = getattr(value, "__dict__", {}).get("_compatible_flash_implementations")
                if isinstance(value, type) and isinstance(accepted, list):
                    yield accepted
