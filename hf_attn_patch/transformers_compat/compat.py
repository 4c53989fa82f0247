"""What is read from transformers' own code and tables, in one place.

Which of its names are private, and what each must look like: :mod:`.private_names`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig, masking_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from . import private_names
from .config_values import layer_value
from .model_code import MASK_AS_4D, ModelCode, attention_classes, source_of

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


def _of_masks(name: str) -> Callable[..., Any]:
    """A function of masking_utils; of one that is gone, what says so when it is called."""

    def gone(*args: Any, **kwargs: Any) -> Any:
        private_names.require(f"{masking_utils.__name__}.{name}")
        raise ValueError(f"transformers {private_names.version()} has no {name}")

    found: Callable[..., Any] = getattr(masking_utils, name, gone)
    return found


if TYPE_CHECKING:
    from transformers.masking_utils import (
        and_masks,
        causal_mask_function,
        or_masks,
        sdpa_mask,
        sliding_window_overlay,
    )
else:
    and_masks = _of_masks("and_masks")
    causal_mask_function = _of_masks("causal_mask_function")
    or_masks = _of_masks("or_masks")
    sdpa_mask = _of_masks("sdpa_mask")
    sliding_window_overlay = _of_masks("sliding_window_overlay")

try:
    from transformers.utils.output_capturing import _active_collector as _collector
except ImportError:  # then the flag itself must come
    _collector = None  # type: ignore[assignment]

IndexMask = Callable[
    ..., Any
]  # (batch, head, query, key indices) -> bool, transformers' mask_function


def implementation_of(config: Any) -> str | None:
    """The ``attn_implementation`` a config carries (None: not chosen yet)."""
    return getattr(config, "_attn_implementation", None)


def cache_keyword(module: nn.Module) -> str:
    """What a model or layer calls its cache: ``past_key_values``, from 5.24 on ``cache``."""
    given = inspect.signature(type(module).forward).parameters
    return "cache" if "cache" in given else "past_key_values"


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


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Facts about a modelling file that decide which masks it may be given."""

    interface: bool = True  # attention goes through AttentionInterface
    compact_masks: bool = False  # made for FlashAttention's 2D masks
    slices_masks: bool = False  # as 4D, for names without "flash"
    passes_window: bool = False  # its layers hand sliding_window to the attention function
    all_pass_window: bool = False  # those without a KV cache too
    window_is_exclusive: bool = False  # bidirectional: passes the window + 1, so that |q - k| < it
    always_causal: bool = False  # every layer says, or lets be assumed, that it is causal
    may_not_be_causal: bool = False  # some layer may say that it is not


UNKNOWN = Traits()
_TRAITS: dict[type, Traits] = {}
ATTENTION_CLASS = r"^class \w*Attention\w*\(nn\.Module\):"


def traits(config: Any) -> Traits:
    """Traits of the modelling code that belongs to a config; the careful UNKNOWN if it is lost."""
    known = _TRAITS.get(type(config))
    if known is None:
        name = type(config).__module__.replace("configuration_", "modeling_")
        known = _TRAITS[type(config)] = _read_traits(sys.modules.get(name))
    return known


def learn_traits(model: PreTrainedModel) -> Traits:
    """Read the traits from the model's own file and keep them for its config's class."""
    known = _TRAITS.get(type(model.config))
    if known is None or known is UNKNOWN:
        known = _TRAITS[type(model.config)] = _read_traits(sys.modules.get(type(model).__module__))
    return known


def _read_traits(module: ModuleType | None) -> Traits:
    source = "" if module is None else source_of(module)
    if module is None or not source:
        return UNKNOWN
    layers = attention_classes(module)
    no_cross = [layer for layer in layers if "Cross" not in layer.name]
    # what has a KV cache gets the causal masks; a file of encoders has none
    decoding = [layer for layer in no_cross if layer.caches] or no_cross
    return Traits(
        # a file without an attention class borrows the layers of another
        interface="get_interface(" in source
        or not re.search(ATTENTION_CLASS, source, re.MULTILINE),
        compact_masks=re.search(r"_supports_flash_attn\s*=\s*True", source) is not None,
        slices_masks=re.search(MASK_AS_4D, source) is not None,
        passes_window=bool(decoding) and all(layer.passes_window for layer in decoding),
        all_pass_window=bool(no_cross) and all(layer.passes_window for layer in no_cross),
        window_is_exclusive=re.search(r"\bsliding_window\s*\+\s*1\b", source) is not None,
        always_causal=bool(decoding) and all(layer.always_causal for layer in decoding),
        may_not_be_causal=not all(layer.always_causal for layer in decoding),
    )


_LATENTS: dict[type, str] = {}


def latent_attention(model_class: type[PreTrainedModel]) -> str:
    """How a model class attends to cached latents: ``"full"``, ``"sparse"`` (an indexer picks the
    keys) or ``"none"``; read from its own file and those of the models it derives from."""
    if model_class not in _LATENTS:
        modules = {sys.modules.get(base.__module__) for base in model_class.__mro__}
        sources = [source_of(m) for m in modules if m and not m.__name__.startswith("torch.")]
        found = [s for s in sources if re.search(r"^    def expand_kv\(", s, re.MULTILINE)]
        sparse = any(re.search(r"\bself\.indexer\b", s) for s in found)
        _LATENTS[model_class] = "sparse" if sparse else "full" if found else "none"
    return _LATENTS[model_class]


def ignores_interface(model_class: type[PreTrainedModel]) -> bool:
    """Whether a model class never calls the attention function (transformers' own test)."""
    return not model_class._can_set_attn_implementation()


def is_only_a_part(model_class: type[PreTrainedModel], code: ModelCode) -> bool:
    """Whether a class that does not use the name it was given does no harm, as part of a model or
    around models that do use it: no mask is made for it, and nobody loads it by itself."""
    return not code.builds_masks and (code.builds_models or not _loads_alone(model_class))


def _loads_alone(model_class: type[PreTrainedModel]) -> bool:
    """Whether an auto class loads it; of a model that is not transformers' own nobody knows."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    config_class: Any = getattr(model_class, "config_class", None)
    registered = config_class in MODEL_MAPPING or config_class in MODEL_FOR_CAUSAL_LM_MAPPING
    return registered or not model_class.__module__.startswith("transformers.models.")


def records_attentions() -> bool:
    """Whether the model that runs collects attention weights for its output."""
    # the flag itself does not reach every layer's keywords
    if _collector is None or torch.compiler.is_compiling():
        return False
    collected = _collector.get()
    return bool(collected) and any(key.endswith("attentions") for key in collected)


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
    """Width of the widest query head as the config gives it, None if it does not."""
    given = layer_value(config, "head_dim") or layer_value(config, "qk_head_dim")
    if given:
        return int(given)
    hidden = layer_value(config, "hidden_size")
    heads = layer_value(config, "num_attention_heads")
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
