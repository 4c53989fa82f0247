"""What the tests of conversions to latents share: tiny sources, quick conversions, distances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_checkpoints import VOCAB, some_tokens, tiny_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_attn_converters import convert
from hf_attn_converters.calibration import Calibration
from hf_attn_converters.calibration.tokens import RANDOM_TOKENS

QUICK = Calibration(tokens=1024, sequence_length=32, without_text=RANDOM_TOKENS)
# head_dim 8: two KV heads are 16 columns of K and 16 of V
EXACT = {"kv_lora_rank": 17, "qk_rope_head_dim": 16}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip


def source(folder: Path, **options: Any) -> Path:
    """A tiny source; sliding windows, which latents do not have, are off."""
    windows = {"mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False}}
    return tiny_checkpoint(folder, **windows.get(options.get("family", ""), {}), **options)


def to_latents(folder: Path, target: Path, rank: int, rope: int, **options: Any) -> Path:
    settings = {"method": "mla", "calibration": QUICK} | options
    convert(folder, target, to="mla", kv_lora_rank=rank, qk_rope_head_dim=rope, **settings)
    return target


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.inference_mode()
def logits(folder: Path, **options: Any) -> Tensor:
    """[2, 24, V] in float64: what is left of a difference is the weights'."""
    return load(folder, **options).double()(some_tokens()).logits


def distance(folder: Path, target: Path) -> float:
    """Of the two models' logits, relative; the source's own implementation is eager."""
    theirs, ours = logits(folder, attn_implementation="eager"), logits(target)
    assert ours.isfinite().all()
    return float((ours - theirs).norm() / theirs.norm())


@torch.inference_mode()
def greedy(folder: Path, **options: Any) -> Tensor:
    """[2, 24 + 12] ids."""
    prompt = some_tokens()
    return load(folder, **options).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
        eos_token_id=VOCAB,  # none: all twelve
    )  # fmt: skip


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
