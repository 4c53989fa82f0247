"""Every touch of a name that transformers does not promise to keep. Checked on 5.17.0 and 5.23.0.

(The two tables of names themselves are in :mod:`.entry`, which must not import transformers.)
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from transformers import PretrainedConfig, masking_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

__all__ = [
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "PreTrainedModel",
    "PretrainedConfig",
    "and_masks",
    "causal_mask_function",
    "logging",
    "or_masks",
    "sdpa_mask",
    "sliding_window_overlay",
]

IndexMask = Callable[
    ..., Any
]  # (batch, head, query, key indices) -> bool, transformers' mask_function


def implementation_of(config: Any) -> str | None:
    """The ``attn_implementation`` a config carries (None: not chosen yet)."""
    return getattr(config, "_attn_implementation", None)


# --- mask_function: what transformers composes to say who sees whom ------------------------------

# inner functions have no identity to compare with, only the place they were defined at
_LEAF_OF = {
    "causal_mask_function": "causal",
    "bidirectional_mask_function": "bidirectional",
    "sliding_window_overlay.<locals>.inner_mask": "window",
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": "window_both_sides",
    "packed_sequence_mask_function.<locals>.inner_mask": "packed",
    "remap_positions_for_packed_sequence.<locals>.inner_mask": "remap",
    "and_masks.<locals>.and_mask": "and",
}


def mask_leaf(function: IndexMask) -> tuple[str, dict[str, Any]]:
    """Name of a mask function of transformers and what it closes over; ``"other"`` if unknown.

    Names: causal, bidirectional, window, window_both_sides, packed, remap, and, other.
    """
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return "other", {}
    code = getattr(function, "__code__", None)
    kind = _LEAF_OF.get(getattr(function, "__qualname__", ""), "other")
    if code is None or kind == "other":
        return "other", {}
    cells = getattr(function, "__closure__", None) or ()
    return kind, dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))


# --- what a model's modelling code can take ------------------------------------------------------


@dataclass(frozen=True)
class Traits:
    """Facts about a modelling file that decide which masks it may be given."""

    interface: bool  # attention goes through AttentionInterface
    compact_masks: bool  # made for FlashAttention's 2D masks
    passes_window: bool  # hands sliding_window to the attention function
    window_is_exclusive: bool  # bidirectional: passes the window + 1, so that |q - k| < window


UNKNOWN = Traits(
    interface=True, compact_masks=False, passes_window=False, window_is_exclusive=False
)
_TRAITS: dict[type, Traits] = {}
ATTENTION_CLASS = r"^class \w*Attention\w*\(nn\.Module\):"


def traits(config: Any) -> Traits:
    """Traits of the modelling code that belongs to a config; the careful UNKNOWN if it is lost."""
    found = _TRAITS.get(type(config))
    if found is None:
        name = type(config).__module__.replace("configuration_", "modeling_")
        found = _TRAITS[type(config)] = _read_traits(sys.modules.get(name))
    return found


def learn_traits(model: PreTrainedModel) -> Traits:
    """Read the traits from the model's own file and keep them for its config's class."""
    known = _TRAITS.get(type(model.config))
    if known is None or known is UNKNOWN:
        known = _TRAITS[type(model.config)] = _read_traits(sys.modules.get(type(model).__module__))
    return known


def _read_traits(module: ModuleType | None) -> Traits:
    if module is None:
        return UNKNOWN
    source = _source(module)
    if not source:
        return UNKNOWN
    return Traits(
        # a file without an attention class borrows the layers of another
        interface="get_interface(" in source
        or not re.search(ATTENTION_CLASS, source, re.MULTILINE),
        compact_masks=re.search(r"_supports_flash_attn\s*=\s*True", source) is not None,
        passes_window=re.search(r"\bsliding_window=(?!None)", source) is not None,
        window_is_exclusive=re.search(r"\bsliding_window\s*\+\s*1\b", source) is not None,
    )


def _source(module: ModuleType) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):  # no source file: a notebook, a frozen application
        return ""


_LATENTS: dict[type, str] = {}


def latent_attention(model_class: type[PreTrainedModel]) -> str:
    """How a model class attends to cached latents: ``"full"``, ``"sparse"`` (an indexer picks the
    keys) or ``"none"``; read from its own file and those of the models it derives from."""
    if model_class not in _LATENTS:
        modules = {sys.modules.get(base.__module__) for base in model_class.__mro__}
        sources = [_source(m) for m in modules if m and not m.__name__.startswith("torch.")]
        found = [s for s in sources if re.search(r"^    def expand_kv\(", s, re.MULTILINE)]
        sparse = any(re.search(r"\bself\.indexer\b", s) for s in found)
        _LATENTS[model_class] = "sparse" if sparse else "full" if found else "none"
    return _LATENTS[model_class]


def ignores_interface(model_class: type[PreTrainedModel]) -> bool:
    """Whether a model class never calls the attention function (transformers' own test)."""
    return not model_class._can_set_attn_implementation()


def eager_only(model_class: type[PreTrainedModel]) -> bool:
    """Whether transformers declares that nothing but eager attention works for a model class."""
    flags = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn")
    return not any(getattr(model_class, flag, False) for flag in flags)


def model_class_of(config: Any) -> type[PreTrainedModel] | None:
    """The class a config's checkpoint is loaded as: by its architecture, else by its type."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    for mapping in (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_MAPPING,
    ):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    return None


def head_dim_of(config: Any) -> int | None:
    """Width of a query head as the config gives it, None if it does not."""
    given = getattr(config, "head_dim", None) or getattr(config, "qk_head_dim", None)
    if given:
        return int(given)
    hidden = getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    return hidden // heads if hidden and heads else None


# --- continuous batching -------------------------------------------------------------------------


def batching_config(*, page_size: int, pages: int, max_batch_tokens: int | None = None) -> Any:
    """transformers' ContinuousBatchingConfig; `page_size` was called block_size up to 5.18."""
    from transformers import ContinuousBatchingConfig

    fields = ContinuousBatchingConfig.__dataclass_fields__
    name = "page_size" if "page_size" in fields else "block_size"
    # else 5.19 and later put another implementation in the place of a name without "flash"
    switch = {"auto_switch_to_flash": False} if "auto_switch_to_flash" in fields else {}
    limit = {} if max_batch_tokens is None else {"max_batch_tokens": max_batch_tokens}
    given: dict[str, Any] = {name: page_size, "num_blocks": pages} | switch | limit
    return ContinuousBatchingConfig(**given)
