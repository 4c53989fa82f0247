"""All that a new family touches: one `FamilySpec` literal.

A family says where its projections are (`layout`), how its config.json spells head counts, and
which values transformers assumes when config.json is silent. Nothing else in this package knows
a family's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .layouts import SeparateLayout


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    model_type: str
    layout: SeparateLayout
    heads_key: str = "num_attention_heads"
    kv_heads_key: str = "num_key_value_heads"
    head_dim_key: str = "head_dim"
    layers_key: str = "num_hidden_layers"
    hidden_key: str = "hidden_size"
    # What transformers takes when the key is absent; None: as many as query heads, and
    # hidden size / query heads.
    absent_kv_heads: int | None = None
    absent_head_dim: int | None = None
    # (may be left out, where its values are) when config.json says tie_word_embeddings.
    tied: tuple[tuple[str, str], ...] = (("lm_head.weight", "model.embed_tokens.weight"),)

    def query_heads(self, config: Mapping[str, Any]) -> int:
        return _count(config, self.heads_key, None)

    def kv_heads(self, config: Mapping[str, Any]) -> int:
        if self.kv_heads_key not in config:  # absent and null mean different things
            return self.absent_kv_heads or self.query_heads(config)
        return _count(config, self.kv_heads_key, self.query_heads(config))

    def head_dim(self, config: Mapping[str, Any]) -> int:
        if self.head_dim_key not in config and self.absent_head_dim is not None:
            return self.absent_head_dim
        by_division = self.hidden(config) // self.query_heads(config)
        return _count(config, self.head_dim_key, by_division)

    def hidden(self, config: Mapping[str, Any]) -> int:
        return _count(config, self.hidden_key, None)

    def layers(self, config: Mapping[str, Any]) -> int:
        return _count(config, self.layers_key, None)


def _count(config: Mapping[str, Any], key: str, if_null: int | None) -> int:
    value = config.get(key)
    if value is None:
        value = if_null
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


_LLAMA = SeparateLayout()

FAMILIES: dict[str, FamilySpec] = {
    spec.model_type: spec
    for spec in (
        FamilySpec(model_type="llama", layout=_LLAMA),
        FamilySpec(model_type="mistral", layout=_LLAMA, absent_kv_heads=8),
        FamilySpec(model_type="qwen2", layout=_LLAMA, absent_kv_heads=32),
    )
}


def family_of(config: Mapping[str, Any]) -> FamilySpec:
    """The family of a parsed config.json. Raises ValueError, listing the known, for others."""
    model_type = config.get("model_type")
    spec = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if spec is None:
        raise ValueError(
            f"config.json: model_type {model_type!r} cannot be converted; "
            f"known families: {', '.join(sorted(FAMILIES))}"
        )
    return spec
