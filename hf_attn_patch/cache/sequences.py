"""The rows of a batch in all kinds of layers: what they hold, share and have in common with before.

Numbers only, no memory: whoever holds the memory carries out the :class:`.block_table.Changes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from .block_pool import OutOfPagesError, PagePool
from .block_table import Changes, PageTables
from .prefix import History

# tokens behind a window that stay, so that assisted generation can take back its guesses
ROLLBACK = 64
FOREVER = 1 << 62

Window = int | None
PageBytes = Callable[[], Mapping[Window, int]]  # bytes of a page over all layers of a window


class Rows:
    """Rows of tokens, each in one table per window.

    Args:
        windows: those of the model's layers, each with the number of first tokens kept besides.
        page_size: tokens of a page.
        max_bytes: of all pages; None for no limit.
    """

    def __init__(
        self, windows: Mapping[Window, int], page_size: int, max_bytes: int | None = None
    ) -> None:
        self.page_size, self.max_bytes = page_size, max_bytes
        self.tables = {
            window: PageTables(PagePool(), page_size, window, sinks)
            for window, sinks in windows.items()
        }
        self.tokens: list[int] = []
        self.history = History(page_size)
        self.keep_all = False  # until the next `shorten`
        self.asked = self.found = 0

    def begin(self, count: int, seed: bytes | None = b"") -> None:
        """Empty rows in the place of all others; `seed` as in :func:`.prefix.page_keys`."""
        self.clear()
        self.tokens = [0] * count
        self.history.clear(count, seed)
        for table in self.tables.values():
            table.rows = [[] for _ in range(count)]

    def resume(
        self,
        ids: Sequence[Sequence[int]],
        width: int,
        trust: bool = True,
        seed: bytes | None = b"",
    ) -> int:
        """New rows of `ids`, given what the present and earlier rows left in pages.

        All rows end in the same column of a batch `width` wide, padded on the left, and are to be
        computed from the same column on: that is returned. Without `trust` what the present rows
        hold is not used, with another `seed` than they had nothing is found.
        """
        if trust:
            self.remember()
        self.clear()
        history = History(self.page_size)
        history.begin(ids, seed)
        # the last token is always computed: its logits are wanted
        keys = [
            k[: (len(r) - 1) // self.page_size] for k, r in zip(history.keys(), ids, strict=True)
        ]
        column = min(
            width - len(row) + self.page_size * min(t.match(k) for t in self.tables.values())
            for row, k in zip(ids, keys, strict=True)
        )
        tokens = [max(0, column - (width - len(row))) for row in ids]
        # a row cut shorter than it was matched may look at pages that are gone
        if not all(
            table.holds(k, count)
            for table in self.tables.values()
            for k, count in zip(keys, tokens, strict=True)
        ):
            column, tokens = 0, [0] * len(ids)
        for table in self.tables.values():
            for k, count in zip(keys, tokens, strict=True):
                table.adopt(k, count)
        history.shorten(tokens)
        self.history, self.tokens = history, tokens
        self.asked += sum(map(len, ids))
        self.found += sum(tokens)
        return column

    def extend(
        self,
        new: Sequence[int],
        width: int,
        ids: Tensor | None,
        page_bytes: PageBytes,
        positions: Tensor | None = None,
    ) -> dict[Window, Changes]:
        """``new[r]`` more tokens in row r; `ids` ``[B, width]`` ends with them, if it is known.

        `positions` as in :meth:`.prefix.History.add`.

        Raises OutOfPagesError, nothing changed.
        """
        before = self.tokens
        after = [old + count for old, count in zip(before, new, strict=True)]
        self._make_room(before, after, page_bytes)
        self.history.add(ids, new, positions)
        keys = self.history.keys() if width > 1 else None
        changes = {
            window: table.extend(before, after, keys, self._slack)
            for window, table in self.tables.items()
        }
        self.tokens = after
        return changes

    def settle(self) -> None:
        """After a forward pass: prompts become findable, and what no window shows is let go."""
        if self.history.has_news:
            self.remember()
        for table in self.tables.values():
            table.drop(self.tokens, self._slack)

    def remember(self) -> None:
        """Make all full pages findable by their tokens."""
        keys = self.history.keys()
        self.history.has_news = False
        for table in self.tables.values():
            table.remember(keys)

    def shorten(self, remove: int) -> None:
        """Take `remove` tokens back from the end of each row.

        Raises ValueError, nothing changed, where a window needs pages that were let go.
        """
        tokens = [max(0, count - remove) for count in self.tokens]
        for window, table in self.tables.items():
            if not all(table.kept_from(row, count) for row, count in enumerate(tokens)):
                raise ValueError(
                    f"cannot take back {remove} tokens: a window of {window} would then need keys "
                    "that were let go. Call cache.activate_past_recording() before they are added."
                )
        for table in self.tables.values():
            table.shorten(tokens)
        self.history.shorten(tokens)
        self.tokens, self.keep_all = tokens, False

    def select(self, indices: Sequence[int]) -> None:
        """Rows become copies of the rows at `indices`."""
        for table in self.tables.values():
            table.select(indices)
        self.history.select(indices)
        self.tokens = [self.tokens[i] for i in indices]

    def clear(self) -> None:
        """No rows; pages known by their contents stay."""
        for table in self.tables.values():
            table.clear()
        self.tokens, self.keep_all = [], False
        self.history.clear()

    def reset(self) -> None:
        """No rows, and no pages."""
        self.clear()
        for table in self.tables.values():
            table.pool = PagePool()

    @property
    def _slack(self) -> int:
        return FOREVER if self.keep_all else ROLLBACK

    def _make_room(
        self, before: Sequence[int], after: Sequence[int], page_bytes: PageBytes
    ) -> None:
        """Set each pool's limit by what is left of `max_bytes`, or raise OutOfPagesError."""
        if self.max_bytes is None:
            return
        sizes = page_bytes()
        pools = {window: table.pool for window, table in self.tables.items()}
        spare = self.max_bytes - sum(p.size * sizes[w] for w, p in pools.items())
        growth = {}
        for window, table in self.tables.items():
            pool = pools[window]
            wanted = table.needed(before, after, self._slack) - pool.free - pool.kept
            growth[window] = max(0, wanted)
            spare -= growth[window] * sizes[window]
        if spare < 0:
            size = sum(sizes.values())
            missing = -(spare // size)
            raise OutOfPagesError(
                f"the paged cache is full: {len(after)} rows of up to {max(after)} tokens need "
                f"{missing} pages of {self.page_size} tokens ({-spare:,} bytes) more than "
                f"max_bytes={self.max_bytes:,} allows. Raise it to {self.max_bytes - spare:,}, "
                "give fewer rows or shorter prompts at a time, or use dtype='fp8'.",
                missing,
            )
        for window, pool in pools.items():
            share = max(0, spare) // len(pools) // max(1, sizes[window])
            pool.limit = pool.size + growth[window] + share
