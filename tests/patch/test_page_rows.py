"""Pages and tables: whatever happens to rows, each reads its own tokens and no page is lost.

A row's tokens are kept beside as a plain list. A page's contents are simulated: written where the
tables say, copied when they say so, and overwritten with rubbish when nobody owns them.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_patch.cache.block_pool import NOBODYS, OutOfPagesError, PagePool
from hf_attn_patch.cache.block_table import GONE, PageTables
from hf_attn_patch.cache.prefix import page_keys
from hf_attn_patch.cache.sequences import ROLLBACK, Rows
from hf_attn_patch.cache.stats import filled

PAGE = 4
RUBBISH = -7


class Memory:
    """Rows with a simulated memory, and what they should hold."""

    def __init__(self, windows: dict[int | None, int], max_pages: int | None = None) -> None:
        self.rows = Rows(windows, PAGE, max_pages)
        self.pages: dict[int | None, dict[int, list[int]]] = {w: {} for w in windows}
        self.texts: list[list[int]] = []
        self.revocable = 0  # tokens that every row can surely take back

    def append(self, new: list[list[int]]) -> None:
        if not self.texts:
            self.rows.begin(len(new))
            self.texts = [[] for _ in new]
        width = max(map(len, new))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in new])
        counts = [len(row) for row in new]
        self.rows.settle()
        self.spoil()
        before = self.rows.tokens
        changes = self.rows.extend(counts, width, ids, lambda: dict.fromkeys(self.pages, 1))
        for window, change in changes.items():
            held, table = self.pages[window], self.rows.tables[window]
            for source, target in change.copies:
                held[target] = list(held[source])
            for number, (row, old, pages) in enumerate(zip(new, before, table.rows, strict=True)):
                for at, token in enumerate(row, old):
                    column = at // PAGE
                    if pages[column] != GONE and (number, column) not in change.doubles:
                        # a page that others read is not written, but by who has just taken it
                        assert table.pool.owners(pages[column]) == 1 or column * PAGE >= old
                        held.setdefault(pages[column], [RUBBISH] * PAGE)[at % PAGE] = token
        for text, row in zip(self.texts, new, strict=True):
            text += row
        self.revocable = min(ROLLBACK, self.revocable + min(counts))
        self.check()

    def resume(self, texts: list[list[int]]) -> None:
        width = max(map(len, texts))
        column = self.rows.resume(texts, width)
        self.spoil()
        kept = [max(0, column - (width - len(text))) for text in texts]
        assert kept == self.rows.tokens
        assert all(count < len(text) for count, text in zip(kept, texts, strict=True))
        self.texts = [text[:count] for text, count in zip(texts, kept, strict=True)]
        self.revocable = 0
        self.check()

    def spoil(self) -> None:
        """What nobody owns and nobody can find is overwritten, as any later owner might."""
        for window, held in self.pages.items():
            occupied = set(self.rows.tables[window].pool.occupied())
            for page in held.keys() - occupied:
                held[page] = [RUBBISH] * PAGE

    def check(self) -> None:
        for window, table in self.rows.tables.items():
            pool = table.pool
            owned = Counter(page for row in table.rows for page in row if page != GONE)
            assert NOBODYS not in owned
            assert all(pool.owners(page) == owned[page] for page in range(1, pool.size))
            assert pool.used == len(owned)
            assert pool.used + pool.free + pool.kept == pool.size - 1
            for text, row in zip(self.texts, table.rows, strict=True):
                begin = 0 if window is None else max(0, len(text) - window + 1)
                sinks = self.rows.tables[window].sinks
                for at, token in enumerate(text):
                    if at >= begin or at < sinks:
                        page = row[at // PAGE]
                        assert page != GONE
                        assert self.pages[window][page][at % PAGE] == token


def random_steps(seed: int, steps: int) -> None:
    draw = random.Random(seed)
    memory = Memory({None: 0, 6: 2, 9: 0})
    past: list[list[int]] = [[1, 2, 3]]

    def line(most: int) -> list[int]:
        return [draw.randrange(3) for _ in range(draw.randrange(1, most))]

    for _ in range(steps):
        count = len(memory.texts)
        kind = draw.choice(["step", "step", "step", "chunk", "fork", "crop", "resume", "free"])
        if count == 0 or kind == "resume":
            texts = [
                draw.choice(past)[: draw.randrange(1, 60)] + line(12)
                for _ in range(draw.randrange(1, 5))
            ]
            memory.resume(texts)
            memory.append([t[len(k) :] for t, k in zip(texts, memory.texts, strict=True)])
            past = (past + [list(text) for text in texts])[-6:]
        elif kind == "step":
            memory.append([[draw.randrange(3)] for _ in range(count)])
        elif kind == "chunk":
            memory.append(
                [line(14) if draw.random() < 0.8 else [] for _ in range(count - 1)] + [[1]]
            )
        elif kind == "fork":
            memory.rows.settle()
            indices = [draw.randrange(count) for _ in range(draw.randrange(1, 6))]
            memory.rows.select(indices)
            memory.texts = [list(memory.texts[i]) for i in indices]
            memory.check()
        elif kind == "crop":
            remove = min(memory.revocable, draw.randrange(0, 8))
            memory.revocable -= remove
            memory.rows.shorten(remove)
            memory.texts = [text[: max(0, len(text) - remove)] for text in memory.texts]
            memory.check()
        else:
            past = (past + [list(text) for text in memory.texts])[-6:]
            memory.rows.settle()
            memory.rows.remember()
            memory.rows.clear()
            memory.texts = []
            memory.check()
    memory.rows.reset()
    assert all(table.pool.used == 0 for table in memory.rows.tables.values())


@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_ten_thousand_random_steps(seed: int) -> None:
    random_steps(seed, steps=400)


def test_the_simulation_sees_a_lost_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: written without being copied first, a shared page spoils another row."""
    monkeypatch.setattr(PageTables, "_must_copy", lambda *args: False)
    with pytest.raises(AssertionError):
        for seed in range(20):
            random_steps(seed, steps=100)


def test_waste_is_small_where_contiguous_rows_waste_much() -> None:
    draw = random.Random(0)
    lengths = [draw.randrange(1, 2049) for _ in range(256)]
    rows = Rows({None: 0}, 16)
    rows.begin(len(lengths))
    rows.extend(lengths, max(lengths), None, lambda: {None: 1})
    (table,) = rows.tables.values()
    used = table.pool.used * 16
    assert filled(table, lengths) == sum(lengths)
    paged, contiguous = 1 - sum(lengths) / used, 1 - sum(lengths) / (len(lengths) * max(lengths))
    assert paged < 0.04 < 0.4 < contiguous, (paged, contiguous)


def test_windows_keep_pages_bounded() -> None:
    memory = Memory({8: 4})
    (table,) = memory.rows.tables.values()
    most = 0
    for step in range(600):
        memory.append([[step % 3], [step % 2]])
        most = max(most, table.pool.used)
    assert most <= 2 * (1 + (8 + ROLLBACK) // PAGE + 2)


def test_a_long_first_prompt_takes_pages_for_its_window_only() -> None:
    memory = Memory({8: 4})
    memory.append([[i % 3 for i in range(1000)]])
    (table,) = memory.rows.tables.values()
    assert table.pool.size <= 1 + 1 + (8 + ROLLBACK) // PAGE + 2


def test_out_of_pages_changes_nothing() -> None:
    memory = Memory({None: 0}, max_pages=6)  # page 0 is one of them
    memory.append([[1, 2, 3], [1, 2, 3, 4, 5]])
    (table,) = memory.rows.tables.values()
    rows = [list(row) for row in table.rows]
    with pytest.raises(OutOfPagesError, match=r"need 2 pages of 4 tokens .* more than") as caught:
        memory.rows.extend([9, 9], 9, None, lambda: {None: 1})
    assert caught.value.missing == 2
    assert table.rows == rows
    assert memory.rows.tokens == [3, 5]
    memory.append([[4], [6, 7]])


def test_kept_pages_are_given_up_for_new_rows_longest_unused_first() -> None:
    memory = Memory({None: 0}, max_pages=5)
    first, second = [1] * 5, [2] * 5
    for text in (first, second):
        memory.resume([text])
        memory.append([text[len(memory.texts[0]) :]])
    memory.resume([[*first, 3]])
    assert memory.rows.tokens == [4]  # its page was kept
    memory.append([[1, 3, 3, 3, 3, 3, 3, 3, 3]])
    memory.resume([[*second, 3]])
    assert memory.rows.tokens == [0]  # its page was taken


def test_keys_depend_on_all_that_is_before() -> None:
    a, b = page_keys([1, 2, 3, 4, 5, 6, 7, 8, 9], 4), page_keys([0, 2, 3, 4, 5, 6, 7, 8], 4)
    assert len(a) == len(b) == 2
    assert not set(a) & set(b)
    assert page_keys([1, 2, 3, 4, 5, 6, 7, 8], 4, known=a[:1]) == a
    assert page_keys([1, 23, 4, 5], 4) != page_keys([12, 3, 4, 5], 4)


def test_a_pool_gives_each_page_once() -> None:
    pool = PagePool()
    pages = pool.take(5)
    assert len({*pages}) == 5 and NOBODYS not in pages
    pool.share(pages[0])
    pool.release(pages[0])
    assert pool.shared == 0 and pool.used == 5
    pool.release(pages[0])
    assert pool.used == 4
    limited = PagePool(size=1, limit=3)
    with pytest.raises(OutOfPagesError, match="1 of them"):
        limited.take(3)
    assert limited.used == 0
