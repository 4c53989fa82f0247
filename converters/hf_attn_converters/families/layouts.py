"""Where a family keeps its attention projections, and the canonical form that methods work on.

Letters: H heads, D head_dim, E hidden size.

Canonical form: heads first. q, k, v weights are `[H, D, E]`, their biases `[H, D]`. The output
projection becomes `[H, D, E]` too (transposed), so that head h of every role is `x[h]`; its bias
belongs to no head and is never touched. A norm over the heads of a projection (OLMo2) is `[H, D]`.

One stored tensor may hold several roles. Two ways to pack them cover every family:

========== ============================ ==================================================
"stacked"  rows [Q | K | V]             Phi-3, GPT-2
"grouped"  [Hkv, Hq/Hkv + 2, D] rows:   Falcon (all three), GPT-NeoX, BLOOM, GPT-BigCode;
           each KV head stands behind   with Hkv = Hq this is view(H, 3, D), with Hkv = 1
           its own query heads          it is [Hq q, 1 k, 1 v]
========== ============================ ==================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Role = Literal["q", "k", "v", "o"]
Kind = Literal["weight", "bias", "norm"]
Pack = Literal["stacked", "grouped"]

KV_ROLES: tuple[Role, ...] = ("k", "v")


class Part(NamedTuple):
    """One tensor of one layer in canonical form: the key of `LayerHeads`."""

    role: Role
    kind: Kind


LayerHeads = Mapping[Part, Tensor]


class Heads(NamedTuple):
    """The head counts of a layer."""

    query: int
    kv: int
    dim: int

    def of(self, role: Role) -> int:
        return self.kv if role in KV_ROLES else self.query


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One module of a layer, and which heads its weight and bias hold."""

    module: str  # its path below the layer: "self_attn.qkv_proj"
    roles: tuple[Role, ...]
    pack: Pack = "stacked"
    input_major: bool = False  # stored [in, out], as GPT-2's Conv1D; a Linear is [out, in]
    norm: bool = False  # the weight is a vector over the heads, not a projection

    def parts(self, kind: str) -> tuple[Part, ...]:
        """What the stored weight or bias becomes; nothing for a bias that belongs to no head."""
        if kind == "bias" and "o" in self.roles:
            return ()
        assert kind in ("weight", "bias"), kind
        kind_of_part: Kind = "norm" if self.norm else "weight" if kind == "weight" else "bias"
        return tuple(Part(role, kind_of_part) for role in self.roles)

    def shape(self, kind: str, heads: Heads, hidden: int) -> tuple[int, ...] | None:
        """The stored shape of the weight or bias; None when there can be no such tensor."""
        rows = sum(heads.of(role) for role in self.roles) * heads.dim
        if kind == "weight":
            if self.norm:
                return (rows,)
            return (hidden, rows) if self._transposed else (rows, hidden)
        if kind == "bias" and not self.norm:
            return (hidden,) if "o" in self.roles else (rows,)
        return None

    @property
    def _transposed(self) -> bool:
        return ("o" in self.roles) != self.input_major

    def split(self, stored: Tensor, kind: str, heads: Heads) -> dict[Part, Tensor]:
        """Stored tensor -> canonical `[H, D, ...]` for each role in it."""
        parts = self.parts(kind)
        assert parts, (self.module, kind)
        rows = stored.mT if kind == "weight" and not self.norm and self._transposed else stored
        rest = rows.shape[1:]
        if self.pack == "grouped" and len(parts) > 1:
            groups = rows.reshape(heads.kv, -1, heads.dim, *rest)  # [Hkv, Hq/Hkv + 2, D, ...]
            q, k, v = groups[:, :-2].flatten(0, 1), groups[:, -2], groups[:, -1]
            return dict(zip(parts, (q, k, v), strict=True))
        counts = [heads.of(part.role) for part in parts]
        by_head = rows.reshape(-1, heads.dim, *rest)
        return dict(zip(parts, by_head.split(counts), strict=True))

    def join(self, layer: LayerHeads, kind: str) -> Tensor:
        """Canonical heads -> the stored tensor; the inverse of `split`."""
        tensors = [layer[part] for part in self.parts(kind)]
        if self.pack == "grouped" and len(tensors) > 1:
            q, k, v = tensors
            queries = q.reshape(k.shape[0], -1, *k.shape[1:])
            rows = torch.cat([queries, k[:, None], v[:, None]], dim=1).flatten(0, 2)
        else:
            rows = torch.cat(tensors).flatten(0, 1)
        transposed = kind == "weight" and not self.norm and self._transposed
        return rows.mT.contiguous() if transposed else rows.contiguous()


class Place(NamedTuple):
    """What a tensor's name says about it."""

    layer: int
    slot: Slot
    kind: str  # "weight" or "bias"; anything else (lora_A.weight, qweight, ...) is refused


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The attention slots of a family's layers, and where its layers are."""

    slots: tuple[Slot, ...]
    # The path of a layer, {} for its number. Several where a block holds several attentions.
    layer: tuple[str, ...] = ("layers.{}",)
    prefixes: tuple[str, ...] = ("model.",)  # a checkpoint may have one of them, or none

    def locate(self, name: str) -> Place | None:
        """The layer, slot and kind of the tensor `name`; None when it is no projection."""
        modules = {slot.module: slot for slot in self.slots}
        for index, pattern in enumerate(self._patterns):
            if match := pattern.fullmatch(name):
                layer = int(match[1]) * len(self.layer) + index
                return Place(layer, modules[match[2]], match[3])
        return None

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        prefix = "|".join(map(re.escape, self.prefixes))
        modules = "|".join(re.escape(slot.module) for slot in self.slots)
        return tuple(
            re.compile(
                rf"(?:{prefix})?{re.escape(path).replace(re.escape('{}'), r'([0-9]+)')}"
                rf"\.({modules})\.(.+)"
            )
            for path in self.layer
        )

    def slot_for(self, roles: tuple[Role, ...], norm: bool = False) -> Slot:
        """The slot that holds exactly these roles."""
        return next(s for s in self.slots if s.roles == roles and s.norm == norm)


def separate(*projections: str, norms: tuple[str, str] | None = None) -> tuple[Slot, ...]:
    """q, k, v and o as four Linear modules, in this order; `norms` over all heads of q and of k."""
    roles: tuple[Role, ...] = ("q", "k", "v", "o")
    slots = [
        Slot(module=module, roles=(role,)) for module, role in zip(projections, roles, strict=True)
    ]
    if norms is not None:
        slots += [Slot(module=norms[0], roles=("q",), norm=True)]
        slots += [Slot(module=norms[1], roles=("k",), norm=True)]
    return tuple(slots)


def fused(qkv: str, o: str, *, pack: Pack, input_major: bool = False) -> tuple[Slot, ...]:
    """q, k and v in one module."""
    return (
        Slot(module=qkv, roles=("q", "k", "v"), pack=pack, input_major=input_major),
        Slot(module=o, roles=("o",), input_major=input_major),
    )
