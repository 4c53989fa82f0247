"""Tiny random models that cache latents, and what the tests of ``triton_mla`` do with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import LLAMA_LIKE, TinyModel, padded, tokens
from torch import Tensor

from hf_attn_patch.transformers_compat import latent_layers as adapter

OURS = "triton_mla"
LATENTS = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
SMALL = {k: v for k, v in LLAMA_LIKE.items() if k != "head_dim"} | LATENTS
EXPERTS = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


def spec(name: str, **arguments: Any) -> TinyModel:
    return TinyModel(
        id=name,
        model=f"{name}ForCausalLM",
        config=f"{name}Config",
        arguments=SMALL | arguments,
    )


V3 = spec("DeepseekV3", q_lora_rank=16, **EXPERTS)
SPECS = [
    pytest.param(s, id=s.id)
    for s in (
        spec("DeepseekV2", q_lora_rank=None, **EXPERTS),
        V3,
        spec("MiniCPM3", q_lora_rank=16),
        spec("Glm4MoeLite", q_lora_rank=16, mlp_layer_types=["dense", "sparse"], **EXPERTS),
    )
]


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
    "partial_rotary_factor": 1 / 3,
}
# one linear layer and one of latents
LINEAR = {"q_lora_rank": None, "layer_types": ["linear_attention", "full_attention"]}
LONGCAT = {
    "head_dim": 8,
    "num_layers": 2,
    "ffn_hidden_size": 32,
    "expert_ffn_hidden_size": 16,
    "moe_topk": 2,
    "n_routed_experts": 4,
    "zero_expert_num": 1,
}
OTHERS = [
    pytest.param(s, id=s.id)
    for s in (
        spec("Youtu", q_lora_rank=16),
        spec("AXK1", q_lora_rank=16, **EXPERTS),
        spec("Mistral4", q_lora_rank=16, rope_parameters=YARN, **EXPERTS),
        spec("LongcatFlash", q_lora_rank=16, **LONGCAT),
        spec("KimiLinear", **EXPERTS, **LINEAR),
    )
]


class Expanding:
    """Counts how often a layer's latents are expanded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, original = 0, adapter.expanded

        def counting(*args: Any) -> tuple[Tensor, Tensor]:
            self.count += 1
            return original(*args)

        monkeypatch.setattr(adapter, "expanded", counting)


def batch(form: str) -> dict[str, Tensor]:
    if form == "unpadded":
        ids = tokens(2, 9)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return padded("left")


def decode_logits(model: Any, inputs: dict[str, Tensor], new: int = 1) -> Tensor:
    """Logits of the last `new` tokens, the others being in a cache already."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        first = model(
            input_ids=ids[:, :-new], attention_mask=mask[:, :-new],
            position_ids=positions[:, :-new], use_cache=True,
        )  # fmt: skip
        return model(
            input_ids=ids[:, -new:], attention_mask=mask, position_ids=positions[:, -new:],
            past_key_values=first.past_key_values,
        ).logits  # type: ignore[no-any-return]  # fmt: skip
