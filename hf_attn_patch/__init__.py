"""Better attention layers for Hugging Face models, chosen by name.

    import hf_attn_patch                                   # registers the implementations
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="triton_fa2")

Importing costs next to nothing. transformers' modelling code (seconds, and on many machines Triton
with it) is not imported here: the implementations are registered when it is, see
:mod:`.import_hooks`. Names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import import_hooks

if TYPE_CHECKING:
    from .cache.paged import PagedCache
    from .cache.rolling import RollingCache
    from .capabilities import Accepted, Capabilities, Rejected, Requirements, Verdict
    from .checks import check
    from .registry import (
        AttentionImpl,
        is_registered,
        list_implementations,
        register,
        unregister,
    )
    from .swa import SwaSettings, configure_swa

__version__ = "0.1.0"

__all__ = [
    "Accepted",
    "AttentionImpl",
    "Capabilities",
    "PagedCache",
    "Rejected",
    "Requirements",
    "RollingCache",
    "SwaSettings",
    "Verdict",
    "check",
    "configure_swa",
    "is_registered",
    "list_implementations",
    "register",
    "unregister",
]

_HOME = {
    "PagedCache": "cache.paged",
    "RollingCache": "cache.rolling",
    "check": "checks",
    "AttentionImpl": "registry",
    "Capabilities": "capabilities",
    "is_registered": "registry",
    "list_implementations": "registry",
    "register": "registry",
    "unregister": "registry",
    "Accepted": "capabilities",
    "Rejected": "capabilities",
    "Requirements": "capabilities",
    "Verdict": "capabilities",
    "SwaSettings": "swa",
    "configure_swa": "swa",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


import_hooks.register_with_transformers()
