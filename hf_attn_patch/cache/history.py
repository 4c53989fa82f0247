"""Which tokens each row holds, so that pages can be found again by what is in them.

Prompts are read at once; what is generated stays on its device until somebody asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor


def page_keys(ids: Sequence[int], page_size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """A key for each full page of a row: it depends on all tokens up to the page's end.

    `known` are the keys of its first pages, if they have been made before.
    """
    keys = list(known)
    for begin in range(len(keys) * page_size, len(ids) - page_size + 1, page_size):
        page = " ".join(map(str, ids[begin : begin + page_size]))
        before = keys[-1] if keys else b""
        keys.append(blake2b(before + page.encode(), digest_size=16).digest())
    return keys


class History:
    """Token ids of each row, padding left out."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.clear()

    def clear(self, rows: int = 0) -> None:
        """So many empty rows."""
        self.begin([[] for _ in range(rows)])

    def begin(self, ids: Sequence[Sequence[int]]) -> None:
        """Rows of these tokens."""
        self.complete = True  # no token is unknown
        self.has_news = False  # tokens were read since keys were last asked for
        self._ids = [list(row) for row in ids]
        self._keys: list[list[bytes]] = [[] for _ in ids]
        self._later: list[Tensor] = []  # [B, S], of all rows, not read yet

    def add(self, ids: Tensor | None, real: Sequence[int]) -> None:
        """The new tokens ``[B, S]``, of which the last ``real[r]`` count; None: nobody knows."""
        if ids is None:
            self.complete = False
        if not self.complete or ids is None:
            self._later.clear()
        elif ids.shape[1] == 1 and all(real):
            self._later.append(ids)
        else:
            self._read()
            self.has_news = True
            for row, new, count in zip(self._ids, ids.tolist(), real, strict=True):
                row += new[len(new) - count :]

    def keys(self) -> list[list[bytes]]:
        """Keys of each row's full pages; none when tokens are unknown. Waits for the device."""
        if not self.complete:
            return [[] for _ in self._ids]
        self._read()
        self._keys = [
            page_keys(ids, self.page_size, keys)
            for ids, keys in zip(self._ids, self._keys, strict=True)
        ]
        return self._keys

    def select(self, indices: Sequence[int]) -> None:
        """Rows become copies of the rows at `indices`."""
        self._ids = [list(self._ids[i]) for i in indices]
        self._keys = [list(self._keys[i]) for i in indices]
        self._later = [ids[torch.tensor(indices, device=ids.device)] for ids in self._later]

    def shorten(self, tokens: Sequence[int]) -> None:
        """Keep so many tokens of each row."""
        if not self.complete:
            return
        self._read()
        for ids, keys, count in zip(self._ids, self._keys, tokens, strict=True):
            del ids[count:]
            del keys[count // self.page_size :]

    def _read(self) -> None:
        if self._later:
            later = torch.cat(self._later, dim=1).tolist()
            self._later.clear()
            for row, new in zip(self._ids, later, strict=True):
                row += new
