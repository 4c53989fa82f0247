"""The model of the order of blocks, on schedules that can be worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from experiments.schedule_model import (  # noqa: E402
    Model,
    ratios,
    started_when_free,
    tiles,
    to_and_fro,
)

SMALL = Model(places=2, block_m=4, block_n=2, cycles_pass=10, once=1, start=0)


def test_blocks_cost_what_they_see() -> None:
    assert list(tiles(8, 1, 1, SMALL)) == [41, 21]
    assert list(tiles(8, 3, 2, SMALL)) == [41, 41, 21, 21, 41, 21]  # the third head is left over
    assert list(tiles(7, 1, 1, SMALL)) == [41, 21]  # a tile that is cut costs as much


def test_a_block_starts_where_one_has_ended() -> None:
    assert started_when_free([5, 3, 2, 4], SMALL) == 9
    assert started_when_free([5, 3], Model(places=2, start=1)) == 6


def test_cards_are_dealt_to_and_fro() -> None:
    assert to_and_fro([5, 4, 3, 1], SMALL) == 7
    assert to_and_fro([5], SMALL) == 5


@pytest.mark.parametrize("heads", [2, 16, 32])
def test_the_longest_first_is_never_later(heads: int) -> None:
    found = ratios(4096, heads, heads, Model())
    assert 1 <= found["heavy first"] <= found["head by head"]
    same = ratios(4096, heads, 1, Model())
    assert same["heavy first"] == same["head by head"]
