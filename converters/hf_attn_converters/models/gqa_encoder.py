"""What the encoders with grouped KV heads share: bidirectional attention, and the exchange of
transformers' attention modules for narrower ones.

Letters: B batch, S tokens, Hq query heads, Hkv KV heads, D head_dim. Query head h reads KV head
h // (Hq / Hkv), as everywhere in transformers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def check_kv_heads(query_heads: int, kv_heads: int) -> None:
    """Raises ValueError unless the KV heads divide the query heads."""
    if kv_heads < 1 or query_heads % kv_heads:
        raise ValueError(
            f"num_key_value_heads={kv_heads} cannot serve num_attention_heads={query_heads}; "
            "it must divide them"
        )


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out: query [B, Hq, S, D], key and value [B, Hkv, S, D] to [B, S, Hq, D]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def narrow_kv(module: Any, config: Any) -> None:
    """Give a stock self-attention module KV projections for the heads that the config names."""
    width = config.num_key_value_heads * module.attention_head_size
    module.num_key_value_heads = config.num_key_value_heads
    # what transformers' attention functions look at to know how often a KV head is read
    module.num_key_value_groups = module.num_attention_heads // config.num_key_value_heads
    module.key = nn.Linear(config.hidden_size, width)
    module.value = nn.Linear(config.hidden_size, width)


def attend(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    update_cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """[B, S, hidden] to [B, S, Hq * D] and, if they were computed, the attention weights."""
    shape = (*hidden_states.shape[:-1], -1, module.attention_head_size)
    query = module.query(hidden_states).view(shape).transpose(1, 2)
    key = module.key(hidden_states).view(shape).transpose(1, 2)
    value = module.value(hidden_states).view(shape).transpose(1, 2)
    if update_cache is not None:
        key, value = update_cache(key, value)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention
    )
    output, weights = attention(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout if module.training else 0.0,
        scaling=module.scaling,
        **kwargs,
    )
    return output.reshape(*hidden_states.shape[:-1], -1).contiguous(), weights


class GqaSelfAttention:
    """BERT's and RoBERTa's self-attention with grouped KV heads; put before the stock class."""

    def __init__(self, config: Any, is_causal: bool = False, layer_idx: int | None = None) -> None:
        super().__init__(config, is_causal=is_causal, layer_idx=layer_idx)  # type: ignore[call-arg]
        narrow_kv(self, config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,  # up to transformers 5.23
        cache: Any = None,  # the same from 5.24 on
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        me: Any = self
        update = None
        cache = past_key_values if cache is None else cache
        if cache is not None:  # used as a decoder
            own = getattr(cache, "self_attention_cache", cache)
            update = lambda key, value: own.update(key, value, me.layer_idx)  # noqa: E731
        return attend(
            self, hidden_states, attention_mask, me.dropout.p, update_cache=update, **kwargs
        )


class GqaModel:
    """Put before one of transformers' model classes: builds it, then exchanges its attention."""

    # Said here too, because the modelling file is where it is looked for.
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    stock_attention: type[nn.Module]  # set by each family
    exchange: Callable[[Any, Any], nn.Module]  # (stock module, config) -> ours

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        me: Any = self
        for parent in list(me.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is self.stock_attention:
                    setattr(parent, name, type(self).exchange(child, config))
        me.post_init()  # gives the new modules transformers' initial values
