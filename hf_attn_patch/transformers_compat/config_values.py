"""Reading configs whose layers may differ."""

from __future__ import annotations

from typing import Any


def layer_values(config: Any, name: str) -> list[Any]:
    """What a config says under `name`: its one value, or each layer's where they differ.

    Configs whose layers differ raise when they are asked as a whole.
    """
    try:
        return [getattr(config, name, None)]
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def layer_value(config: Any, name: str) -> Any:
    """The one value of a config, the largest of those that layers differ in, None for none."""
    given = [value for value in layer_values(config, name) if value is not None]
    return max(given, default=None) if len(given) > 1 else (given or [None])[0]
