"""What is to be computed, as independent pieces: rows of a batch, or sequences of a packed one.

Padding disappears here: a piece holds only keys that its queries may see, so that nothing
downstream masks padding and nothing reads it (it may hold NaN).

Shape letters as in :mod:`..problem`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch_invariance import batch_invariant
from .pages import Keys, PagedKeys

NO_SEQUENCE = -1  # the number of tokens that belong to none


@dataclass(frozen=True, kw_only=True)
class Work:
    """Queries and keys that belong together: equal rows of a batch, one row, or one sequence.

    Local indices count from the first query and the first key of the piece. Local query i is
    aligned with the key at position ``i + offset``; a key's position is its local index, unless
    `positions` says otherwise.
    """

    rows: slice  # of q's batch
    key_rows: slice  # of k's batch; another row only in a KV cache
    queries: slice
    keys: slice
    number: int  # first row of the batch, or the sequence: where bias, slopes and dropout look
    offset: int
    first: int  # index, in its sequence, of the key at position 0
    exact: bool = False  # read no key that no query sees: its page may be another's by now
    positions: Tensor | None = None  # [kept keys] int64, position of each when the mask has holes

    @property
    def row_count(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def query_count(self) -> int:
        return int(self.queries.stop - self.queries.start)

    @property
    def key_count(self) -> int:
        if self.positions is not None:
            return self.positions.numel()
        return int(self.keys.stop - self.keys.start)

    def keys_before(self, position: int) -> int:
        """How many of the keys stand before `position`."""
        if self.positions is None:
            return min(max(position, 0), self.key_count)
        return int(torch.searchsorted(self.positions, position))

    def select_keys(self, x: Keys) -> Keys:
        """This piece's part of k or v: ``[B, K, H, D]`` -> ``[rows, keys, H, D]``."""
        if isinstance(x, PagedKeys):
            return x.starting_at(self.keys.start)
        part = x[self.key_rows, self.keys]
        return part if self.positions is None else part.index_select(1, self.positions)


def dense_works(batch: int, q_len: int, k_len: int, keep: Tensor | None) -> list[Work]:
    """Pieces of a dense batch; neighbouring rows with the same padding stay together."""
    together = not batch_invariant()
    if keep is None and not together:
        return [_row_work(row, row + 1, q_len, k_len, 0, k_len) for row in range(batch)]
    if keep is None or (together and bool(keep.all())):
        return [_row_work(0, batch, q_len, k_len, 0, k_len)] if batch else []
    counts = keep.sum(dim=1).tolist()
    starts = keep.int().argmax(dim=1).tolist()
    ends = (k_len - keep.flip(1).int().argmax(dim=1)).tolist()
    works: list[Work] = []
    row = 0
    while row < batch:
        if counts[row] == 0:
            start = end = 0
        else:
            start, end = starts[row], ends[row]
        if end - start != counts[row]:
            positions = keep[row, start:end].nonzero().flatten()
            works.append(_row_work(row, row + 1, q_len, k_len, start, end, positions))
            row += 1
            continue
        last = row + 1
        while (
            together
            and last < batch
            and (counts[last], starts[last], ends[last])
            == (
                counts[row],
                starts[row],
                ends[row],
            )
        ):
            last += 1
        works.append(_row_work(row, last, q_len, k_len, start, end))
        row = last
    return works


def _row_work(
    row: int, last: int, q_len: int, k_len: int, start: int, end: int, at: Tensor | None = None
) -> Work:
    return Work(
        rows=slice(row, last),
        key_rows=slice(row, last),
        queries=slice(0, q_len),
        keys=slice(start, end),
        number=row,
        offset=k_len - q_len - start,
        first=start,
        positions=at,
    )


def packed_works(cu_q: Tensor, cu_k: Tensor, total_q: int) -> list[Work]:
    """Pieces of a packed batch, given as a batch of one row: its sequences."""
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    numbered = [*enumerate(zip(bounds_q[1:], bounds_k[1:], strict=True))]
    numbered.append((NO_SEQUENCE, (total_q, bounds_k[-1])))  # tokens behind the last: no keys
    works = []
    q0, k0 = 0, 0
    for number, (q1, k1) in numbered:
        if q1 > q0:
            works.append(
                Work(
                    rows=slice(0, 1),
                    key_rows=slice(0, 1),
                    queries=slice(q0, q1),
                    keys=slice(k0, k1),
                    number=number,
                    offset=(k1 - k0) - (q1 - q0),
                    first=0,
                )
            )
        q0, k0 = q1, k1
    return works


def broadcast_row(t: Tensor, work: Work) -> Tensor:
    """The piece's rows of a tensor whose batch dimension may be 1."""
    if t.shape[0] == 1:
        return t
    return t[work.number : work.number + work.row_count]
