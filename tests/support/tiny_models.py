"""Tiny random models, one literal each, and what the tests do with all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import hf_attn_patch  # noqa: F401  (registers the implementations)

VOCAB = 61
PAD = 0
COMMON = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}
LLAMA_LIKE = COMMON | {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


@dataclass(frozen=True, kw_only=True, eq=False)  # by identity, so that it can be a cache key
class TinyModel:
    """A model class, the config that makes it tiny, and what it can do."""

    id: str
    model: str  # name in transformers
    config: str
    arguments: dict[str, Any] = field(default_factory=dict)
    kind: str = "causal"  # or "masked" (encoder), "seq2seq"
    right_padded: bool = True
    packed: bool = True
    packed_by_position: bool = True  # transformers passes its position_ids to the mask
    oracle: str = "eager"
    static: bool = True
    mask_4d: bool = True


MODELS: tuple[TinyModel, ...] = (
    TinyModel(id="llama", model="LlamaForCausalLM", config="LlamaConfig", arguments=LLAMA_LIKE),
    TinyModel(
        id="mistral",
        model="MistralForCausalLM",
        config="MistralConfig",
        arguments=LLAMA_LIKE | {"sliding_window": 5},
    ),
    TinyModel(id="qwen3", model="Qwen3ForCausalLM", config="Qwen3Config", arguments=LLAMA_LIKE),
    TinyModel(  # window on every second layer, softcap
        id="gemma2",
        model="Gemma2ForCausalLM",
        config="Gemma2Config",
        arguments=LLAMA_LIKE
        | {"sliding_window": 5, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    ),
    TinyModel(
        id="gemma3",
        model="Gemma3ForCausalLM",
        config="Gemma3TextConfig",
        arguments=LLAMA_LIKE
        | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    TinyModel(  # sinks (s_aux) and windows
        id="gpt_oss",
        model="GptOssForCausalLM",
        config="GptOssConfig",
        packed_by_position=False,
        arguments=LLAMA_LIKE
        | {"sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    TinyModel(
        id="gpt2",
        model="GPT2LMHeadModel",
        config="GPT2Config",
        arguments=COMMON | {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
    TinyModel(
        id="phi",
        model="PhiForCausalLM",
        config="PhiConfig",
        arguments={k: v for k, v in LLAMA_LIKE.items() if k != "head_dim"},
    ),
    TinyModel(  # query and key wider than value
        id="deepseek_v3",
        model="DeepseekV3ForCausalLM",
        config="DeepseekV3Config",
        arguments={k: v for k, v in LLAMA_LIKE.items() if k != "head_dim"}
        | {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
        },
    ),
    TinyModel(
        id="bert",
        model="BertForMaskedLM",
        config="BertConfig",
        kind="masked",
        packed=False,
        arguments={
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    TinyModel(  # window of 2 to either side on the second layer
        id="modernbert",
        model="ModernBertForMaskedLM",
        config="ModernBertConfig",
        kind="masked",
        packed=False,
        mask_4d=False,
        arguments={
            "vocab_size": VOCAB,
            "pad_token_id": PAD,
            "hidden_size": 48,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "global_attn_every_n_layers": 2,
            "local_attention": 4,
            "max_position_embeddings": 64,
            "reference_compile": False,
        },
    ),
    TinyModel(
        id="bart",
        model="BartForConditionalGeneration",
        config="BartConfig",
        kind="seq2seq",
        packed=False,
        mask_4d=False,
        arguments={
            "vocab_size": VOCAB,
            "d_model": 48,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "max_position_embeddings": 64,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
    ),
    TinyModel(  # learned position bias
        id="t5",
        model="T5ForConditionalGeneration",
        config="T5Config",
        kind="seq2seq",
        packed=False,
        mask_4d=False,
        arguments={
            "vocab_size": VOCAB,
            "d_model": 48,
            "d_kv": 12,
            "d_ff": 40,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": PAD,
            "decoder_start_token_id": PAD,
            "eos_token_id": 2,
        },
    ),
)

FALCON = COMMON | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 128,
}
FALCONS: tuple[TinyModel, ...] = (
    TinyModel(
        id="falcon_gqa",
        model="FalconForCausalLM",
        config="FalconConfig",
        packed=False,
        arguments=FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    ),
    TinyModel(
        id="falcon_mqa",
        model="FalconForCausalLM",
        config="FalconConfig",
        packed=False,
        arguments=FALCON | {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    ),
    TinyModel(
        id="falcon_alibi",
        model="FalconForCausalLM",
        config="FalconConfig",
        packed=False,
        oracle="sdpa",  # transformers' eager adds ALiBi twice, in the mask and to the scores
        static=False,  # transformers' own ALiBi does not fit a static cache
        mask_4d=False,
        arguments=FALCON
        | {
            "new_decoder_architecture": False,
            "multi_query": False,
            "alibi": True,
            "parallel_attn": False,
            "bias": True,
        },
    ),
)

EVERY = (*MODELS, *FALCONS)


def having(condition: Callable[[TinyModel], bool]) -> list[Any]:
    """pytest parameters for the models that meet a condition."""
    import pytest

    return [pytest.param(spec, id=spec.id) for spec in EVERY if condition(spec)]


def is_causal(spec: TinyModel) -> bool:
    return spec.kind == "causal"


@functools.cache
def build(spec: TinyModel, implementation: str) -> Any:
    """The model in eval mode; the same weights whatever the implementation. Do not change it."""
    config = getattr(transformers, spec.config)(**spec.arguments)
    model = getattr(transformers, spec.model)._from_config(
        config, attn_implementation=implementation, dtype=torch.float32
    )
    _fill(model)
    return model.eval()


def _fill(model: nn.Module) -> None:
    # far from the usual 0.02: attention has to matter, or a wrong mask would not show
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 0.15 if parameter.dim() > 1 else 0.3
        noise = torch.randn(parameter.shape, generator=generator) * scale
        with torch.no_grad():
            parameter.copy_(noise + (1.0 if _is_norm_like(parameter) else 0.0))
    if hasattr(model, "tie_weights"):
        model.tie_weights()


def _is_norm_like(parameter: Tensor) -> bool:
    return parameter.dim() == 1 and bool((parameter == 1).all())


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """``[batch, length]`` ids, none of them padding or end of text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def padded(side: str, length: int = 12, lengths: tuple[int, ...] = (12, 7, 3)) -> dict[str, Tensor]:
    """Ids and mask of rows of different lengths, padded on one side."""
    ids = tokens(len(lengths), length)
    mask = torch.zeros(len(lengths), length, dtype=torch.long)
    for row, n in enumerate(lengths):
        if side == "left":
            mask[row, length - n :] = 1
        else:
            mask[row, :n] = 1
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def positions(mask: Tensor) -> Tensor:
    """Position ids that start at each row's first token."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def inputs_for(spec: TinyModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the forward call of this kind of model takes beside."""
    if spec.kind == "seq2seq":
        rows = inputs["input_ids"].shape[0]
        return inputs | {"decoder_input_ids": tokens(rows, 6, seed=2)}
    return inputs


def logits(spec: TinyModel, implementation: str, inputs: dict[str, Any]) -> Tensor:
    """``[B, S, vocabulary]`` without gradient."""
    with torch.no_grad():
        return build(spec, implementation)(**inputs).logits


def worst(ours: Tensor, theirs: Tensor, mask: Tensor | None = None) -> float:
    """Largest difference in units of the spread of `theirs`, where `mask` is 1."""
    gap = (ours - theirs).abs()
    if mask is not None:
        gap = gap[mask.bool()]
    return float(gap.max() / theirs.std())


TOLERANCE = (
    2e-5  # float32, two layers; a wrong mask gives more than 1e-2 (see the negative control)
)


def assert_close(ours: Tensor, theirs: Tensor, mask: Tensor | None = None) -> None:
    gap = worst(ours, theirs, mask)
    assert gap < TOLERANCE, f"logits differ by {gap:.2e} of their spread, allowed {TOLERANCE:.0e}"


def generate(
    spec: TinyModel, implementation: str, inputs: dict[str, Tensor], **options: Any
) -> Tensor:
    """New tokens ``[B, 10]`` of greedy generation, or what the options make of it."""
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False} | options
    out = build(spec, implementation).generate(**inputs, **settings)
    return out if spec.kind == "seq2seq" else out[:, inputs["input_ids"].shape[1] :]
