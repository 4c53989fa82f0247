"""Texts to calibrate on and to evaluate on, so that no part serves both."""

from __future__ import annotations

import itertools
import lzma
import re
from collections.abc import Sequence
from pathlib import Path

SLICES = 400  # a text is cut into so many
HELD_OUT = 10  # and every so many-th is kept for evaluation


def read_plain(path: Path) -> str:
    """A UTF-8 text, `.xz` or plain. Raises ValueError for one that is absent, empty or no text."""
    try:
        stored = path.read_bytes()
        words = (lzma.decompress(stored) if path.suffix == ".xz" else stored).decode("utf-8")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from None
    if not words.strip():
        raise ValueError(f"{path} is empty")
    return words


def split(text: str) -> tuple[str, str]:
    """(to calibrate or train on, held out): cut at ends of lines, always in the same places."""
    edges = [0]
    for i in range(1, SLICES):
        end = text.find("\n", max(edges[-1], i * len(text) // SLICES))
        edges.append(len(text) if end < 0 else end + 1)
    edges.append(len(text))
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    kept = [piece for i, piece in enumerate(pieces) if (i + 1) % HELD_OUT]
    return "".join(kept), "".join(pieces[HELD_OUT - 1 :: HELD_OUT])


def word_start(text: str, position: int) -> int:
    """Where the first word after a position begins; a line's end counts as a space."""
    found = re.compile(r"\s").search(text, position)
    return found.end() if found else len(text)


def python_prose() -> str:
    """The language reference that every Python carries: technical prose, at hand everywhere."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def sentences(text: str) -> list[str]:
    """The text's different sentences of 8 to 40 words."""
    joined = re.sub(r"\s+", " ", text)
    found = (s.strip() for s in re.split(r"(?<=[.!?])\s", joined))
    return list(dict.fromkeys(s for s in found if 8 <= len(s.split()) <= 40))


def spread(items: Sequence[str], count: int, what: str) -> list[str]:
    """`count` of the items, evenly. Raises ValueError when there are fewer."""
    if len(items) < count:
        raise ValueError(
            f"the evaluation text has {len(items)} {what}, {count} are needed: give a longer text, "
            "or a smaller --eval-size"
        )
    return [items[i * len(items) // count] for i in range(count)]
