"""Tiny random checkpoints with a byte-level tokenizer, saved the way real ones are."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 300


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
    """Save a random model of `family` into `folder` and return the folder."""
    torch.manual_seed(seed)
    settings = AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=heads * head_dim,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **config,
    )
    model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    for name, parameter in model.named_parameters():
        # transformers starts with std 0.02 and zero biases: far too alike for a test
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    model.save_pretrained(folder, max_shard_size=shard_size)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


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


@torch.inference_mode()
def logits_of(folder: Path, **kwargs: object) -> torch.Tensor:
    """Logits [2, 24, V] of a checkpoint on fixed tokens, loaded as any user would."""
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    tokens = torch.randint(2, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    return model(tokens).logits


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
