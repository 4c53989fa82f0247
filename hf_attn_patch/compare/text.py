"""The text that quality is measured on: read, split into documents, tokenized, cut into windows."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .intervals import FEWEST_DOCUMENTS, blocks_of


@dataclass(frozen=True)
class Documents:
    """One text, and where in it each document begins (characters)."""

    text: str
    starts: tuple[int, ...]


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


def read_documents(path: Path) -> Documents:
    """Rows of JSON lines (`.jsonl`: strings, or objects with "text"), else what blank lines part.

    Raises ValueError for a file that is absent, empty, no text, or has a row of another form.
    """
    text = read_text(path)
    if path.suffix != ".jsonl":
        ends = [match.end() for match in re.finditer(r"\n[^\S\n]*\n\s*(?=\S)", text)]
        return Documents(text, (0, *ends))
    rows = [
        _row_text(path, number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]
    lengths = [len(row) + 2 for row in rows]  # two newlines part them
    return Documents("\n\n".join(rows), (0, *itertools.accumulate(lengths[:-1])))


def _row_text(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    found = row.get("text") if isinstance(row, dict) else row
    if not isinstance(found, str):
        raise ValueError(
            f'{path}, line {number}: neither a JSON string nor an object with a "text" string'
        )
    return found


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; empty lines are skipped. Raises ValueError when none is left."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def tokenize(tokenizer: Any, text: str, limit: int) -> Tensor:
    """The first `limit` tokens of `text`, [n] int64, with what the tokenizer puts in front."""
    # No more characters than can matter; a token is hardly ever longer than 16.
    ids = tokenizer(text[: 16 * limit], return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < 2:
        raise ValueError("the text is too short: two tokens are the least that can be scored")
    return torch.as_tensor(ids[:limit])


def tokenize_documents(
    tokenizer: Any, documents: Documents, limit: int
) -> tuple[Tensor, Tensor, str]:
    """The first `limit` tokens [n] of the text, the unit [n] that each belongs to, its name.

    Units are documents; blocks of tokens where the text has few, or the tokenizer cannot say where
    a token came from.
    """
    tokens = tokenize(tokenizer, documents.text, limit)
    if getattr(tokenizer, "is_fast", False):
        piece = documents.text[: 16 * limit]
        places = tokenizer(piece, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        begins = torch.tensor([begin for begin, _ in places[:limit]])
        units = torch.searchsorted(torch.tensor(documents.starts), begins, right=True) - 1
        if len(units.unique()) >= FEWEST_DOCUMENTS:
            return tokens, units, "documents"
    return tokens, blocks_of(len(tokens)), "blocks of tokens"


def special_tokens_before(tokenizer: Any, tokens: Tensor) -> int:
    """How many of the `tokens` [n] of a text the tokenizer put in front: BOS, or none."""
    from hf_attn_converters.io.special_tokens import text_ends

    before = text_ends(tokenizer).before
    return len(before) if tokens[: len(before)].tolist() == list(before) else 0


def first_scored(before: int) -> int:
    """Index of the first token that is scored; `before` special tokens are context only."""
    return max(1, before)


def sliding_windows(
    tokens: Tensor, *, window: int, stride: int, before: int = 0
) -> Iterator[Window]:
    """Cut `tokens` so that each but the first is scored once, with window - stride before it.

    The first window scores all it can: its tokens after the first. The first `before` tokens are
    special ones that begin every window, as they begin every text at inference; they are never
    scored, and take the place of as many tokens of context.
    """
    least = first_scored(before)
    if not 1 <= stride <= window - least:
        raise ValueError(
            f"the stride must lie in 1..window-{least}, got stride {stride}, window {window}"
        )
    done = least
    while done < len(tokens):
        end = min(window if done == least else done + stride, len(tokens))
        if end <= window:
            yield Window(tokens[:end], scored=end - done)
        else:
            body = tokens[end - window + before : end]
            yield Window(torch.cat([tokens[:before], body]), scored=end - done)
        done = end


def prompts_from(text: str, count: int, words: int = 12) -> list[str]:
    """`count` prompts spread evenly over a text: the beginnings of sentences."""
    sentences = [s.split() for s in re.split(r"(?<=[.!?])\s+", text)]
    long = [s for s in sentences if len(s) > words] or [text.split()]
    step = max(1, len(long) // count)
    return [" ".join(s[:words]) for s in long[::step][:count]]
