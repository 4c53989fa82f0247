"""Slots of transformers' manager as block tables. Also run on transformers 5.17."""

from __future__ import annotations

import torch

from hf_attn_patch.attention import batching_tables

PAGE = 16


def test_ring_tables_against_counting_slots() -> None:
    """Rings of 40 slots on pages of 16, at every fill: the table lists pages in ring order."""
    ring, pages = 40, [[5, 0, 9], [1, 4, 2], [8, 3, 7]]

    def slot(row: int, position: int) -> int:
        at = position % ring
        return pages[row][at // PAGE] * PAGE + at % PAGE

    for earlier in ((0, 17, 39), (40, 47, 48), (55, 56, 79), (80, 119, 121)):
        slots, lengths = [], []
        for row, count in enumerate(earlier):
            visible = range(max(0, count - ring + 1), count + 1)
            slots += [slot(row, position) for position in visible]
            lengths.append(len(visible))
        cu_k = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)
        cu_q = torch.arange(4, dtype=torch.int32)
        turn = batching_tables.ring_starts(torch.tensor(earlier), cu_q, ring)
        table = batching_tables.block_table(
            torch.tensor(slots), cu_k, max(lengths), PAGE, turn, ring
        )
        for row, length in enumerate(lengths):
            used = -(-length // PAGE)
            assert table[row].tolist() == pages[row][:used] + [-1] * (table.shape[1] - used)


def test_rows_that_only_pad_a_batch() -> None:
    table = torch.tensor([[7, 3], [-1, -1], [2, -1]], dtype=torch.int32)
    found, earlier = batching_tables.decode_rows(table, torch.tensor([0, 18, 18, 19]), trash_page=9)
    assert found.tolist() == [[7, 3], [9, 9], [2, -1]]
    assert earlier.tolist() == [17, 0, 0] and earlier.dtype == torch.int32


def test_nothing_is_looked_at_on_the_way_to_the_kernel() -> None:
    """The tables are found on meta tensors, which have no values to look at."""
    meta = {"device": "meta"}
    cu = torch.empty(5, dtype=torch.int32, **meta)
    slots = torch.empty(40, dtype=torch.int64, **meta)
    turn = batching_tables.ring_starts(torch.empty(4, dtype=torch.int32, **meta), cu, 40)
    assert batching_tables.block_table(slots, cu, 33, PAGE, turn, 40).shape == (4, 3)
    table = torch.empty(4, 6, dtype=torch.int32, **meta)
    assert batching_tables.decode_rows(table, cu, 9)[0].shape == (4, 6)
