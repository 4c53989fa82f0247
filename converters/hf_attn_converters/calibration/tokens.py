"""Calibration text: which tokens the source model is watched on.

With text they come from windows spread over all of it, and for a share, if so wanted, from what the
model writes itself: that keeps what it knows beside the text. Without text the model writes all;
one that cannot write (an encoder) sees random tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..io.checkpoint import has_tokenizer
from ..io.text import public_name, read_text
from .fit import FitSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# (steps done, steps in all, what)
Progress = Callable[[int, int, str], None]

SELF_GENERATED, RANDOM_TOKENS = "model-generated text", "random tokens"
GENERATED_AT_ONCE = 32  # sequences that the model writes side by side
CHARACTERS_PER_TOKEN = 8  # read per token wanted: more than any tokenizer needs for prose
STREAMED = 16  # times that, of a dataset: it may have no end


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What to calibrate on.

    Args:
        text: a file or a dataset, see :func:`..io.text.read_text`; of a dataset the windows come
            from its beginning (some hundred characters for each token). None: see ``without_text``.
        own_text: the share of the tokens, 0 to 1, that the model writes itself beside `text`.
        tokens: how many tokens; rounded down to whole sequences. Fewer if the text ends before.
        sequence_length: tokens per sequence.
        seed: of the choice of windows and of everything drawn later.
        fit: how methods that fit do it.
        device: where layers run, as torch spells it. None: an accelerator if there is one.
        without_text: what takes the text's place, ``SELF_GENERATED`` or ``RANDOM_TOKENS``.
    """

    text: str | Path | None = None
    own_text: float = 0.0
    tokens: int = 49_152
    sequence_length: int = 512
    seed: int = 0
    without_text: str = SELF_GENERATED
    fit: FitSettings = field(default_factory=FitSettings)
    device: str | None = None

    def __post_init__(self) -> None:
        if self.tokens < self.sequence_length or self.sequence_length < 8:
            raise ValueError(
                f"calibration needs at least one sequence of 8 tokens or more; got "
                f"{self.tokens} tokens in sequences of {self.sequence_length}"
            )
        if not 0 <= self.own_text < 1:
            raise ValueError(f"own_text is a share from 0 to below 1, got {self.own_text}")
        if self.without_text not in (SELF_GENERATED, RANDOM_TOKENS):
            raise ValueError(
                f"without_text is {self.without_text!r}; "
                f"possible: {SELF_GENERATED!r}, {RANDOM_TOKENS!r}"
            )

    def at_most(self, positions: int | None) -> Calibration:
        """The same with sequences that a model of so many positions can take."""
        if positions is None or positions >= self.sequence_length:
            return self
        return replace(self, sequence_length=positions)


@dataclass(frozen=True)
class Tokens:
    ids: Tensor  # [N, sequence_length] int64
    origin: str  # for the record: what they are

    @property
    def count(self) -> int:
        return self.ids.numel()


def calibration_tokens(
    calibration: Calibration, folder: Path, model: PreTrainedModel, progress: Progress
) -> Tokens:
    """Tokens for `model`, whose tokenizer lies in `folder`. Raises ValueError for unusable text."""
    rows, length = calibration.tokens // calibration.sequence_length, calibration.sequence_length
    tokenizer = _tokenizer(folder)
    start = _first_token(model, tokenizer)
    writes = model.can_generate() and start is not None

    def written(rows: int) -> Tensor:
        assert start is not None
        return _generated(model, start, rows, length, calibration, progress)

    if calibration.text is not None:
        if tokenizer is None:
            raise ValueError(
                f"{folder.name} holds no tokenizer, so text cannot be read; put its tokenizer "
                "files there, or calibrate without text"
            )
        own = round(rows * calibration.own_text)
        ids = _from_text(calibration, tokenizer, rows - own, length)
        origin = f"text of {public_name(calibration.text)}"
        if not own:
            return Tokens(ids, origin)
        if not writes:
            raise ValueError(
                f"own_text is {calibration.own_text}, but a {type(model).__name__} writes no text"
            )
        share = f"{calibration.own_text:.0%} {SELF_GENERATED}"
        return Tokens(torch.cat([ids, written(own)]), f"{origin}, {share}")
    if calibration.without_text == SELF_GENERATED and writes:
        return Tokens(written(rows), SELF_GENERATED)
    generator = torch.Generator().manual_seed(calibration.seed)
    vocabulary: int = model.config.get_text_config().vocab_size
    return Tokens(torch.randint(vocabulary, (rows, length), generator=generator), RANDOM_TOKENS)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False
    )
    return tokenizer


def _from_text(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase, rows: int, length: int
) -> Tensor:
    """Windows spread evenly over the text, each starting at a place of its own draw."""
    assert calibration.text is not None
    draw = random.Random(calibration.seed)
    span = length * CHARACTERS_PER_TOKEN
    is_file = Path(calibration.text).is_file()
    text = read_text(calibration.text, None if is_file else STREAMED * rows * span)
    if len(text) <= rows * span:  # short: all of it, once
        ids = _encode(tokenizer, text)[: rows * length]
        usable = len(ids) // length * length
        if not usable:
            raise ValueError(
                f"{public_name(calibration.text)} holds {len(ids)} tokens, one sequence takes "
                f"{length}; give more text or a smaller sequence_length"
            )
        return torch.tensor(ids[:usable]).view(-1, length)
    windows = []
    stride = (len(text) - span) / rows
    for row in range(rows):
        start = int((row + draw.random()) * stride)
        ids = _encode(tokenizer, text[start : start + span])[:length]
        if len(ids) == length:
            windows.append(ids)
    if not windows:
        raise ValueError(f"{public_name(calibration.text)} gives too few tokens: is it text?")
    return torch.tensor(windows)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _first_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """What the model's texts begin with."""
    candidates = [None if tokenizer is None else tokenizer.bos_token_id]
    candidates += [getattr(model.config, name, None) for name in ("bos_token_id", "eos_token_id")]
    return next((x for x in candidates if isinstance(x, int)), None)


@torch.inference_mode()
def _generated(
    model: PreTrainedModel, start: int, rows: int, length: int, calibration: Calibration,
    progress: Progress,
) -> Tensor:  # fmt: skip
    """Texts that the model writes itself, sampled at temperature 1."""
    from transformers import GenerationConfig

    writer: Any = model  # transformers' types do not know that it can
    settings = GenerationConfig(  # not the model's own: a repetition penalty would bend the text
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=start,
        min_new_tokens=length - 1, max_new_tokens=length - 1,
    )  # fmt: skip
    devices = [] if model.device.type == "cpu" else [model.device]
    done: list[Tensor] = []
    with torch.random.fork_rng(devices):
        torch.manual_seed(calibration.seed)
        for first in range(0, rows, GENERATED_AT_ONCE):
            count = min(GENERATED_AT_ONCE, rows - first)
            prompt = torch.full((count, 1), start, device=model.device)
            written = writer.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
            )
            done.append(written.cpu())
            progress(first + count, rows, "writing calibration text")
    return torch.cat(done).clone()
