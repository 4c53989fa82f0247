"""A decoder's sizes from its config: layers, what each caches, and parameters, without weights.

Of a model that also sees or hears, the layers are its decoder's and the parameters all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..transformers_compat.config_values import layer_value, layer_values


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one layer caches per token, and how far it sees."""

    kv_heads: int  # 0: no keys and values (linear attention, convolutions)
    k_dim: int  # of one KV head
    v_dim: int
    window: int | None = None  # tokens, the query's own included; None: all
    attends: bool = True  # False: no attention over tokens at all
    shared: bool = False  # reads an earlier layer's keys and values, and caches none

    @property
    def read(self) -> int:
        """Numbers that are read per token seen."""
        return self.kv_heads * (self.k_dim + self.v_dim)

    @property
    def cached(self) -> int:
        """Numbers held per token."""
        return 0 if self.shared else self.read

    def seen(self, tokens: int) -> int:
        return (
            0 if not self.attends else tokens if self.window is None else min(tokens, self.window)
        )


@dataclass(frozen=True, kw_only=True)
class Shape:
    """All that the estimate needs to know of a model."""

    name: str
    model_type: str
    dtype: str
    element_size: int  # bytes of a weight and of a cached number
    query_heads: int
    qk_dim: int  # of the scores' product, and
    v_dim: int  # of the weighted sum: latent ones for MLA, see `latent`
    hidden: int
    layers: tuple[Layer, ...]
    latent: bool  # MLA: all heads share one cached latent and one rotary key
    parameters: int
    expert_parameters: int  # of these; each token takes `experts_used` of `experts`
    experts: int
    experts_used: int
    layer_parameters: int  # of these; neither the embedding nor the head
    head_parameters: int  # hidden states to logits; may be the embedding's own
    left_out: str = ""  # why weights beside the decoder's are not counted, if they are not

    @property
    def kv_heads(self) -> int:
        return max((layer.kv_heads for layer in self.layers), default=0)

    def kv_bytes(self, context: int) -> int:
        """Bytes that one sequence of `context` tokens holds; windows hold no more than they see."""
        held = (layer.cached * layer.seen(context) for layer in self.layers)
        return self.element_size * sum(held)

    def read_bytes(self, context: int) -> int:
        """Bytes of keys and values that one more token reads."""
        read = (layer.read * layer.seen(context) for layer in self.layers)
        return self.element_size * sum(read)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of a token that all layers still hold."""
        return self.element_size * sum(layer.cached for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        return self.element_size * self.parameters

    def with_kv_heads(self, count: int) -> Shape:
        """The same model with another number of KV heads in each layer that has any."""
        assert not self.latent
        layers = tuple(
            replace(layer, kv_heads=count) if layer.kv_heads else layer for layer in self.layers
        )
        cached = sum(layer.cached for layer in layers) - sum(layer.cached for layer in self.layers)
        # a row of k_proj or v_proj for each cached number
        more = self.hidden * cached
        return replace(
            self,
            layers=layers,
            parameters=self.parameters + more,
            layer_parameters=self.layer_parameters + more,
        )


# layer_types -> the config key of its window; "" for none; None where nothing is cached
WINDOWS: dict[str, str | None] = {
    "full_attention": "",
    "attention": "",
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
    "linear_attention": None,
    "mamba": None,
    "conv": None,
}
EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")
EXPERTS_USED = ("num_experts_per_tok", "top_k_experts")
# what a layer may have in another number than its neighbours
BY_LAYER = ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim", "kv_lora_rank")


def read_shape(path: str, dtype: str | None = None) -> Shape:
    """The shape of a model from its config.json: a folder, the file itself, or a name on the Hub.

    Parameters are those of transformers' own class, built without memory. `dtype` None: the
    config's. Raises ValueError for a config that cannot be read, that is of no decoder, or whose
    layers cache something else than keys and values.
    """
    import hf_attn_patch  # noqa: F401  registers its own model classes
    from hf_attn_converters.io.reading import load_config, reading

    whole = load_config(path)
    with reading(path):
        return _shape(path, whole, dtype)


def _shape(path: str, whole: Any, dtype: str | None) -> Shape:
    config: Any = whole.get_text_config(decoder=True)
    if getattr(whole, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{path}: {whole.model_type} is an encoder-decoder; decoders are estimated"
        )
    auto = _auto_class(whole, config)
    heads = layer_value(config, "num_attention_heads")
    if auto is None or _is_encoder(config) or heads is None:
        raise ValueError(
            f"{path}: {config.model_type} is no decoder with attention, it has no KV cache to "
            "estimate"
        )
    hidden = config.hidden_size
    _check_sizes(path, num_hidden_layers=config.num_hidden_layers, num_attention_heads=heads,
                 hidden_size=hidden, vocab_size=config.vocab_size)  # fmt: skip
    layers = tuple(_layers(path, config, hidden // heads))
    model, left_out = _outline(auto, whole, config)
    latent = layer_value(config, "kv_lora_rank") is not None
    qk_dim = max(layer.k_dim for layer in layers)
    v_dim = max(layer.v_dim for layer in layers)
    if latent:  # scores and sums over the latent, as its papers absorb the projections
        qk_dim, v_dim = v_dim + config.qk_rope_head_dim, v_dim
    experts = _first(config, EXPERTS)
    chosen = _dtype(dtype or getattr(whole, "dtype", None) or getattr(config, "dtype", None))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    decoder = sizes if model.config is config else _decoder_sizes(model)
    ends = {id(m.weight): m.weight.numel() for m in _ends(model)}  # one entry if they are tied
    return Shape(
        name=_name(path),
        model_type=whole.model_type if len(decoder) < len(sizes) else config.model_type,
        dtype=str(chosen).removeprefix("torch."),
        element_size=chosen.itemsize,
        query_heads=heads,
        qk_dim=qk_dim,
        v_dim=v_dim,
        hidden=hidden,
        layers=layers,
        latent=latent,
        parameters=sum(sizes.values()),
        expert_parameters=sum(
            size for name, size in decoder.items() if experts and re.search(r"\bexperts\b", name)
        ),
        experts=experts,
        experts_used=_first(config, EXPERTS_USED),
        layer_parameters=sum(decoder.values()) - sum(ends.values()),
        head_parameters=_ends(model)[-1].weight.numel(),
        left_out=left_out,
    )


def _outline(auto: Any, whole: Any, config: Any) -> tuple[Any, str]:
    """The model without memory, and why its towers are left out, if they are."""
    import transformers

    decoder, left_out = transformers.AutoModelForCausalLM, ""
    with torch.device("meta"):
        if auto is not decoder:
            try:
                return auto.from_config(whole, trust_remote_code=False), left_out
            except ImportError as error:
                if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
                    raise
                left_out = str(error).strip().splitlines()[0]
        return decoder.from_config(config, trust_remote_code=False), left_out


def _auto_class(whole: Any, config: Any) -> Any:
    """What builds the model: with all its towers if it has any; None for no language model."""
    import transformers

    if whole is not config and type(whole) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    return None


def _decoder_sizes(model: Any) -> dict[str, int]:
    """Parameters that each token passes, by name: the decoder's and the head's."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    inside = {id(p) for module in (decoder, head) for p in module.parameters()}
    return {name: p.numel() for name, p in model.named_parameters() if id(p) in inside}


def _first(config: Any, keys: tuple[str, ...]) -> int:
    return next((n for key in keys if (n := layer_value(config, key))), 0)


def _check_sizes(path: str, **sizes: Any) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"cannot read {path}: {name}, {size!r} is no positive number")


def _ends(model: Any) -> tuple[Any, Any]:
    """Input and output embeddings."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def _is_encoder(config: Any) -> bool:
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def _dtype(found: object) -> torch.dtype:
    """transformers' classes are float32 where a config says nothing; checkpoints are bfloat16."""
    chosen = getattr(torch, found, None) if isinstance(found, str) else found
    if found is None:
        return torch.bfloat16
    if not isinstance(chosen, torch.dtype):
        raise ValueError(f"dtype {found!r} is unknown; possible: float32, bfloat16, float16, ...")
    return chosen


def _name(path: str) -> str:
    found = Path(path)
    return found.parent.name if found.name == "config.json" else found.name


def _layers(path: str, config: Any, default_dim: int) -> list[Layer]:
    """`default_dim`: of a head, where a config does not name it."""
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or [_kind_of_all(config)] * count
    if unknown := sorted(set(kinds) - WINDOWS.keys()):
        raise ValueError(
            f"{path}: layers of the kind {', '.join(unknown)} cache something else than keys and "
            f"values; possible kinds: {', '.join(WINDOWS)}"
        )
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    layers = []
    images = set(getattr(config, "cross_attention_layers", None) or ())  # cache no text
    differ = any(len(layer_values(config, name)) > 1 for name in BY_LAYER)
    for i, kind in enumerate(kinds):
        own = config.per_layer_config[i] if differ else config
        key = WINDOWS[kind]
        if key is None or i in images:
            layers.append(Layer(kv_heads=0, k_dim=0, v_dim=0, attends=False))
            continue
        window = getattr(own, key) if key else None
        if getattr(own, "kv_lora_rank", None) is not None:
            # the latent, and the rotary key that all heads share
            sizes = (1, own.qk_rope_head_dim, own.kv_lora_rank)
        else:
            sizes = _sizes(own, kind, getattr(own, "head_dim", None) or default_dim)
        heads, k_dim, v_dim = sizes
        others = i >= count - shared
        layers.append(Layer(kv_heads=heads, k_dim=k_dim, v_dim=v_dim, window=window, shared=others))
    return layers


def _kind_of_all(config: Any) -> str:
    """Without layer_types: a window if the config has one and does not switch it off."""
    on = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    return "sliding_attention" if on else "full_attention"


def _sizes(config: Any, kind: str, head_dim: int) -> tuple[int, int, int]:
    """(KV heads, k_dim, v_dim); Falcon and GPT-BigCode say "one head" in their own way."""
    heads: int = config.num_attention_heads
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1, head_dim, head_dim
    keys = ("num_key_value_heads", "num_kv_heads")
    found = next((n for key in keys if (n := getattr(config, key, None))), heads)
    if kind == "full_attention" and (wide := getattr(config, "global_head_dim", None)):  # Gemma 4
        found = getattr(config, "num_global_key_value_heads", None) or found
        return found, wide, wide
    return found, head_dim, getattr(config, "v_head_dim", None) or head_dim
