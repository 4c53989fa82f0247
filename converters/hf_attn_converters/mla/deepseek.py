"""The form that transformers loads: deepseek_v3, dense in every layer.

Its names beside the attention are those of llama, mistral and qwen2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families import Target
from ..families.layouts import Role
from .factors import Factors
from .quiet_norm import quiet_norm
from .rotation import Rotation

_TASKS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
TARGET = Target(
    model_type="deepseek_v3",
    architectures={
        family + task: "DeepseekV3" + task
        for family in ("Llama", "Mistral", "Qwen2")
        for task in _TASKS
    },
    obsolete=r".*\.rotary_emb\.inv_freq",
    rotary_path="model.rotary_emb",
    drops=(
        "head_dim", "mlp_bias", "rope_theta", "rope_scaling", "partial_rotary_factor",
        "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
        "pretraining_tp", "auto_map",
    ),
)  # fmt: skip

# Read from the source's configuration, whose defaults are not DeepSeek's.
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_dropout",
)  # fmt: skip

_Q = "self_attn.q_proj.weight"
_Q_A, _Q_A_BIAS = "self_attn.q_a_proj.weight", "self_attn.q_a_proj.bias"
_Q_NORM, _Q_B = "self_attn.q_a_layernorm.weight", "self_attn.q_b_proj.weight"
_KV_A, _KV_A_BIAS = (f"self_attn.kv_a_proj_with_mqa.{kind}" for kind in ("weight", "bias"))
_KV_NORM, _KV_B = "self_attn.kv_a_layernorm.weight", "self_attn.kv_b_proj.weight"
_O, _O_BIAS = "self_attn.o_proj.weight", "self_attn.o_proj.bias"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the attention of the result. Letters as in the papers: N, V = D of the source."""

    hidden: int  # E
    heads: int  # H
    dim: int  # D: of a head's values, and of its queries that stand still
    rank: int  # R: of the latent, its constant column included
    rope: int  # P: of the rotated key
    q_biased: bool  # queries with a bias go through a latent too: no other place has one

    @property
    def q_rank(self) -> int | None:
        return self.heads * self.dim + 1 if self.q_biased else None

    def shapes(self, role: Role) -> dict[str, tuple[int, ...]]:
        """What stands in the place of a projection of the source: path below the layer -> shape."""
        queries, values = self.heads * (self.dim + self.rope), self.heads * self.dim
        by_role: dict[Role, dict[str, tuple[int, ...]]] = {
            "q": {_Q: (queries, self.hidden)},
            "k": {
                _KV_A: (self.rank + self.rope, self.hidden),
                _KV_A_BIAS: (self.rank + self.rope,),
                _KV_NORM: (self.rank,),
            },
            "v": {_KV_B: (2 * values, self.rank)},
            "o": {_O: (self.hidden, values), _O_BIAS: (self.hidden,)},
        }
        if self.q_rank is not None:
            by_role["q"] = {
                _Q_A: (self.q_rank, self.hidden),
                _Q_A_BIAS: (self.q_rank,),
                _Q_NORM: (self.q_rank,),
                _Q_B: (queries, self.q_rank),
            }
        return by_role[role]


def stored(
    sizes: Sizes, f: Factors, *, q: Tensor, q_bias: Tensor | None, o: Tensor,
    o_bias: Tensor | None, scales: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """A layer's tensors by their paths, in float64.

    Args:
        q: ``[H, D, E]`` with q_bias ``[H, D]``, o ``[H, D, E]`` with o_bias ``[E]``: the source's.
        scales: ``[E]``, of the RMSNorm in front of the attention.
    """
    kv = quiet_norm(f.latent, None, scales)
    repeats = sizes.heads // len(f.keys)
    up = torch.cat([f.keys, f.values], dim=1) * kv.undo  # [G, 2 D, R - 1]
    up = torch.cat([up.new_zeros(*up.shape[:2], 1), up], dim=-1)
    rope_bias = f.rotated[:, sizes.hidden :].sum(-1)  # of no column or one
    found = {
        _KV_A: torch.cat([kv.weight, f.rotated[:, : sizes.hidden]]),
        _KV_A_BIAS: torch.cat([kv.bias, rope_bias]),
        _KV_NORM: kv.norm,
        _KV_B: up.repeat_interleave(repeats, dim=0).flatten(0, 1),
        _O: o.flatten(0, 1).mT,
        _O_BIAS: f.o_bias if o_bias is None else f.o_bias + o_bias,
    }
    if q_bias is None:
        found[_Q] = (f.turn @ q).flatten(0, 1)
    else:
        low = quiet_norm(q.flatten(0, 1), q_bias.flatten(), scales)
        back = torch.block_diag(*f.turn) * low.undo  # [H (D + P), H D]
        found |= {
            _Q_A: low.weight,
            _Q_A_BIAS: low.bias,
            _Q_NORM: low.norm,
            _Q_B: torch.cat([back.new_zeros(len(back), 1), back], dim=1),
        }
    return found


def config_of(
    source: Mapping[str, Any], known: Any, sizes: Sizes, rotation: Rotation
) -> dict[str, Any]:
    """config.json of the result.

    Args:
        source: the source's config.json; known: the same as transformers reads it.
    """
    kept = {key: value for key, value in source.items() if key not in TARGET.drops}
    return kept | {name: getattr(known, name) for name in _SHARED} | {
        "model_type": TARGET.model_type,
        "num_key_value_heads": sizes.heads,
        "kv_lora_rank": sizes.rank,
        "q_lora_rank": sizes.q_rank,
        "qk_nope_head_dim": sizes.dim,
        "qk_rope_head_dim": sizes.rope,
        "v_head_dim": sizes.dim,
        "attention_bias": True,
        "rope_interleave": False,
        "rope_parameters": _rope(known, sizes, rotation),
        "first_k_dense_replace": known.num_hidden_layers,
        "num_nextn_predict_layers": 0,
    }  # fmt: skip


def _rope(known: Any, sizes: Sizes, rotation: Rotation) -> dict[str, Any]:
    """The plain kind where the frequencies are its own, else each one by itself."""
    slots = rotation.slots
    theta = known.rope_parameters["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, sizes.rope, 2, dtype=torch.float) / sizes.rope)
    if torch.allclose(slots, plain, rtol=1e-6, atol=0):
        return {"rope_type": "default", "rope_theta": theta}
    # longrope divides the plain frequencies by a list of factors: with a base of 1 these are 1 / w.
    factors = [_inverse(w) for w in slots]
    return {
        "rope_type": "longrope",
        "rope_theta": 1.0,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": known.max_position_embeddings,
        "short_factor": factors,
        "long_factor": factors,
    }


def _inverse(frequency: Tensor) -> float:
    """x so that 1 / x is the frequency in float32, to the last bit where there is such an x."""
    near = 1.0 / frequency
    around = (torch.tensor(t, dtype=near.dtype) for t in (0.0, torch.inf))
    for x in (near, *(torch.nextafter(near, end) for end in around)):
        if 1.0 / x == frequency:
            return float(x)
    return float(near)
