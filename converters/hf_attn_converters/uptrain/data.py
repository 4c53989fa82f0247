"""Text to rows of tokens: packed, with no attention from one document to another.

Rows lie in a file, mapped into memory: a text of any size, and a resumed run reads the very same.
A token that begins a document is kept as ``~id``, so that one number says both.

Letters: N rows, S tokens of a row.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..io.special_tokens import text_ends
from ..io.text import public_name, read_documents
from .loss import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS, EVAL_ROWS = "rows.bin", "eval.bin"  # files

PIECE = 16_384  # characters; a longer document is cut, so that rows come from all of it
PIECES_PER_DOCUMENT = 32
SHORTEST_PIECE = 4  # characters per token of a row
BUFFER = 4096  # pieces that are shuffled together
HELD_OUT = 10  # every so many-th piece, until there is enough


@dataclass(frozen=True)
class Piece:
    """A document or a part of one."""

    text: str
    begins: bool
    ends: bool


class PackedRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of a file that `write_rows` made, as a causal language model takes them.

    ``position_ids`` start again at 0 with every document: transformers reads from them which
    tokens see each other (only without attention mask and cache). ``labels`` are IGNORED where a
    document begins. All are ``[S]`` int64.
    """

    def __init__(self, path: Path, length: int) -> None:
        self.rows: Any = np.memmap(path, dtype=np.int32, mode="r").reshape(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.from_numpy(self.rows[index].astype(np.int64))
        begins = row < 0
        ids = torch.where(begins, ~row, row)
        places = torch.arange(len(row))
        start = torch.where(begins, places, 0).cummax(0).values
        return {
            "input_ids": ids,
            "position_ids": places - start,
            "labels": ids.masked_fill(begins, IGNORED),
        }


def write_rows(
    train: Path,
    held_out: Path,
    text: tuple[str, ...],
    eval_text: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    rows: int,
    eval_rows: int,
    seed: int,
) -> None:
    """Write up to `rows` rows to train on, and `eval_rows` that share no piece of text with them.

    Raises ValueError for a text that is unreadable, or shorter than one row.
    """
    draw = random.Random(seed)
    pieces = _shuffled(_cut((d for one in text for d in read_documents(one)), length), draw)
    with train.open("wb") as train_file, held_out.open("wb") as eval_file:
        packer, evaluation = Packer(tokenizer, length), Packer(tokenizer, length)
        if eval_text is not None:
            for piece in _cut(read_documents(eval_text), length):
                if evaluation.write(piece, eval_file, eval_rows):
                    break
        for number, piece in enumerate(pieces):
            evaluated = eval_text is not None or evaluation.rows >= eval_rows
            if packer.rows >= rows and evaluated:
                break
            if not evaluated and number % HELD_OUT == 0:
                evaluation.write(piece, eval_file, eval_rows)
            elif packer.rows < rows:
                packer.write(piece, train_file, rows)
    name = ", ".join(public_name(one) for one in text)
    for found, source, use in (
        (packer, name, "train on"),
        (evaluation, name if eval_text is None else public_name(eval_text), "evaluate on"),
    ):
        if not found.rows:
            raise ValueError(
                f"{source} is too short: {found.tokens} tokens to {use}, one row takes {length}; "
                "give more text or a smaller sequence_length"
            )


class Packer:
    """Puts tokenized pieces one after the other into rows of `length` tokens.

    A piece from within a document, and the rest of one that begins a row, begins as the tokenizer
    begins a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.ends = text_ends(tokenizer)
        self.rows = self.tokens = 0
        self._rest: list[int] = []

    def write(self, piece: Piece, file: Any, most: int) -> bool:
        """Whether the file holds `most` rows now."""
        self._rest += self._encode(piece)
        while len(self._rest) >= self.length and self.rows < most:
            if self._rest[0] >= 0:  # the rest of a document cannot see its beginning
                first, *others = (*self.ends.before, *self._rest)
                self._rest = [~first, *others]
            row, self._rest = self._rest[: self.length], self._rest[self.length :]
            file.write(np.array(row, dtype=np.int32).tobytes())
            self.rows += 1
        return self.rows >= most

    def _encode(self, piece: Piece) -> list[int]:
        ids: list[int] = self.tokenizer(piece.text, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        if ids:
            ids = [*self.ends.before, *ids, *(self.ends.after if piece.ends else ())]
        end = self.tokenizer.eos_token_id
        if piece.ends and isinstance(end, int) and ids[-1:] != [end]:
            ids = [*ids, end]
        self.tokens += len(ids)
        return [~ids[0], *ids[1:]] if ids else []


def _cut(documents: Iterable[str], length: int) -> Iterator[Piece]:
    """Long documents in pieces, at ends of lines where there are some."""
    for document in documents:
        size = max(SHORTEST_PIECE * length, min(PIECE, len(document) // PIECES_PER_DOCUMENT))
        begin = 0
        while begin < len(document):
            end = len(document)
            if begin + size < end:
                line = document.find("\n", begin + size, begin + 2 * size)
                end = begin + size if line < 0 else line + 1
            yield Piece(document[begin:end], begin == 0, end == len(document))
            begin = end


def _shuffled(pieces: Iterable[Piece], draw: random.Random) -> Iterator[Piece]:
    """In an order drawn by chance, as far as BUFFER pieces allow."""
    waiting: list[Piece] = []
    for piece in pieces:
        waiting.append(piece)
        if len(waiting) >= BUFFER:
            yield waiting.pop(draw.randrange(len(waiting)))
    draw.shuffle(waiting)
    yield from waiting
