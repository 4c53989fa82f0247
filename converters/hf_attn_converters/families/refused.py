"""Families that transformers holds with all KV heads only: known, located, and refused."""

from __future__ import annotations

from .layouts import Layout, fused, separate
from .spec import FamilySpec, Rotary

SPECS = (
    FamilySpec(
        model_type="gpt_neox",
        layout=Layout(
            slots=fused("attention.query_key_value", "attention.dense", pack="grouped"),
            prefixes=("gpt_neox.",),
        ),
        kv_heads_key=None,
        head_dim_key=None,
        targets=(),
        refusal="transformers' GPT-NeoX always splits its query_key_value into three equal parts, "
        "and no other class there computes the same network",
        tied=(("embed_out.weight", "gpt_neox.embed_in.weight"),),
        layers_path="gpt_neox.layers",
        attention_path="attention",
        rotary=Rotary(share=0.25, share_keys=("partial_rotary_factor", "rotary_pct")),
    ),
    FamilySpec(
        model_type="opt",
        layout=Layout(
            slots=separate(*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out"))),
            layer=("decoder.layers.{}",),
        ),
        kv_heads_key=None,
        head_dim_key=None,
        targets=(),
        refusal="transformers' OPT makes k_proj and v_proj as wide as q_proj",
        tied=(("lm_head.weight", "model.decoder.embed_tokens.weight"),),
        layers_path="model.decoder.layers",
        rotary=None,
    ),
    FamilySpec(
        model_type="t5",
        layout=Layout(
            slots=separate("q", "k", "v", "o"),
            layer=(
                "encoder.block.{}.layer.0.SelfAttention",
                "decoder.block.{}.layer.0.SelfAttention",
                "decoder.block.{}.layer.1.EncDecAttention",
            ),
            prefixes=("transformer.",),  # of T5ForTokenClassification
        ),
        heads_key="num_heads",
        kv_heads_key=None,
        head_dim_key="d_kv",
        layers_key="num_layers",
        hidden_key="d_model",
        targets=(),
        refusal="transformers' T5 has k and v as wide as q, and a position bias for each head",
        tied=(
            ("encoder.embed_tokens.weight", "shared.weight"),
            ("decoder.embed_tokens.weight", "shared.weight"),
        ),
        layers_path="encoder.block",
        attention_path="layer.0.SelfAttention",
        auto_class="AutoModelForSeq2SeqLM",
        rotary=None,
    ),
)
