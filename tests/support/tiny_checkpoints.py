"""Tiny random checkpoints of every family, with a byte-level tokenizer, saved as real ones are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedTokenizerFast

VOCAB = 300


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """How one family's config spells the sizes of a tiny model. An empty name: it has none."""

    model_type: str
    names: Mapping[str, str] = field(default_factory=dict)  # usual name -> this family's
    extra: Mapping[str, Any] = field(default_factory=dict)
    nested: str = ""
    auto: str = "AutoModelForCausalLM"


_NO_KV = {"num_key_value_heads": "", "head_dim": ""}
_GPT2 = _NO_KV | {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
_FALCON = {
    "head_dim": "",
    "intermediate_size": "ffn_hidden_size",
    "num_key_value_heads": "num_kv_heads",
}
_OLD_FALCON = _FALCON | {"num_key_value_heads": ""}
_RW = {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}
_MASKED = "AutoModelForMaskedLM"

# By the names of hf_attn_converters.FAMILIES, and variants of them.
TINY: dict[str, Tiny] = {
    **{
        name: Tiny(model_type=name)
        for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3", "olmo2")
    },
    "mixtral": Tiny(model_type="mixtral", extra={"num_local_experts": 2}),
    "starcoder2": Tiny(model_type="starcoder2", extra={"use_bias": True}),
    "gemma2": Tiny(model_type="gemma2", extra={"query_pre_attn_scalar": 8}),
    "gemma3_text": Tiny(model_type="gemma3_text", extra={"query_pre_attn_scalar": 8}),
    "gemma3": Tiny(
        model_type="gemma3",
        nested="text_config",
        extra={
            "query_pre_attn_scalar": 8,
            "": {
                "vision_config": {
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 28,
                    "patch_size": 14,
                },
                "mm_tokens_per_image": 4,
                "image_token_index": 299,
                "boi_token_index": 298,
                "eoi_token_index": 297,
            },
        },
    ),
    "phi_normed": Tiny(model_type="phi", extra={"qk_layernorm": True}),
    "falcon": Tiny(
        model_type="falcon", names=_FALCON, extra={"new_decoder_architecture": True, "bias": True}
    ),
    "falcon_mqa": Tiny(model_type="falcon", names=_OLD_FALCON),
    "falcon_mqa_serial": Tiny(
        model_type="falcon", names=_OLD_FALCON, extra={"parallel_attn": False}
    ),
    "falcon_mha": Tiny(model_type="falcon", names=_OLD_FALCON, extra=_RW),
    "falcon_mha_parallel": Tiny(
        model_type="falcon", names=_OLD_FALCON, extra={"multi_query": False}
    ),
    "gpt2": Tiny(model_type="gpt2", names=_GPT2),
    "gpt_bigcode": Tiny(model_type="gpt_bigcode", names=_GPT2),
    "gpt_bigcode_mha": Tiny(model_type="gpt_bigcode", names=_GPT2, extra={"multi_query": False}),
    "gpt_neox": Tiny(model_type="gpt_neox", names=_NO_KV),
    "opt": Tiny(model_type="opt", names=_NO_KV | {"intermediate_size": "ffn_dim"}),
    "t5": Tiny(
        model_type="t5",
        names={
            "hidden_size": "d_model",
            "intermediate_size": "d_ff",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "head_dim": "d_kv",
            "num_key_value_heads": "",
        },
        auto="AutoModelForSeq2SeqLM",
    ),
    "bert": Tiny(model_type="bert", names=_NO_KV, auto=_MASKED),
    "roberta": Tiny(model_type="roberta", names=_NO_KV, auto=_MASKED),
    "albert": Tiny(
        model_type="albert", names=_NO_KV, extra={"embedding_size": 12}, auto=_MASKED
    ),
}  # fmt: skip


def tiny_checkpoint(
    folder: Path,
    *,
    family: str = "llama",
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    tie: bool = True,
    seed: int = 0,
    shard_size: str = "1GB",
    tokenizer: bool = False,
    **config: object,
) -> Path:
    """Save a random model of `family`, a name of TINY, into `folder` and return the folder."""
    torch.manual_seed(seed)
    tiny = TINY[family]
    settings = tiny_config(
        family, heads=heads, kv_heads=kv_heads, head_dim=head_dim, layers=layers, tie=tie, **config
    )
    model = getattr(transformers, tiny.auto).from_config(settings, dtype=dtype)
    for name, parameter in model.named_parameters():
        # transformers starts with std 0.02 and zero biases: far too alike for a test
        around = 1.0 if "norm" in name.lower() or "ln_" in name else 0.0
        torch.nn.init.normal_(parameter, mean=around, std=0.1)
    model.save_pretrained(folder, max_shard_size=shard_size)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def tiny_config(
    family: str,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    layers: int = 2,
    tie: bool = True,
    **config: object,
) -> Any:
    tiny = TINY[family]
    usual = {
        "vocab_size": VOCAB,
        "hidden_size": heads * head_dim,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    spelled = {tiny.names.get(key, key): value for key, value in usual.items()}
    spelled |= {key: value for key, value in tiny.extra.items() if key} | config
    spelled.pop("", None)
    around = dict(tiny.extra.get("", {}))
    if tiny.nested:
        spelled = {tiny.nested: spelled, "tie_word_embeddings": tie} | around
    return AutoConfig.for_model(tiny.model_type, **spelled)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, behind two special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(letters)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def load(folder: Path, **kwargs: object) -> Any:
    """A checkpoint's model, loaded as any user would."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    ours = model_type.endswith("_gqa")
    known = {tiny.model_type: tiny.auto for tiny in TINY.values()}
    auto = getattr(transformers, known[model_type.removesuffix("_gqa")])
    if ours:
        kwargs = {"trust_remote_code": True} | kwargs
    return auto.from_pretrained(folder, **kwargs)


def some_tokens(rows: int = 2, length: int = 24) -> torch.Tensor:
    """[rows, length] ids, none of them special."""
    return torch.randint(2, VOCAB - 4, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits_of(folder: Path, **kwargs: object) -> torch.Tensor:
    """Logits [2, 24, V] of a checkpoint on fixed tokens, loaded as any user would."""
    return load(folder, **kwargs)(some_tokens()).logits


def assert_same_logits(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal to 1e-6 of the largest logit: float32 sums in another order differ by that much."""
    assert a.shape == b.shape
    difference, scale = (a - b).abs().max().item(), b.abs().max().item()
    assert difference <= 1e-6 * scale, (difference, scale)


def edit_config(folder: Path, *, drop: tuple[str, ...] = (), **changes: object) -> None:
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps(config | changes))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_weights(mine: Path, other: Path) -> None:
    """The same tensors, bit by bit, however they lie in files."""
    a, b = weights_of(mine), weights_of(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name
