"""Which pages are free, owned, shared, or kept for their contents. Numbers only, no memory.

A page has an owner count. A full page may carry a key that says what it holds; when its last owner
lets go, it is kept until its place is needed and can be found again by that key (prefix reuse as in
vLLM, Kwon et al. 2023). Page 0 is nobody's: what must be written somewhere and is never read goes
there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

NOBODYS = 0


class OutOfPagesError(RuntimeError):
    """The cache has reached its limit. `missing` pages more would have been enough."""

    def __init__(self, message: str, missing: int) -> None:
        super().__init__(message)
        self.missing = missing


class PagePool:
    """Pages 1 to `size` - 1 and who owns them.

    Args:
        size: pages to begin with, page 0 among them.
        limit: pages that it may grow to; None for no limit. With a limit kept contents are given
            up only when it is reached, without one before the pool grows.
    """

    def __init__(self, size: int = 1, limit: int | None = None) -> None:
        assert size >= 1 and (limit is None or limit >= size)
        self.size = size
        self.limit = limit
        self._owners = [0] * size
        self._free = list(range(size - 1, 0, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._key_of: dict[int, Hashable] = {}
        self._page_of: dict[Hashable, int] = {}

    @property
    def used(self) -> int:
        """Pages with an owner."""
        return self.size - 1 - len(self._free) - len(self._kept)

    @property
    def free(self) -> int:
        """Pages of the present size without contents worth keeping."""
        return len(self._free)

    @property
    def kept(self) -> int:
        """Pages without an owner that are kept for their contents."""
        return len(self._kept)

    @property
    def shared(self) -> int:
        """Pages with more than one owner."""
        return sum(count > 1 for count in self._owners)

    def occupied(self) -> list[int]:
        """Pages that hold something."""
        return [page for page in range(1, self.size) if self._owners[page] or page in self._kept]

    def available(self) -> int | None:
        """Pages that could be taken, growth included; None for no limit."""
        return None if self.limit is None else self.limit - 1 - self.used

    def missing(self, count: int) -> int:
        """How many of `count` pages could not be had."""
        available = self.available()
        return 0 if available is None else max(0, count - available)

    def take(self, count: int) -> list[int]:
        """`count` pages of one owner each. The pool grows in large steps.

        Raises OutOfPagesError, nothing taken.
        """
        if missing := self.missing(count):
            raise OutOfPagesError(
                f"{count} pages are wanted, {missing} of them are not there", missing
            )
        wanted = count - len(self._free)
        if self.limit is None:
            wanted -= self._give_up(wanted)
        if wanted > 0:
            self._grow(wanted)
            self._give_up(count - len(self._free))
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._owners[page] = 1
        return taken

    def share(self, page: int) -> None:
        """One more owner of a page that has one."""
        assert self._owners[page] > 0, page
        self._owners[page] += 1

    def release(self, page: int) -> None:
        """One owner less."""
        assert self._owners[page] > 0, page
        self._owners[page] -= 1
        if self._owners[page]:
            return
        if page in self._key_of:
            self._kept[page] = None
        else:
            self._free.append(page)

    def owners(self, page: int) -> int:
        return self._owners[page]

    def remember(self, page: int, key: Hashable) -> None:
        """Say what an owned page holds, unless another page is known to hold the same."""
        assert self._owners[page] > 0, page
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def forget(self, page: int) -> None:
        """A page's contents are about to change."""
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]
            if page in self._kept:
                del self._kept[page]
                self._free.append(page)

    def knows(self, key: Hashable) -> bool:
        return key in self._page_of

    def find(self, key: Hashable) -> int | None:
        """The page that holds what `key` says, with one more owner; None if there is none."""
        page = self._page_of.get(key)
        if page is None:
            return None
        self._kept.pop(page, None)
        self._owners[page] += 1
        return page

    def _grow(self, count: int) -> None:
        size = max(self.size + count, self.size + self.size // 2)
        if self.limit is not None:
            size = min(size, self.limit)
        self._free[:0] = range(size - 1, self.size - 1, -1)
        self._owners += [0] * (size - self.size)
        self.size = size

    def _give_up(self, count: int) -> int:
        """Make up to `count` kept pages free, those first that nobody asked for longest."""
        given = 0
        while given < count and self._kept:
            self.forget(next(iter(self._kept)))
            given += 1
        return given
