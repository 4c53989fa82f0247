"""Models to measure: a checkpoint's folder, or the shape of a known model with random weights.

A shape takes the same time as its model, and no download. Weights are drawn with a deviation of one
over the square root of the width, so that attention matters: with the usual 0.02 a softmax of a
narrow model is flat, and a wrong mask would hardly show.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A configuration class of transformers and what differs from its defaults."""

    model: str
    config: str
    sizes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", MappingProxyType(dict(self.sizes)))


def _sizes(
    hidden: int, inner: int, layers: int, heads: tuple[int, int], dim: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": dim,
        "vocab_size": vocab, "max_position_embeddings": 131072, **more,
    }  # fmt: skip


LLAMA = {"model": "LlamaForCausalLM", "config": "LlamaConfig"}
MISTRAL = {"model": "MistralForCausalLM", "config": "MistralConfig"}
GEMMA3 = {"model": "Gemma3ForCausalLM", "config": "Gemma3TextConfig"}
GPT_OSS = {"model": "GptOssForCausalLM", "config": "GptOssConfig"}
SHAPES = {
    "llama3-8b": ModelShape(**LLAMA, sizes=_sizes(4096, 14336, 32, (32, 8), 128, 128256)),
    "mistral-7b": ModelShape(  # the first version, whose window is 4096
        **MISTRAL, sizes=_sizes(4096, 14336, 32, (32, 8), 128, 32000, sliding_window=4096)
    ),
    "gemma3-1b": ModelShape(  # five layers with a window, then one without
        **GEMMA3, sizes=_sizes(1152, 6912, 26, (4, 1), 256, 262144, sliding_window=512)
    ),
    "gemma3-4b": ModelShape(
        **GEMMA3, sizes=_sizes(2560, 10240, 34, (8, 4), 256, 262208, sliding_window=1024)
    ),
    # four experts, all of them taken: the work of a token is the 20b's own, the weights are fewer,
    # and no rounding sends a token to another expert
    "gpt-oss-20b-4-experts": ModelShape(
        **GPT_OSS,
        sizes=_sizes(
            2880, 2880, 24, (64, 8), 64, 201088,
            sliding_window=128, num_local_experts=4, num_experts_per_tok=4,
        ),
    ),
    "tiny": ModelShape(**LLAMA, sizes=_sizes(64, 128, 2, (4, 2), 16, 300)),
    "tiny-window": ModelShape(
        **MISTRAL, sizes=_sizes(64, 128, 2, (4, 2), 16, 300, sliding_window=32)
    ),
}  # fmt: skip


def check(checkpoint: Path | None, shape: str | None, dtype: str, device: str) -> str:
    """The model's name for :func:`load`; ValueError when there is none, or two."""
    if (checkpoint is None) == (shape is None):
        raise ValueError(
            "give the folder of a checkpoint, or a shape for random weights (--shape), not both; "
            f"shapes: {', '.join(SHAPES)}"
        )
    if shape is not None and shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; possible: {', '.join(SHAPES)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; possible: {', '.join(DTYPES)}")
    if device == "cpu" and sys.platform != "linux":
        raise ValueError("memory is read from /proc, which only Linux has")
    if shape is not None:
        return shape
    assert checkpoint is not None  # one of the two
    if not (checkpoint / "config.json").exists():
        raise ValueError(f"{checkpoint} is no folder of a checkpoint: it has no config.json")
    return str(checkpoint.resolve())


def has_window(name: str) -> bool:
    """Whether any layer of a shape or a folder has a sliding window of its own."""
    if name in SHAPES:
        return "sliding_window" in SHAPES[name].sizes
    config = json.loads((Path(name) / "config.json").read_text())
    config = config.get("text_config", config)
    return bool(config.get("sliding_window")) and config.get("use_sliding_window", True)


def load(name: str, impl: str, dtype: str, device: str) -> Any:
    """A shape or a folder as a model in eval mode; a shape's weights are the same every time."""
    import torch
    import transformers

    import hf_attn_patch  # noqa: F401  (registers the implementations)

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    wanted = getattr(torch, dtype)
    if name not in SHAPES:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=wanted, attn_implementation=impl, trust_remote_code=False
        )
        return model.to(device).eval()
    torch.manual_seed(0)
    shape = SHAPES[name]
    own = {"eos_token_id": None, "pad_token_id": 0}
    own["initializer_range"] = shape.sizes["hidden_size"] ** -0.5
    config = getattr(transformers, shape.config)(**shape.sizes, **own)
    with torch.device(device):
        made: Any = getattr(transformers, shape.model)._from_config(
            config, attn_implementation=impl, dtype=wanted
        )
    return made.eval()
