"""configure_swa: a sliding window for any causal model, and a cache that rolls with it."""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .cache.inputs import CACHE_NAMES, by_name, cache_name, find_cache
from .cache.rolling import RollingCache, RollingLayer, rolling_layers
from .swa_config import SwaSettings, required, store
from .transformers_compat import compat
from .transformers_compat.config_values import layer_value

__all__ = ["SwaSettings", "configure_swa"]

_hooks: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()


def configure_swa(model: Any, *, window: int | None = None, sinks: int = 0) -> SwaSettings:
    """Give every causal layer of a model a sliding window, and kept first tokens.

    A query then sees the `window` - 1 tokens before it, itself, and the first `sinks` tokens of its
    row (StreamingLLM, Xiao et al. 2023; positions stay the absolute ones). Layers with a narrower
    window of their own keep theirs. The settings are saved with the model's config.

    ``model.generate()`` holds only sinks + window keys from then on: a forward pre-hook on this
    model turns the empty cache that it brings into a rolling one. Static and quantized caches, and
    those of encoder-decoder models, stay as they are. Calling it again replaces the settings.

    Args:
        model: a transformers model loaded with ``attn_implementation="triton_swa"``.
        window: tokens, the query's own among them; by default ``config.sliding_window``.
        sinks: first tokens to keep, 0 or more.

    Raises:
        ValueError: another implementation, no causal layer, no window, or numbers out of range.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, compat.PreTrainedModel) or config is None:
        raise ValueError(f"configure_swa takes a transformers model, got {type(model).__name__}")
    text = config.get_text_config(decoder=True)
    name = compat.implementation_of(text)
    if name != "triton_swa":
        raise ValueError(
            f"configure_swa needs a model with attn_implementation='triton_swa', this one has "
            f"{name!r}: load it with that name, or call "
            "model.set_attn_implementation('triton_swa') first"
        )
    if window is None:
        window = layer_value(text, "sliding_window")
        if window is None:
            raise ValueError(
                f"the config of this {text.model_type!r} model has no sliding_window: pass one, "
                "such as configure_swa(model, window=4096)"
            )
    if not any(getattr(module, "is_causal", False) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no causal attention layer, so there is nothing to slide; "
            "use attn_implementation='triton_fa2'"
        )
    settings = SwaSettings(window=window, sinks=sinks)
    for part in _configs(model):
        store(part, settings)
    if model in _hooks:
        _hooks[model].remove()
    _hooks[model] = model.register_forward_pre_hook(partial(_roll_cache), with_kwargs=True)
    return settings


def _configs(model: compat.PreTrainedModel) -> list[Any]:
    found = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, compat.PretrainedConfig):
            found[id(config)] = config
    return list(found.values())


def _roll_cache(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: an empty growing cache becomes a rolling one."""
    if torch.compiler.is_compiling():
        return None
    config = model.config.get_text_config(decoder=True)
    given = by_name(model, args, kwargs)
    cache = find_cache(given)
    if compat.implementation_of(config) != "triton_swa":
        _refuse_rolled(cache, compat.implementation_of(config))
        return None
    if cache is None and given.get("use_cache") is True and not config.is_encoder_decoder:
        rolling = {cache_name(model): RollingCache(config)}
        if any(name in given and name not in kwargs for name in CACHE_NAMES):  # by position
            return (), given | rolling
        return args, {k: v for k, v in kwargs.items() if k not in CACHE_NAMES} | rolling
    if type(cache) is compat.DynamicCache and cache.get_seq_length() == 0:
        _convert(cache, config)
    return None


def _convert(cache: Any, config: Any) -> None:
    # in place: generate() holds this very object
    recording = [getattr(layer, "record_past", False) for layer in cache.layers]
    cache.layers = rolling_layers(config, required(config))
    cache.layer_class_to_replicate = None
    for layer, was_recording in zip(cache.layers, recording, strict=False):
        if isinstance(layer, RollingLayer):
            layer.record_past = was_recording


def _refuse_rolled(cache: Any, name: str | None) -> None:
    layers = getattr(cache, "layers", ())
    if any(isinstance(layer, RollingLayer) and layer.sinks for layer in layers):
        raise ValueError(
            "this cache keeps first tokens for attn_implementation='triton_swa', and the model "
            f"now has {name!r}; start over with a new cache"
        )
