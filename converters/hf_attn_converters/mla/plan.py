"""Latents instead of KV heads: every check that headers allow, and the work that it will be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..conversion import Opened, Work, check_architectures
from ..families import FAMILIES, FamilySpec
from ..io.checkpoint import Checkpoint, open_checkpoint
from ..merge.method import Method
from .deepseek import TARGET, Sizes
from .form import Latents

METHODS = {
    method.name: method
    for method in (
        Method(
            name="mla",
            summary="the best shared latent and rotated key for what the layer sees; closed form",
            calibrated=True,
        ),
        Method(
            name="mla+fit",
            summary="mla, then each layer fitted to the source's layer",
            calibrated=True,
            fitted=True,
        ),
    )
}

# Rotary embeddings whose frequencies do not change with the length of the text.
_STATIC = ("default", "linear", "llama3", "yarn")
_INSTEAD = "convert its KV heads instead: --num-key-value-heads"


def plan_latents(
    source: str | Path,
    target: str | Path,
    *,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    method: str = "mla",
    tensor_parallel_size: int | None = None,
) -> Work:
    """Check everything that headers can tell. Raises ValueError for misuse and bad input.

    `kv_lora_rank` are the columns of the latent, one of which is a constant; `qk_rope_head_dim`
    those of the rotated key. Their sum is what a token leaves in the cache of a layer.
    """
    if method not in METHODS:
        raise ValueError(
            f"unknown method {method!r} for latents; possible: {', '.join(sorted(METHODS))}"
        )
    checkpoint = open_checkpoint(Path(source))
    _check_kind(checkpoint)
    opened = Opened.of(checkpoint)
    family, config = opened.family, checkpoint.config
    _check_rotary(family, config)
    check_architectures(family, config, TARGET)
    heads, before, dim = (
        family.query_heads(config),
        family.kv_heads(config),
        family.head_dim(config),
    )
    if heads % before:
        raise ValueError(
            f"the source is broken: its {before} KV heads do not divide its {heads} query heads"
        )
    sizes = Sizes(
        hidden=family.hidden(config),
        heads=heads,
        dim=dim,
        rank=kv_lora_rank,
        rope=qk_rope_head_dim,
        q_biased=any(p.kind == "bias" and "q" in p.slot.roles for p in opened.places.values()),
    )
    _check_sizes(sizes, before)
    if tensor_parallel_size is not None and (
        tensor_parallel_size < 1 or heads % tensor_parallel_size
    ):
        raise ValueError(
            f"{heads} query heads cannot be split over {tensor_parallel_size} devices; possible: "
            f"{', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}"
        )
    return opened.work(
        Path(target),
        TARGET,
        Latents(METHODS[method], sizes),
        opened.places,
        cached=kv_lora_rank + qk_rope_head_dim,
        method=method,
        kv_heads_after=heads,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
    )


def _check_kind(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    kind = config.get("model_type")
    if config.get("kv_lora_rank") is not None:
        raise ValueError(
            f"{checkpoint.folder} caches latents already ({kind}, kv_lora_rank "
            f"{config['kv_lora_rank']}): nothing to convert"
        )
    able = {spec.model_type: spec for spec in FAMILIES.values() if spec.latents is not None}
    if kind not in able:
        raise ValueError(
            f"{kind} cannot take latents; possible: {', '.join(sorted(able))}. {_INSTEAD}"
        )
    for condition in able[kind].latents or ():
        if not condition.holds(config):
            raise ValueError(
                f"{kind} with {condition.key}={condition.found(config)!r} cannot take latents; "
                f"possible: {condition.value!r}. {_INSTEAD}"
            )


def _check_rotary(family: FamilySpec, config: Mapping[str, Any]) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if not isinstance(rope, dict):
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in _STATIC:
            raise ValueError(
                f"{family.model_type} with {key} of type {kind!r} cannot take latents: its "
                f"frequencies change with the text's length; possible: {', '.join(_STATIC)}. "
                f"{_INSTEAD}"
            )


def _check_sizes(sizes: Sizes, kv_heads: int) -> None:
    all_keys, all_of_both = kv_heads * sizes.dim, 2 * kv_heads * sizes.dim
    if not 2 <= sizes.rope <= all_keys or sizes.rope % 2:
        raise ValueError(
            f"qk_rope_head_dim is {sizes.rope}; possible: even numbers from 2 to {all_keys}, which "
            "rotates all keys of all KV heads"
        )
    largest = min(all_of_both - sizes.rope, sizes.hidden) + 1
    if not 2 <= sizes.rank <= largest:
        raise ValueError(
            f"kv_lora_rank is {sizes.rank}; possible with qk_rope_head_dim {sizes.rope}: 2 to "
            f"{largest}, beyond which nothing is left to say (one column is a constant)"
        )
