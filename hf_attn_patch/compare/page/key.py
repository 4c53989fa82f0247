"""The letter, colour and marker that stand for a model everywhere on the page."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_uppercase

from ..options import Comparison

MARKERS = "os^DvPX*"
COLOURS = 8  # --s0 to --s7 of page.css


@dataclass(frozen=True)
class Model:
    letter: str
    label: str
    colour: int
    marker: str  # matplotlib's name

    @property
    def is_source(self) -> bool:
        return self.letter == "A"


def model_key(comparison: Comparison) -> list[Model]:
    """One for each model, the source first. Colours come again after the eighth."""
    labels = (comparison.source, *comparison.candidates)
    return [
        Model(_letter(i), label, i % COLOURS, MARKERS[i % len(MARKERS)])
        for i, label in enumerate(labels)
    ]


def _letter(i: int) -> str:
    """A to Z, then A2, B2, ..."""
    turn, place = divmod(i, len(ascii_uppercase))
    return ascii_uppercase[place] + (str(turn + 1) if turn else "")
