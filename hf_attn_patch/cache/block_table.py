"""Which pages each row of a batch reads, for the layers of one kind. Numbers only, no memory.

Rows count their own tokens from 0, padding is never stored. Column c of a row holds its tokens
``c * page_size`` to ``(c + 1) * page_size - 1``; a column whose page was let go, because no later
query sees it through the window, is GONE.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from .block_pool import PagePool

GONE = -1


@dataclass
class Changes:
    """What one extension did, for those who hold the memory and the table's copy on the device."""

    columns: list[tuple[int, int, int]] = field(default_factory=list)  # (row, column, page)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (from page, to page)
    # (row, column) that another row of the same extension fills with the same tokens
    doubles: set[tuple[int, int]] = field(default_factory=set)


class PageTables:
    """The pages of each row.

    Args:
        pool: where pages come from; not shared with other tables.
        page_size: tokens of a page.
        window: tokens that a query sees, its own among them; None for all.
        sinks: first tokens that it sees besides.
    """

    def __init__(
        self, pool: PagePool, page_size: int, window: int | None = None, sinks: int = 0
    ) -> None:
        self.pool = pool
        self.page_size = page_size
        self.window = window
        self.sinks = sinks
        self.rows: list[list[int]] = []

    def needed(self, before: Sequence[int], after: Sequence[int], slack: int = 0) -> int:
        """Pages that :meth:`extend` takes at most."""
        count = 0
        for row, old, new in zip(self.rows, before, after, strict=True):
            count += self._columns(new) - len(row) - len(self._never_read(old, new, slack))
            count += self._must_copy(row, old, new)
        return count

    def extend(
        self,
        before: Sequence[int],
        after: Sequence[int],
        keys: Sequence[Sequence[Hashable]] | None = None,
        slack: int = 0,
    ) -> Changes:
        """Pages for the tokens ``before[r]`` to ``after[r] - 1`` of each row r.

        A page that others also read is copied before it is written. Rows that fill a page with the
        same tokens, as `keys` (of each row's full pages) say, share it. A row's first tokens get
        none where no query after them, less `slack` tokens, will look.

        Raises OutOfPagesError, nothing changed.
        """
        changes = Changes()
        fresh = self.pool.take(self.needed(before, after, slack))
        fresh.reverse()
        together: dict[Hashable, int] = {}
        for number, (row, old, new) in enumerate(zip(self.rows, before, after, strict=True)):
            if self._must_copy(row, old, new):
                self._copy(number, row, fresh.pop(), changes)
            elif new > old and old % self.page_size:
                self.pool.forget(row[-1])
            known = keys[number] if keys is not None else ()
            never = self._never_read(old, new, slack)
            for column in range(len(row), self._columns(new)):
                if column in never:
                    row.append(GONE)
                    continue
                key = known[column] if column < len(known) else None
                page = together.get(key) if key is not None else None
                if page is not None:
                    self.pool.share(page)
                    changes.doubles.add((number, column))
                else:
                    page = fresh.pop()
                    if key is not None:
                        together[key] = page
                row.append(page)
                changes.columns.append((number, column, page))
        for page in fresh:  # spared by sharing
            self.pool.release(page)
        return changes

    def _columns(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _never_read(self, old: int, new: int, slack: int) -> range:
        """Columns of a row's first tokens that are behind its window as soon as they are there."""
        if old or self.window is None:
            return range(0)
        last = (new - slack - self.window + 1) // self.page_size
        return range(self._columns(self.sinks), max(self._columns(self.sinks), last))

    def _must_copy(self, row: list[int], old: int, new: int) -> bool:
        """Whether the first token goes into a page that another row reads too."""
        return new > old and old % self.page_size > 0 and self.pool.owners(row[-1]) > 1

    def _copy(self, number: int, row: list[int], page: int, changes: Changes) -> None:
        changes.copies.append((row[-1], page))
        changes.columns.append((number, len(row) - 1, page))
        self.pool.release(row[-1])
        row[-1] = page

    def remember(self, keys: Sequence[Sequence[Hashable]]) -> None:
        """What the full pages of each row hold, from its first column on."""
        for row, known in zip(self.rows, keys, strict=True):
            for page, key in zip(row, known, strict=False):
                if page != GONE:
                    self.pool.remember(page, key)

    def drop(self, tokens: Sequence[int], slack: int) -> list[tuple[int, int]]:
        """Let go what no query after ``tokens[r]`` tokens, less `slack`, sees: (row, column)."""
        if self.window is None:
            return []
        first = self._columns(self.sinks)
        gone = []
        for number, (row, count) in enumerate(zip(self.rows, tokens, strict=True)):
            # columns before `last` end before the window of the earliest query begins
            last = (count - slack - self.window + 1) // self.page_size
            for column in range(min(last, len(row)) - 1, first - 1, -1):
                if row[column] == GONE:
                    break  # and so are those before
                self.pool.release(row[column])
                row[column] = GONE
                gone.append((number, column))
        return gone

    def kept_from(self, row: int, tokens: int) -> bool:
        """Whether what a query after `tokens` tokens of a row sees is all there."""
        return all(self.rows[row][column] != GONE for column in self._seen(tokens))

    def shorten(self, tokens: Sequence[int]) -> None:
        """Keep so many tokens of each row."""
        for row, count in zip(self.rows, tokens, strict=True):
            while len(row) > self._columns(count):
                page = row.pop()
                if page != GONE:
                    self.pool.release(page)

    def select(self, indices: Sequence[int]) -> None:
        """Rows become copies of the rows at `indices`."""
        rows = [list(self.rows[index]) for index in indices]
        for page in (page for row in rows for page in row if page != GONE):
            self.pool.share(page)
        self.clear()
        self.rows = rows

    def clear(self) -> None:
        """Let go of all pages."""
        self.shorten([0] * len(self.rows))
        self.rows = []

    def match(self, keys: Sequence[Hashable]) -> int:
        """Pages of the longest beginning of `keys` after which all that a query sees is known."""
        return next((n for n in range(len(keys), 0, -1) if self.holds(keys, n * self.page_size)), 0)

    def holds(self, keys: Sequence[Hashable], tokens: int) -> bool:
        """Whether all that a query after `tokens` tokens of `keys` sees is known."""
        return all(self.pool.knows(keys[column]) for column in self._seen(tokens))

    def adopt(self, keys: Sequence[Hashable], tokens: int) -> None:
        """One more row, of `tokens` tokens that :meth:`holds` has said are there."""
        seen = set(self._seen(tokens))
        row = []
        for column in range(self._columns(tokens)):
            page = self.pool.find(keys[column]) if column in seen else GONE
            assert page is not None
            row.append(page)
        self.rows.append(row)

    def _seen(self, tokens: int) -> list[int]:
        """Columns that a query after `tokens` tokens sees."""
        begin = 0 if self.window is None else max(0, tokens - self.window + 1) // self.page_size
        end = self._columns(tokens)
        heads = range(min(self._columns(self.sinks), begin)) if self.window is not None else ()
        return [*heads, *range(begin, end)]
