"""Train the small multi-head Llama under tests/fixtures/ on public-domain text; one CPU core.

    python scripts/experiments/train_fixture.py --text corpus.txt.xz

It sees the part of the text that scripts/experiments/measure_conversion.py calibrates on, never the
held-out part. A byte-level BPE tokenizer is trained first, on the same text.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_attn_converters.precision import products

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, for its packages

from measure.texts import read_plain, split

TARGET = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "tiny-llama-mha"
BEGIN = "<|endoftext|>"
# 3.7 M parameters: 7.4 MB in bfloat16
SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
LENGTH = 256  # tokens per sequence
BATCH = 8  # sequences per step
PEAK_LR, BETAS, WEIGHT_DECAY, CLIP = 3e-3, (0.9, 0.95), 0.1, 1.0
WARM_UP = 40  # steps


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="plain text, .xz or not")
    parser.add_argument("--target", type=Path, default=TARGET, help="folder to write")
    parser.add_argument("--minutes", type=float, default=14, help="of training (14)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        print(f"error: --minutes must be positive, got {args.minutes}", file=sys.stderr)
        return 2
    try:
        text, _ = split(read_plain(args.text))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(text)
    tokens = encode(tokenizer, text)
    print(f"{len(tokens):,} tokens, {len(text) / len(tokens):.2f} characters each", flush=True)
    model, record = train(tokens, tokenizer, 60 * args.minutes)
    model.bfloat16().save_pretrained(args.target)
    tokenizer.save_pretrained(args.target)
    record |= {"text": args.text.name, "seed": args.seed, "torch": torch.__version__}
    (args.target / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {args.target}: {json.dumps(record)}")
    return 0


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, on every eighth part of the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=[BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = [text[i : i + 100_000] for i in range(0, len(text), 800_000)]
    tokenizer.train_from_iterator(pieces, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=BEGIN,
        model_max_length=SIZES["max_position_embeddings"],
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """[n] int64."""
    ids: list[int] = []
    for start in range(0, len(text), 1_000_000):
        ids += tokenizer(text[start : start + 1_000_000], verbose=False)["input_ids"]
    return torch.tensor(ids)


def train(
    tokens: Tensor, tokenizer: PreTrainedTokenizerFast, seconds: float
) -> tuple[Any, dict[str, Any]]:
    """The model after so many seconds, and what is told of its training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    begin = tokenizer.bos_token_id
    config = LlamaConfig(**SIZES, bos_token_id=begin, eos_token_id=begin, pad_token_id=None)
    model: Any = LlamaForCausalLM(config).train()
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not embedding]
    others = [embedding, *(p for p in model.parameters() if p.ndim <= 1)]
    # Muon learns more from the few tokens that some minutes allow than AdamW does.
    optimizers = [
        torch.optim.Muon(
            matrices, lr=0.0, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=0.0, betas=BETAS, weight_decay=0.0),
    ]
    losses: list[float] = []
    start = time.perf_counter()
    batch = batches(tokens, begin)
    while (share := (time.perf_counter() - start) / seconds) < 1:
        lr = PEAK_LR * min(1, (len(losses) + 1) / WARM_UP) * decay(share)
        ids = batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=products(torch.bfloat16).fast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            recent = sum(losses[-50:]) / 50
            print(f"{share:4.0%}  step {len(losses)}  loss {recent:.3f}", flush=True)
    last = losses[-50:]
    seen = len(losses) * BATCH * LENGTH
    loss = sum(last) / len(last)
    return model, {"steps": len(losses), "tokens": seen, "last_loss": round(loss, 4)}


def decay(share: float) -> float:
    """Cosine, by the share of the time that has gone, to a hundredth."""
    return 0.01 + 0.99 * (1 + math.cos(math.pi * min(share, 1))) / 2


def batches(tokens: Tensor, begin: int) -> Callable[[], Tensor]:
    """Draws [BATCH, LENGTH]; every other sequence starts with the beginning-of-text token."""

    def batch() -> Tensor:
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,))
        ids = torch.stack([tokens[s : s + LENGTH] for s in starts.tolist()])
        ids[::2, 0] = begin
        return ids

    return batch


if __name__ == "__main__":
    sys.exit(main())
