"""Which tokens each row holds, so that pages can be found again by what is in them.

Prompts are read at once; what is generated stays on its device until somebody asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor


def page_keys(
    ids: Sequence[int], page_size: int, known: Sequence[bytes] = (), seed: bytes = b""
) -> list[bytes]:
    """A key for each full page of a row: it depends on all tokens up to the page's end.

    `known` are the keys of its first pages, if they have been made before. `seed` says what beside
    the tokens made the pages.
    """
    keys = list(known)
    for begin in range(len(keys) * page_size, len(ids) - page_size + 1, page_size):
        page = " ".join(map(str, ids[begin : begin + page_size]))
        before = keys[-1] if keys else seed
        keys.append(blake2b(before + page.encode(), digest_size=16).digest())
    return keys


class History:
    """Token ids of each row, padding left out."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.clear()

    def clear(self, rows: int = 0, seed: bytes | None = b"") -> None:
        """So many empty rows."""
        self.begin([[] for _ in range(rows)], seed)

    def begin(self, ids: Sequence[Sequence[int]], seed: bytes | None = b"") -> None:
        """Rows of these tokens; `seed` as in :func:`page_keys`, None if nobody knows."""
        self.complete = seed is not None  # nothing is unknown
        self.has_news = False  # tokens were read since keys were last asked for
        self.seed = seed
        self._ids = [list(row) for row in ids]
        self._keys: list[list[bytes]] = [[] for _ in ids]
        # of all rows, not read yet: [B, 1], and what should be each token's place in its row
        self._later: list[tuple[Tensor, Tensor | None]] = []

    def give_up(self) -> None:
        """These rows hold what tokens alone do not tell: they have no keys any more."""
        self.complete = self.has_news = False
        self._later.clear()

    def add(self, ids: Tensor | None, real: Sequence[int], positions: Tensor | None = None) -> None:
        """The new tokens ``[B, S]``, of which the last ``real[r]`` count; None: nobody knows.

        `positions` ``[..., B|1, 1]`` of single tokens have to be their places, or nothing is known.
        """
        if ids is None:
            self.give_up()
        elif not self.complete:
            return
        elif ids.shape[1] == 1 and all(real):
            self._later.append((ids, positions))
        else:
            self._read()
            self.has_news = self.complete
            for row, new, count in zip(self._ids, ids.tolist(), real, strict=True):
                row += new[len(new) - count :]

    def keys(self) -> list[list[bytes]]:
        """Keys of each row's full pages; none when tokens are unknown. Waits for the device."""
        if self.complete:
            self._read()
        if not self.complete or self.seed is None:
            return [[] for _ in self._ids]
        self._keys = [
            page_keys(ids, self.page_size, keys, self.seed)
            for ids, keys in zip(self._ids, self._keys, strict=True)
        ]
        return self._keys

    def select(self, indices: Sequence[int]) -> None:
        """Rows become copies of the rows at `indices`."""
        self._ids = [list(self._ids[i]) for i in indices]
        self._keys = [list(self._keys[i]) for i in indices]
        later, self._later = self._later, []
        for ids, positions in later:
            rows = torch.tensor(indices, device=ids.device)
            if positions is not None and positions.shape[-2] > 1:
                positions = positions.index_select(-2, rows.to(positions.device))
            self._later.append((ids[rows], positions))

    def shorten(self, tokens: Sequence[int]) -> None:
        """Keep so many tokens of each row."""
        if self.complete:
            self._read()
        if not self.complete:
            return
        for ids, keys, count in zip(self._ids, self._keys, tokens, strict=True):
            del ids[count:]
            del keys[count // self.page_size :]

    def _read(self) -> None:
        if not self._later:
            return
        later, self._later = self._later, []
        before = torch.tensor([len(row) for row in self._ids])[:, None]
        for step, (_, positions) in enumerate(later):
            if positions is not None and bool((positions.cpu() != before + step).any()):
                self.give_up()
                return
        for row, new in zip(self._ids, torch.cat([x for x, _ in later], 1).tolist(), strict=True):
            row += new
