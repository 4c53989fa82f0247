"""Greedy generation: do the candidates write what the source writes, and where do they leave it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ..loading import LoadedModel
from .overlap import Overlap, overlap, repetition


@dataclass(frozen=True, kw_only=True)
class Generation:
    label: str
    prompts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]  # new tokens, one tuple per prompt
    texts: tuple[str, ...]
    # Position of the first token that differs from the source's; None: the whole is the same.
    # All None for the source itself.
    diverged_at: tuple[int | None, ...]
    overlap: Overlap | None = None  # None for the source itself

    @property
    def repetition(self) -> float:
        """Mean share of 4-grams that a text has written before."""
        return sum(map(repetition, self.tokens)) / len(self.tokens)

    @property
    def still_same(self) -> tuple[float, ...]:
        """Share of prompts whose first 1, 2, ... tokens are the source's."""
        longest = max(map(len, self.tokens))
        ends = [longest if d is None else d for d in self.diverged_at]
        return tuple(sum(end >= n for end in ends) / len(ends) for n in range(1, longest + 1))

    @property
    def same_prompts(self) -> str | None:
        """ "3 of 8" prompts with exactly the source's tokens; None for the source itself."""
        if self.overlap is None:
            return None
        return f"{sum(d is None for d in self.diverged_at)} of {len(self.prompts)}"

    @property
    def exact(self) -> float:
        """Share of prompts with exactly the source's tokens."""
        return sum(d is None for d in self.diverged_at) / len(self.diverged_at)

    @property
    def median_divergence(self) -> float | None:
        """Median position of the first difference, over the prompts that differ."""
        found = [d for d in self.diverged_at if d is not None]
        return median(found) if found else None


@torch.inference_mode()
def measure_generation(
    models: Sequence[LoadedModel],
    prompts: Sequence[str],
    *,
    new_tokens: int,
    chat: bool | None = None,
    progress: Callable[[int], None] = lambda prompts: None,
) -> list[Generation]:
    """Greedy continuations of every prompt, one at a time; the first model is the source.

    `chat` None: through the chat template if the tokenizer has one.
    """
    tokenizer = models[0].tokenizer
    encoded = [encode_prompt(tokenizer, prompt, chat) for prompt in prompts]
    written: list[list[tuple[int, ...]]] = []
    for loaded in models:
        written.append([])
        for inputs in encoded:
            written[-1].append(greedy(loaded, inputs, new_tokens))
            progress(1)
    texts = [tuple(tokenizer.decode(t, skip_special_tokens=True) for t in mine) for mine in written]
    return [
        Generation(
            label=loaded.label,
            prompts=tuple(prompts),
            tokens=tuple(mine),
            texts=texts[i],
            diverged_at=tuple(map(first_difference, written[0], mine)),
            overlap=overlap(texts[i], texts[0]) if i else None,
        )
        for i, (loaded, mine) in enumerate(zip(models, written, strict=True))
    ]


def encode_prompt(tokenizer: Any, prompt: str, chat: bool | None) -> Any:
    """`input_ids` and `attention_mask` [1, n] of a prompt."""
    if chat is None:
        chat = bool(getattr(tokenizer, "chat_template", None))
    if not chat:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template; use --no-chat")
    from hf_attn_converters.io.reading import reading

    with reading(tokenizer.name_or_path):
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )


def greedy(
    loaded: LoadedModel, inputs: Any, new_tokens: int, streamer: Any = None, cache: Any = None
) -> tuple[int, ...]:
    """The new tokens of one prompt, up to and with the end token.

    `cache` None: a new one of transformers' own choice.
    """
    ids = inputs["input_ids"].to(loaded.device)
    mask = inputs["attention_mask"].to(loaded.device)
    out = loaded.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,  # a checkpoint's own sampling settings mean nothing to greedy search
        top_p=None,
        top_k=None,
        streamer=streamer,
        **({} if cache is None else {"past_key_values": cache}),
    )
    return tuple(out[0, ids.shape[1] :].tolist())


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first difference; None when both are the same, the shorter's end otherwise."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))
