"""The text that quality is measured on: read, tokenized, cut into sliding windows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A piece of text and how many of its last tokens are scored here, and only here."""

    tokens: Tensor  # [length] int64
    scored: int


def read_text(path: Path) -> str:
    """A UTF-8 file's text. Raises ValueError for one that is absent, empty or no text."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"text file {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"text file {path} is empty")
    return text


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; empty lines are skipped."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def tokenize(tokenizer: Any, text: str, limit: int) -> Tensor:
    """The first `limit` tokens of `text`, [n] int64, with what the tokenizer puts in front."""
    # No more characters than can matter; a token is hardly ever longer than 16.
    ids = tokenizer(text[: 16 * limit], return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < 2:
        raise ValueError("the text is too short: two tokens are the least that can be scored")
    return torch.as_tensor(ids[:limit])


def sliding_windows(tokens: Tensor, *, window: int, stride: int) -> Iterator[Window]:
    """Cut `tokens` so that each but the first is scored once, with window - stride before it.

    The first window scores all it can: its tokens after the first.
    """
    if not 1 <= stride < window:
        raise ValueError(
            f"the stride must lie in 1..window-1, got stride {stride}, window {window}"
        )
    done = 1
    while done < len(tokens):
        end = min(window if done == 1 else done + stride, len(tokens))
        yield Window(tokens[max(0, end - window) : end], scored=end - done)
        done = end


def prompts_from(text: str, count: int, words: int = 12) -> list[str]:
    """`count` prompts spread evenly over a text: the beginnings of sentences."""
    sentences = [s.split() for s in re.split(r"(?<=[.!?])\s+", text)]
    long = [s for s in sentences if len(s) > words] or [text.split()]
    step = max(1, len(long) // count)
    return [" ".join(s[:words]) for s in long[::step][:count]]
