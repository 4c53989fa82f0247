"""What a merge method is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..layouts import LayerHeads, Role


@dataclass(frozen=True, kw_only=True)
class MergeMethod:
    name: str
    summary: str
    # The roles it is given, all of one layer together, and must give back. A method that also
    # rotates queries or outputs lists q and o here.
    touches: tuple[Role, ...]
    # (layer in canonical form and compute precision, KV heads wanted) -> the same parts, with
    # that many heads in k and v. Called only when the wanted number divides the present one.
    merge: Callable[[LayerHeads, int], LayerHeads]
