"""Falcon: its attention is a class chosen from a plain dict, so ours is put into that dict.

transformers' own repeats K and V to every query head before it caches them; this one caches only
the heads that exist (16 times less for falcon-40b). Three layouts of the fused projection:

=======================  ====================================  =====================
``new_decoder_...``      ``[kv heads, group + 2, head_dim]``   GQA (falcon-40b, 180b)
``multi_query``          ``[q heads + 2, head_dim]``           MQA (falcon-7b)
neither                  ``[heads, 3, head_dim]``              MHA (falcon-rw, ALiBi)
=======================  ====================================  =====================
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

NOT_BATCHED = (
    "Falcon takes every name with 'flash' for its own FlashAttention class, and its layers drop "
    "what continuous batching passes to them: generate_batch serves it with no implementation"
)


def install(name: str) -> None:
    """Let Falcon models be built with ``attn_implementation=name``."""
    _classes().setdefault(name, _attention_class(name))


def prepare(model: Any) -> None:
    """Let a Falcon model take cu_seq_lens_q, which its own code drops: as positions, once."""
    if not any(hook is _positions_of_documents for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_positions_of_documents, with_kwargs=True)


def _positions_of_documents(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: cu_seq_lens_q of a row becomes position_ids that start over."""
    from ..attention import packing

    offsets = kwargs.get("cu_seq_lens_q")
    # the layers themselves are asked: the table forgets a name that is unregistered
    if offsets is None or not any(type(m).__name__.startswith(CLASS_OF) for m in model.modules()):
        return None
    if "position_ids" not in signature(type(model).forward).parameters:
        raise ValueError(
            f"{type(model).__name__} does not hand packed sequences (cu_seq_lens_q) on to its "
            "layers: pad the batch instead"
        )
    positions = packing.positions(offsets)
    given = kwargs.get("position_ids")
    if given is not None and not torch.equal(given.to(positions), positions):
        raise ValueError(
            "Falcon is told of packed sequences by position_ids, and those given are not the ones "
            "of cu_seq_lens_q, which start at 0 in each sequence: leave position_ids out"
        )
    return args, kwargs | {"position_ids": positions}


def remove(name: str) -> None:
    """Take the name out again; models already built keep working."""
    import sys

    if "transformers.models.falcon.modeling_falcon" in sys.modules:
        _classes().pop(name, None)


def _classes() -> dict[str, Any]:
    from transformers.models.falcon import modeling_falcon

    from ..transformers_compat import private_names

    for name in ("FALCON_ATTENTION_CLASSES", "FalconAttention", "apply_rotary_pos_emb"):
        private_names.require(f"{modeling_falcon.__name__}.{name}")
    classes: dict[str, Any] = modeling_falcon.FALCON_ATTENTION_CLASSES
    return classes


def split_heads(fused: Tensor, kv_heads: int, head_dim: int, interleaved: bool) -> list[Tensor]:
    """Fused projection ``[B, S, features]`` to q ``[B, Hq, S, D]``, k and v ``[B, Hkv, S, D]``.

    Args:
        interleaved: each KV head stands behind its own group of query heads (GQA and MHA); else all
            query heads come first (MQA).
    """
    batch, length, _ = fused.shape
    groups = kv_heads if interleaved else 1
    per_group = fused.view(batch, length, groups, -1, head_dim)
    parts = per_group.split([per_group.shape[3] - 2, 1, 1], dim=3)
    return [part.flatten(2, 3).transpose(1, 2) for part in parts]


CLASS_OF = "FalconAttention_"  # and the implementation's name: one class each


def __getattr__(attribute: str) -> Any:
    """The attention classes, made when asked for: a pickled model asks for them by name."""
    from ..transformers_compat.tables import interfaces

    (_, attentions), _ = interfaces()
    name = attribute.removeprefix(CLASS_OF)
    if name == attribute or name not in attentions:
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    return _attention_class(name)


@cache
def _attention_class(name: str) -> type:
    # made late: importing Falcon's modelling file costs seconds that only Falcon's users should pay
    from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

    from ..attention import packing
    from ..attention.call import Call
    from ..attention.dense import documents_of, run
    from ..attention.weights import attention_weights
    from ..swa_config import OWN_WINDOWS, required

    class HfAttnFalconAttention(FalconAttention):
        """FalconAttention over the kernels; same weights, a cache of KV heads only."""

        def forward(
            self,
            hidden_states: Tensor,
            alibi: Tensor | None,
            attention_mask: Tensor | None,
            position_ids: Tensor | None = None,
            layer_past: Any = None,
            use_cache: bool = False,
            output_attentions: bool = False,
            position_embeddings: tuple[Tensor, Tensor] | None = None,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor | None]:
            """hidden_states ``[B, Q, hidden]``; alibi ``[B * H, 1, K]``; same shape back."""
            interleaved = bool(self.new_decoder_architecture or not self.multi_query)
            kv_heads = int(self.num_kv_heads or self.num_heads)
            q, k, v = split_heads(
                self.query_key_value(hidden_states), kv_heads, self.head_dim, interleaved
            )
            if alibi is None:
                assert position_embeddings is not None
                q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
            if layer_past is not None:
                k, v = layer_past.update(k, v, self.layer_idx)
            settings = required(self.config) if name == "triton_swa" else OWN_WINDOWS
            told = None
            if packing.may_be_packed(position_ids, q.shape[0], q.shape[2]):
                told = documents_of(position_ids, attention_mask, q, k)
            offsets, longest = (None, 0) if told is None else told
            call = Call(
                query=q,
                key=k,
                value=v,
                mask=attention_mask,
                causal=self.is_causal,
                window=settings.narrow(None),
                sinks=settings.sinks,
                dropout=self._dropout(alibi),
                position_bias=self._bias(alibi, attention_mask, q.shape[0]),
                cu_seqlens_q=offsets,
                cu_seqlens_k=offsets,
                max_seqlen_q=longest,
                max_seqlen_k=longest,
            )
            weights = attention_weights(call) if output_attentions else None
            return self.dense(run(call).flatten(2)), weights

        def _dropout(self, alibi: Tensor | None) -> float:
            # the stock layer drops attention weights only beside ALiBi
            active = self.training and alibi is not None
            return float(self.attention_dropout.p) if active else 0.0

        def _bias(self, alibi: Tensor | None, mask: Tensor | None, batch: int) -> Tensor | None:
            if alibi is None or (mask is not None and mask.is_floating_point()):
                return None  # a dense mask arrives with ALiBi already in it
            # [B, H, 1, K]: slope times key position, for which rounding must be the stock layer's
            bias = alibi.view(batch, self.num_heads, 1, -1).to(torch.float32)
            return bias * self.inv_norm_factor

    # where a pickle finds it again: see __getattr__
    HfAttnFalconAttention.__qualname__ = HfAttnFalconAttention.__name__ = CLASS_OF + name
    return HfAttnFalconAttention
