"""What describes a family, and what describes a form that its checkpoints can be brought into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .layouts import Layout

TIED = (("lm_head.weight", "model.embed_tokens.weight"),)


@dataclass(frozen=True)
class Condition:
    """A value in config.json, and what transformers takes when it is absent or null."""

    key: str
    value: Any
    absent: Any
    null_counts: bool = False  # null is a value of its own

    def holds(self, config: Mapping[str, Any]) -> bool:
        return bool(self.found(config) == self.value)

    def found(self, config: Mapping[str, Any]) -> Any:
        value = config.get(self.key, self.absent)
        return self.absent if value is None and not self.null_counts else value


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """How rotary embeddings lie in a head, from dimension 0 on. For methods that turn K."""

    interleaved: bool = False  # pairs (2i, 2i + 1) as GPT-J; else (i, i + dims / 2)
    share: float = 1.0  # of head_dim, when config.json is silent
    share_keys: tuple[str, ...] = ()  # config keys that say otherwise; none: always all of it
    unless: str = ""  # a config key that, when true, means no rotary embeddings at all

    def dims(self, config: Mapping[str, Any], head_dim: int) -> int:
        """The rotary dimensions of a head."""
        if self.unless and config.get(self.unless):
            return 0
        scopes = [config.get("rope_parameters"), config.get("rope_scaling"), config]
        for scope in scopes:
            for key in self.share_keys:
                if isinstance(scope, dict) and scope.get(key) is not None:
                    return int(head_dim * float(scope[key]))
        return int(head_dim * self.share)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A form that a converted checkpoint can have, so that a model class loads it."""

    holds: Literal["any", "one", "all"] = "any"  # KV heads: any that divide, 1, all query heads
    when: tuple[Condition, ...] = ()  # only for sources whose config says so
    as_is: bool = False  # also worth a conversion that leaves the number of KV heads
    model_type: str | None = None  # None, here and below: as in the source
    layout: Layout | None = None
    kv_heads_key: str | None = "num_key_value_heads"  # where config.json takes the count
    head_dim_key: str | None = "head_dim"
    config: Mapping[str, Any] = field(default_factory=dict)  # written always
    defaults: Mapping[str, Any] = field(default_factory=dict)  # written where config.json is silent
    drops: tuple[str, ...] = ()  # config keys that go
    architectures: Mapping[str, str] | None = None  # model classes by their new names
    transposed: str = ""  # regex: weights beside attention that turn from Conv1D into Linear
    obsolete: str = ""  # regex: tensors that the target has no place for and that hold nothing
    code: tuple[str, ...] = ()  # files of ../models that travel with the checkpoint
    rotary_path: str = ""  # where its model makes rotary embeddings unlike the source's

    def can_hold(self, config: Mapping[str, Any], kv_heads: int, query_heads: int) -> bool:
        if self.holds == "one" and kv_heads != 1:
            return False
        if self.holds == "all" and kv_heads != query_heads:
            return False
        return all(condition.holds(config) for condition in self.when)


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """All that the converters know of a family. Sizes are read from its parsed config.json."""

    model_type: str
    layout: Layout
    name: str = ""  # where one model_type has several layouts; else the model_type
    when: tuple[Condition, ...] = ()  # which of them a config means
    needs: tuple[Condition, ...] = ()  # what a config must say to be convertible at all
    nested: str = ""  # the key of config.json below which the language model's settings stand

    heads_key: str = "num_attention_heads"
    kv_heads_key: str | None = "num_key_value_heads"
    kv_heads_without_key: Literal["one", "all"] = "all"  # where kv_heads_key is None
    head_dim_key: str | None = "head_dim"
    layers_key: str = "num_hidden_layers"  # of the layers that have weights of their own
    hidden_key: str = "hidden_size"
    # What transformers takes when a key is absent; None: it is required, or, for KV heads and
    # head_dim, as many as query heads, and hidden size / query heads.
    absent_heads: int | None = None
    absent_layers: int | None = None
    absent_kv_heads: int | None = None
    absent_head_dim: int | None = None
    # (may be left out, where its values are) when config.json says tie_word_embeddings.
    tied: tuple[tuple[str, str], ...] = TIED

    targets: tuple[Target, ...] = (Target(),)  # the first that can hold the count is taken
    refusal: str = ""  # why there is none for other counts
    code: tuple[str, ...] = ()  # files that came with the source and go with its form

    # For calibrated methods: where transformers' model has what is measured.
    layers_path: str = "model.layers"
    attention_path: str = "self_attn"
    auto_class: str = "AutoModelForCausalLM"
    rotary: Rotary | None = Rotary()
    k_free: bool = True  # no norm between K's projection and the scores
    k_bound_by: str = ""  # a config key that, when true, puts such a norm there
    heads_numbered_by: str = ""  # a config key that, when true, ties heads to their places (ALiBi)
    kv_cache: bool = True  # False for encoders, which have none
    # What config.json must say for a result with latents (../mla). None: there is no such result.
    latents: tuple[Condition, ...] | None = None

    def settings(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of config.json that holds the sizes."""
        if not self.nested:
            return config
        inner = config.get(self.nested)
        if not isinstance(inner, dict):
            raise ValueError(f"config.json: {self.nested} must be an object, got {inner!r}")
        return inner

    def query_heads(self, config: Mapping[str, Any]) -> int:
        return self._count(config, self.heads_key, self.absent_heads)

    def kv_heads(self, config: Mapping[str, Any]) -> int:
        if self.kv_heads_key is None:
            return 1 if self.kv_heads_without_key == "one" else self.query_heads(config)
        if self.kv_heads_key not in self.settings(config):  # absent and null mean different things
            return self.absent_kv_heads or self.query_heads(config)
        return self._count(config, self.kv_heads_key, self.query_heads(config))

    def head_dim(self, config: Mapping[str, Any]) -> int:
        by_division = self.hidden(config) // self.query_heads(config)
        if self.head_dim_key is None:
            return by_division
        if self.head_dim_key not in self.settings(config) and self.absent_head_dim is not None:
            return self.absent_head_dim
        return self._count(config, self.head_dim_key, by_division)

    def hidden(self, config: Mapping[str, Any]) -> int:
        return self._count(config, self.hidden_key, None)

    def layers(self, config: Mapping[str, Any]) -> int:
        return self._count(config, self.layers_key, self.absent_layers)

    def rotary_dims(self, config: Mapping[str, Any]) -> int:
        """How many of a head's dimensions are rotated; 0 for none."""
        if self.rotary is None:
            return 0
        return self.rotary.dims(self.settings(config), self.head_dim(config))

    def k_is_free(self, config: Mapping[str, Any]) -> bool:
        """Whether K may be turned when Q is turned back: no norm stands in between."""
        return self.k_free and not (self.k_bound_by and self.settings(config).get(self.k_bound_by))

    def heads_can_move(self, config: Mapping[str, Any]) -> bool:
        """Whether heads may change places in q, k, v and o together."""
        return not (self.heads_numbered_by and self.settings(config).get(self.heads_numbered_by))

    def target(self, config: Mapping[str, Any], kv_heads: int) -> Target:
        """The form for that many KV heads. Raises ValueError, with the possible counts."""
        settings, query_heads = self.settings(config), self.query_heads(config)
        for target in self.targets:
            if target.can_hold(settings, kv_heads, query_heads):
                return target
        divisors = [n for n in range(1, query_heads + 1) if query_heads % n == 0]
        possible = {
            n for t in self.targets for n in divisors if t.can_hold(settings, n, query_heads)
        } | {self.kv_heads(config)}
        raise ValueError(
            f"{self.model_type} cannot hold {kv_heads} KV heads: {self.refusal}; "
            f"possible: {', '.join(map(str, sorted(possible)))}"
        )

    def _count(self, config: Mapping[str, Any], key: str, if_null: int | None) -> int:
        value = self.settings(config).get(key)
        if value is None:
            value = if_null
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            where = f"{self.nested}.{key}" if self.nested else key
            raise ValueError(f"config.json: {where} must be a positive integer, got {value!r}")
        return value
