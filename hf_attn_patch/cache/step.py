"""One forward pass over a paged cache: what all layers need to know, worked out once.

Shape letters: B rows, S new columns (padding included).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .block_pool import NOBODYS
from .block_table import Changes, PageTables


@dataclass(frozen=True)
class Step:
    """The tokens of one forward pass.

    Args:
        length: columns before it; new: S.
        before: each row's tokens before it; after: with the new ones, which come last in a row.
        held: `before` as ``[B]`` int32 on the device; grown: `after`.
        entered: numbers of the layers that have asked for it; written: whose pages hold its tokens.
    """

    length: int
    new: int
    before: Sequence[int]
    after: Sequence[int]
    held: Tensor
    grown: Tensor
    entered: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)

    @property
    def fresh(self) -> bool:
        """Nothing was there before."""
        return not any(self.before)

    @property
    def whole(self) -> bool:
        """Every row has S new tokens."""
        return all(b - a == self.new for a, b in zip(self.before, self.after, strict=True))


@dataclass
class DeviceTable:
    """A table's copy on the device, kept up to date by what changes."""

    page_size: int
    table: Tensor | None = None  # [B, max_blocks] int32, -1 where there is no page
    doubles: set[tuple[int, int]] = field(default_factory=set)  # of the last extension
    _slots: tuple[Step, Tensor] | None = None

    def update(self, tables: PageTables, changes: Changes, device: torch.device) -> None:
        self.doubles = changes.doubles
        width = max(map(len, tables.rows), default=0)
        if self.table is None or self.table.shape[1] < width or self.table.device != device:
            # room to grow: a wider table is a new tensor
            room = max(width, 1 if self.table is None else width * 3 // 2)
            rows = [row + [-1] * (room - len(row)) for row in tables.rows]
            self.table = torch.tensor(rows, dtype=torch.int32).to(device)
        elif changes.columns:
            at = torch.tensor(changes.columns).to(device)
            self.table[at[:, 0], at[:, 1]] = at[:, 2].to(torch.int32)

    def slots(self, step: Step) -> Tensor:
        """Where the new tokens go, ``[B, S]``: page * page_size + place.

        Padding, and what another row writes too, goes to the page that is nobody's.
        """
        if self._slots is None or self._slots[0] is not step:
            self._slots = (step, self._places(step))
        return self._slots[1]

    def _places(self, step: Step) -> Tensor:
        assert self.table is not None
        device = self.table.device
        table = self.table.long()
        if self.doubles:
            rows, columns = torch.tensor(sorted(self.doubles)).unbind(1)
            table[rows.to(device), columns.to(device)] = NOBODYS
        column = torch.arange(step.new, device=device)
        position = step.grown.long()[:, None] - step.new + column  # [B, S]
        real = position >= step.held[:, None]
        position = position.clamp_min(0)
        page = table.gather(1, position // self.page_size).clamp_min(NOBODYS)
        page = torch.where(real, page, NOBODYS)
        return page * self.page_size + position % self.page_size
