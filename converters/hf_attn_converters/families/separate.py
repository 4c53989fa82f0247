"""Families with q, k, v and o apart that hold any number of KV heads themselves."""

from __future__ import annotations

from .layouts import Layout, separate
from .spec import Condition, FamilySpec, Rotary

_PROJECTIONS = tuple(f"self_attn.{role}_proj" for role in "qkvo")
_LLAMA = Layout(slots=separate(*_PROJECTIONS))
_PHI = Layout(slots=separate(*_PROJECTIONS[:3], "self_attn.dense"))
_OLMO2 = Layout(slots=separate(*_PROJECTIONS, norms=("self_attn.q_norm", "self_attn.k_norm")))
_GEMMA3 = Layout(
    slots=_LLAMA.slots,
    # as transformers 5 saves it, as it did before 4.52, and the language model alone
    prefixes=("model.language_model.", "language_model.model.", "language_model.", "model."),
)

SPECS = (
    FamilySpec(
        model_type="llama", layout=_LLAMA, latents=(Condition("mlp_bias", False, absent=False),)
    ),
    FamilySpec(
        model_type="mistral",
        layout=_LLAMA,
        absent_kv_heads=8,
        latents=(Condition("sliding_window", None, absent=4096, null_counts=True),),
    ),
    FamilySpec(model_type="mixtral", layout=_LLAMA, absent_kv_heads=8),
    FamilySpec(
        model_type="qwen2",
        layout=_LLAMA,
        absent_kv_heads=32,
        latents=(Condition("use_sliding_window", False, absent=False),),
    ),
    # q_norm and k_norm have one scale for all heads, [head_dim]: any number of heads fits them
    FamilySpec(
        model_type="qwen3", layout=_LLAMA, absent_kv_heads=32, absent_head_dim=128, k_free=False
    ),
    FamilySpec(model_type="gemma", layout=_LLAMA, absent_kv_heads=16, absent_head_dim=256),
    FamilySpec(model_type="gemma2", layout=_LLAMA, absent_kv_heads=4, absent_head_dim=256),
    FamilySpec(
        model_type="gemma3_text",
        layout=_LLAMA,
        absent_heads=8,
        absent_kv_heads=4,
        absent_head_dim=256,
        k_free=False,
    ),
    FamilySpec(
        model_type="gemma3",
        layout=_GEMMA3,
        nested="text_config",
        absent_heads=8,
        absent_kv_heads=4,
        absent_head_dim=256,
        k_free=False,
        tied=(
            ("lm_head.weight", "model.language_model.embed_tokens.weight"),
            ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
        ),
        layers_path="model.language_model.layers",
    ),
    FamilySpec(
        model_type="phi",
        layout=_PHI,
        rotary=Rotary(share=0.5, share_keys=("partial_rotary_factor",)),
        k_bound_by="qk_layernorm",
    ),
    FamilySpec(model_type="starcoder2", layout=_LLAMA, absent_kv_heads=2),
    # one norm over all heads of k, whose scales go with the heads; the mean of squares of
    # repeated heads is that of the heads, so expanding stays exact
    FamilySpec(model_type="olmo2", layout=_OLMO2, k_free=False),
)
