"""What a tokenizer puts around a text: BOS, or [CLS] and [SEP]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = ("a", "the", "0", ".")  # texts of which a tokenizer knows one at least


@dataclass(frozen=True)
class TextEnds:
    """Ids that stand before and after each text by default. Both are empty for many tokenizers."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return len(self.before) + len(self.after)


def text_ends(tokenizer: PreTrainedTokenizerBase) -> TextEnds:
    """Found by tokenizing a text with and without special tokens."""
    whole: list[int] = []
    for probe in PROBES:
        plain, whole = _ids(tokenizer, probe, False), _ids(tokenizer, probe, True)
        for start in range(len(whole) - len(plain) + 1) if plain else ():
            end = start + len(plain)
            if whole[start:end] == plain:
                return TextEnds(tuple(whole[:start]), tuple(whole[end:]))
    raise ValueError(
        f"cannot tell what {type(tokenizer).__name__} puts before a text: it reads {PROBES[-1]!r} "
        f"as {whole}"
    )


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids
