"""Calibration text: which tokens the source model is watched on.

With text they come from windows spread over all of it, and for a share, if so wanted, from what the
model writes itself: that keeps what it knows beside the text. Without text the model writes all;
one that cannot write (an encoder, a checkpoint without a language model's head) sees random tokens.

Every window begins as the tokenizer begins a text: attention rests on such a first token, and heads
merged where it is missing are wrong where it stands.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..io.checkpoint import has_tokenizer
from ..io.reading import reading
from ..io.special_tokens import TextEnds, text_ends
from ..io.text import public_name, read_text
from .fit import FitSettings
from .source_model import SourceModel

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
    begin: str = ""  # for the record: the special tokens that each window begins with
    end: str = ""

    @property
    def count(self) -> int:
        return self.ids.numel()


def calibration_tokens(calibration: Calibration, source: SourceModel, progress: Progress) -> Tokens:
    """Tokens for a model, whose tokenizer lies in its folder. Raises ValueError for unusable text.

    Text that a model without its own head would write is noise: random tokens take its place.
    """
    rows, length = calibration.tokens // calibration.sequence_length, calibration.sequence_length
    tokenizer, model = _tokenizer(source.folder), source.model
    ends = TextEnds() if tokenizer is None else text_ends(tokenizer)
    if ends.count >= length:
        raise ValueError(
            f"the tokenizer puts {ends.count} special tokens around each text: a sequence_length "
            f"of {length} leaves no room for words"
        )
    names = {"begin": _spelled(tokenizer, ends.before), "end": _spelled(tokenizer, ends.after)}
    start = ends.before or _first_token(model, tokenizer)
    why_silent = source.why_silent or (None if start else "its config names no token to begin with")

    def written(rows: int) -> Tensor:
        return _generated(model, start, rows, length, calibration, progress)

    if calibration.text is not None:
        if tokenizer is None:
            raise ValueError(
                f"{source.folder.name} holds no tokenizer, so text cannot be read; put its "
                "tokenizer files there, or calibrate without text"
            )
        own = round(rows * calibration.own_text)
        if own and why_silent:
            raise ValueError(
                f"own_text is {calibration.own_text}, but the source writes no text: {why_silent}"
            )
        ids = _from_text(calibration, tokenizer, ends, rows - own, length)
        origin = f"text of {public_name(calibration.text)}"
        if not own:
            return Tokens(ids, origin, **names)
        share = f"{calibration.own_text:.0%} {SELF_GENERATED}"
        return Tokens(torch.cat([ids, written(own)]), f"{origin}, {share}", **names)
    if calibration.without_text == SELF_GENERATED and not why_silent:
        # Begins as the model's own texts do; nothing is put behind them.
        return Tokens(written(rows), SELF_GENERATED, _spelled(tokenizer, start))
    generator = torch.Generator().manual_seed(calibration.seed)
    vocabulary: int = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (rows, length - ends.count), generator=generator)
    origin = RANDOM_TOKENS
    if calibration.without_text == SELF_GENERATED:
        origin += f" (the source writes no text: {why_silent})"
    return Tokens(_between(ends, ids), origin, **names)


def _between(ends: TextEnds, inner: Tensor) -> Tensor:
    """Rows ``[N, S]`` of tokens with the special ones around each."""
    before, after = (
        torch.tensor(ids, dtype=torch.int64).expand(len(inner), -1)
        for ids in (ends.before, ends.after)
    )
    return torch.cat([before, inner, after], dim=1)


def _spelled(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]) -> str:
    """Special tokens as a record shows them; ids where there is no tokenizer."""
    words = ids if tokenizer is None else tokenizer.convert_ids_to_tokens(list(ids))
    return " ".join(map(str, words))


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        return None
    with reading(folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    return tokenizer


def _from_text(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    ends: TextEnds,
    rows: int,
    sequence_length: int,
) -> Tensor:
    """Windows spread evenly over the text, each starting at a place of its own draw, with the
    special tokens `ends` around each."""
    assert calibration.text is not None
    length = sequence_length - ends.count  # of the text
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
        return _between(ends, torch.tensor(ids[:usable]).view(-1, length))
    windows = []
    stride = (len(text) - span) / rows
    for row in range(rows):
        start = int((row + draw.random()) * stride)
        ids = _encode(tokenizer, text[start : start + span])[:length]
        if len(ids) == length:
            windows.append(ids)
    if not windows:
        raise ValueError(f"{public_name(calibration.text)} gives too few tokens: is it text?")
    return _between(ends, torch.tensor(windows))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _first_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """What a model's texts begin with where its tokenizer puts nothing there."""
    candidates = [None if tokenizer is None else tokenizer.bos_token_id]
    candidates += [getattr(model.config, name, None) for name in ("bos_token_id", "eos_token_id")]
    return next(((x,) for x in candidates if isinstance(x, int)), ())


@torch.inference_mode()
def _generated(
    model: PreTrainedModel, start: tuple[int, ...], rows: int, length: int,
    calibration: Calibration, progress: Progress,
) -> Tensor:  # fmt: skip
    """Texts that the model writes itself, sampled at temperature 1."""
    from transformers import GenerationConfig

    writer: Any = model  # transformers' types do not know that it can
    settings = GenerationConfig(  # not the model's own: a repetition penalty would bend the text
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=start[0],
        min_new_tokens=length - len(start), max_new_tokens=length - len(start),
    )  # fmt: skip
    devices = [] if model.device.type == "cpu" else [model.device]
    done: list[Tensor] = []
    with torch.random.fork_rng(devices):
        torch.manual_seed(calibration.seed)
        for first in range(0, rows, GENERATED_AT_ONCE):
            count = min(GENERATED_AT_ONCE, rows - first)
            prompt = torch.tensor(start, device=model.device).repeat(count, 1)
            written = writer.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
            )
            done.append(written.cpu())
            progress(first + count, rows, "writing calibration text")
    return torch.cat(done).clone()
