"""Families whose q, k and v lie in one tensor."""

from __future__ import annotations

from dataclasses import replace

from .layouts import Layout, fused
from .spec import Condition, FamilySpec, Rotary, Target

_PHI3 = Layout(slots=fused("self_attn.qkv_proj", "self_attn.o_proj", pack="stacked"))
_GPT2 = Layout(
    slots=fused("attn.c_attn", "attn.c_proj", pack="stacked", input_major=True),
    layer=("h.{}",),
    prefixes=("transformer.",),
)
_BIGCODE = Layout(
    slots=fused("attn.c_attn", "attn.c_proj", pack="grouped"),
    layer=("h.{}",),
    prefixes=("transformer.",),
)
_FALCON = Layout(
    slots=fused("self_attention.query_key_value", "self_attention.dense", pack="grouped"),
    layer=("h.{}",),
    prefixes=("transformer.",),
)

# The new architecture runs attention and MLP side by side and cannot do otherwise. With one layer
# norm for both it computes what the old one did; without the key it would expect two.
_FALCON_ANY = Target(
    when=(Condition("parallel_attn", True, True),),
    kv_heads_key="num_kv_heads",
    head_dim_key=None,  # a property of the config class: always hidden size / query heads
    config={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    drops=("auto_map",),  # code that the folder brings knows the form that it left
)
_FALCON_ONE = Target(
    holds="one",
    kv_heads_key="num_kv_heads",
    head_dim_key=None,
    config={"new_decoder_architecture": False, "multi_query": True},
    drops=("auto_map",),
)
_FALCON_ALL = replace(_FALCON_ONE, holds="all", config={**_FALCON_ONE.config, "multi_query": False})

_FALCON_40B = FamilySpec(
    model_type="falcon",
    layout=_FALCON,
    when=(Condition("new_decoder_architecture", True, False),),
    kv_heads_key="num_kv_heads",
    head_dim_key=None,
    targets=(Target(kv_heads_key="num_kv_heads", head_dim_key=None),),
    tied=(("lm_head.weight", "transformer.word_embeddings.weight"),),
    layers_path="transformer.h",
    attention_path="self_attention",
    rotary=Rotary(unless="alibi"),
    heads_numbered_by="alibi",
)
_FALCON_7B = replace(
    _FALCON_40B,
    name="falcon_mqa",
    when=(
        Condition("new_decoder_architecture", False, False),
        Condition("multi_query", True, True),
    ),
    kv_heads_key=None,
    kv_heads_without_key="one",
    targets=(_FALCON_ANY, _FALCON_ALL),
    refusal="transformers' Falcon takes one or all where attention and MLP follow each other "
    "(parallel_attn is false)",
)
_FALCON_RW = replace(
    _FALCON_7B,
    name="falcon_mha",
    when=(
        Condition("new_decoder_architecture", False, False),
        Condition("multi_query", False, True),
    ),
    kv_heads_without_key="all",
    targets=(_FALCON_ONE, _FALCON_ANY),
)

# GPT-2 has no KV heads of its own; GPT-BigCode is the same network with Linear for Conv1D.
_BIGCODE_MODELS = {
    f"GPT2{old}": f"GPTBigCode{new}"
    for old, new in {
        "Model": "Model",
        "LMHeadModel": "ForCausalLM",
        "ForSequenceClassification": "ForSequenceClassification",
        "ForTokenClassification": "ForTokenClassification",
    }.items()
}
_BIGCODE_ONE = Target(
    holds="one", kv_heads_key=None, head_dim_key=None, config={"multi_query": True}
)
_BIGCODE_ALL = replace(_BIGCODE_ONE, holds="all", config={"multi_query": False})


def _from_gpt2(target: Target) -> Target:
    return replace(
        target,
        as_is=True,
        model_type="gpt_bigcode",
        layout=_BIGCODE,
        defaults={"activation_function": "gelu_new", "tokenizer_class": "GPT2Tokenizer"},
        architectures=_BIGCODE_MODELS,
        drops=("auto_map",),
        transposed=r"(?:transformer\.)?h\.[0-9]+\.mlp\.c_(?:fc|proj)\.weight",
        # the causal mask, which checkpoints of transformers 3 and before carry
        obsolete=r"(?:transformer\.)?h\.[0-9]+\.attn\.(?:masked_)?bias",
    )


_GPT2_SPEC = FamilySpec(
    model_type="gpt2",
    layout=_GPT2,
    needs=(
        Condition("add_cross_attention", False, False),
        Condition("scale_attn_by_inverse_layer_idx", False, False),  # unknown to GPT-BigCode
    ),
    heads_key="n_head",
    kv_heads_key=None,
    head_dim_key=None,
    layers_key="n_layer",
    hidden_key="n_embd",
    targets=(_from_gpt2(_BIGCODE_ONE), _from_gpt2(_BIGCODE_ALL)),
    refusal="transformers' GPT-BigCode, GPT-2's way to fewer KV heads, takes one or all",
    tied=(("lm_head.weight", "transformer.wte.weight"),),
    layers_path="transformer.h",
    attention_path="attn",
    rotary=None,
)
_BIGCODE_MQA = replace(
    _GPT2_SPEC,
    model_type="gpt_bigcode",
    layout=_BIGCODE,
    when=(Condition("multi_query", True, True),),
    needs=(Condition("add_cross_attention", False, False),),
    kv_heads_without_key="one",
    targets=(_BIGCODE_ALL,),
    refusal="transformers' GPT-BigCode takes one or all",
)
_BIGCODE_MHA = replace(
    _BIGCODE_MQA,
    name="gpt_bigcode_mha",
    when=(Condition("multi_query", False, True),),
    kv_heads_without_key="all",
    targets=(_BIGCODE_ONE,),
)

SPECS = (
    FamilySpec(
        model_type="phi3",
        layout=_PHI3,
        rotary=Rotary(share_keys=("partial_rotary_factor",)),
    ),
    _FALCON_40B,
    _FALCON_7B,
    _FALCON_RW,
    _GPT2_SPEC,
    _BIGCODE_MQA,
    _BIGCODE_MHA,
)
