"""Where a family keeps its attention projections, and the canonical form that methods work on.

Letters: H heads, D head_dim, E hidden size.

Canonical form: heads first. q, k, v weights are `[H, D, E]`, their biases `[H, D]`. The output
projection, stored `[E, H*D]`, becomes `[H, D, E]` (transposed), so that head h of every role is
`x[h]`; its bias belongs to no head and is never touched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Role = Literal["q", "k", "v", "o"]
Kind = Literal["weight", "bias"]

KV_ROLES: tuple[Role, ...] = ("k", "v")


class Place(NamedTuple):
    """What a tensor's name says about it."""

    layer: int
    role: Role
    kind: str  # "weight" or "bias"; anything else (lora_A.weight, qweight, ...) is refused


class Part(NamedTuple):
    """One tensor of one layer in canonical form: the key of `LayerHeads`."""

    role: Role
    kind: Kind


LayerHeads = Mapping[Part, Tensor]


@dataclass(frozen=True, kw_only=True)
class SeparateLayout:
    """q, k, v and o as four Linear modules under `layers.<n>.<module>.`"""

    module: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"

    def locate(self, name: str) -> Place | None:
        """The layer, role and kind of the tensor `name`; None when it is no projection."""
        roles: dict[str, Role] = {self.q: "q", self.k: "k", self.v: "v", self.o: "o"}
        match = re.fullmatch(
            rf"(?:model\.)?layers\.(\d+)\.{re.escape(self.module)}\."
            rf"({'|'.join(map(re.escape, roles))})\.(.+)",
            name,
        )
        if match is None:
            return None
        return Place(int(match[1]), roles[match[2]], match[3])

    def split(self, tensor: Tensor, part: Part, heads: int) -> Tensor:
        """Stored tensor -> canonical `[H, D, ...]`, a view."""
        if part.role == "o":
            assert part.kind == "weight", "the output bias belongs to no head"
            tensor = tensor.mT
        return tensor.reshape(heads, -1, *tensor.shape[1:])

    def join(self, heads: Tensor, part: Part) -> Tensor:
        """Canonical `[H, D, ...]` -> the stored form; the inverse of `split`."""
        flat = heads.flatten(0, 1)
        return flat.mT.contiguous() if part.role == "o" else flat.contiguous()
