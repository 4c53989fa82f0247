"""What methods share that rotate heads: weights with their bias, RoPE's pairs as complex numbers.

Letters: H heads, D head_dim, E hidden size, A = E + 1 where the projections have a bias, else E;
g members of a group, r query heads per KV head, F frequencies (rotary_dims / 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..families.layouts import LayerHeads, Part, Role
from .method import LayerFacts

# eigenvalues below this share of the largest are rounding, not directions
NEGLIGIBLE = 1e-12


@dataclass
class Projections:
    """A layer in float64 with each bias as a last column; o is `[Hq, D, E]`, without its bias."""

    q: Tensor  # [Hq, D, A]
    k: Tensor  # [Hkv, D, A]
    v: Tensor  # [Hkv, D, A]
    o: Tensor  # [Hq, D, E]

    @property
    def repeats(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[0] // self.k.shape[0]


def projections(layer: LayerHeads) -> Projections:
    biased = any(part.kind == "bias" for part in layer)

    def with_bias(role: Role) -> Tensor:
        weight = layer[Part(role, "weight")].double()
        if not biased:
            return weight.clone()
        bias = layer.get(Part(role, "bias"))
        column = weight.new_zeros(weight.shape[:2]) if bias is None else bias.double()
        return torch.cat([weight, column[..., None]], dim=-1)

    o = layer[Part("o", "weight")].double().clone()
    return Projections(with_bias("q"), with_bias("k"), with_bias("v"), o)


def layer_heads(p: Projections, like: LayerHeads) -> LayerHeads:
    """The inverse of :func:`projections`, in the dtype and with the parts of `like`."""
    by_role = {"q": p.q, "k": p.k, "v": p.v, "o": p.o}
    found: dict[Part, Tensor] = {}
    for part, old in like.items():
        x = by_role[part.role]
        if part.kind == "bias":
            x = x[..., -1]
        elif part.role != "o":
            x = x[..., : old.shape[-1]]
        found[part] = x.to(old.dtype)
    return found


def covariance_of(facts: LayerFacts, columns: int | None = None) -> Tensor:
    """`[A, A]`: what of the covariance belongs to projections of that many columns; None: all."""
    assert facts.covariance is not None, "a calibrated method was called without a covariance"
    return facts.covariance[:columns, :columns].double()


def attended_of(facts: LayerFacts, columns: int | None = None) -> Tensor:
    """`[A, A]`: the same of tokens as keys and values, each by the attention that it gets."""
    if facts.attended is None:
        return covariance_of(facts, columns)
    return facts.attended[:columns, :columns].double()


def square_root(matrix: Tensor) -> Tensor:
    """The symmetric root of a positive semidefinite `[..., n, n]`."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT
    return root


def roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric roots of positive semidefinite `[..., n, n]`, and their pseudo-inverses."""
    values, vectors = torch.linalg.eigh(matrices)
    real = values > NEGLIGIBLE * values.amax(dim=-1, keepdim=True)
    root = values.clamp_min(0).sqrt() * real
    inverse = torch.where(real, 1 / root, 0.0)
    return (vectors * root[..., None, :]) @ vectors.mT, (
        vectors * inverse[..., None, :]
    ) @ vectors.mT


def to_pairs(heads: Tensor, facts: LayerFacts) -> Tensor:
    """The rotary dimensions of `[..., D, A]` as complex `[..., F, A]`."""
    part = heads[..., : facts.rotary_dims, :]
    if facts.interleaved:
        return torch.complex(part[..., 0::2, :], part[..., 1::2, :])
    real, imaginary = part.chunk(2, dim=-2)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def from_pairs(pairs: Tensor, facts: LayerFacts) -> Tensor:
    """The inverse of :func:`to_pairs`: complex `[..., F, A]` -> `[..., rotary_dims, A]`."""
    both = (pairs.real, pairs.imag)
    if facts.interleaved:
        return torch.stack(both, dim=-2).flatten(-3, -2)
    return torch.cat(both, dim=-2)
