"""Each group's heads are turned towards their common mean, then averaged.

As align-before-merge (Jin et al., 2412.20677): rotations are free where the other side of the
product undoes them. Alignment is judged on the layer's real inputs, by their covariance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..families.layouts import LayerHeads
from .affine import covariance_of, from_pairs, layer_heads, projections, square_root, to_pairs
from .mean import pool
from .method import LayerFacts, MergeMethod

ROUNDS = 10  # of generalised Procrustes analysis; it has settled long before


def merge(layer: LayerHeads, count: int, facts: LayerFacts) -> LayerHeads:
    p = projections(layer)
    group, repeats = p.k.shape[0] // count, p.repeats
    root = square_root(covariance_of(facts, p.v.shape[-1]))
    turned = facts.rotary_dims
    for first in range(0, p.k.shape[0], group):
        members = slice(first, first + group)
        readers = slice(first * repeats, (first + group) * repeats)
        turns = rotations(p.v[members] @ root)
        p.v[members] = turns @ p.v[members]
        p.o[readers] = turns.repeat_interleave(repeats, 0) @ p.o[readers]
        if not facts.k_free:
            continue
        if turned:
            z, zq = to_pairs(p.k[members], facts), to_pairs(p.q[readers], facts)
            phases = pair_phases(z @ root.to(z.dtype))  # [g, F]
            p.k[members, :turned] = from_pairs(phases[..., None] * z, facts)
            zq = phases.repeat_interleave(repeats, 0)[..., None] * zq
            p.q[readers, :turned] = from_pairs(zq, facts)
        if turned < p.k.shape[1]:
            turns = rotations(p.k[members, turned:] @ root)
            p.k[members, turned:] = turns @ p.k[members, turned:]
            p.q[readers, turned:] = turns.repeat_interleave(repeats, 0) @ p.q[readers, turned:]
    p.k, p.v = pool(p.k, count), pool(p.v, count)
    return layer_heads(p, layer)


def rotations(heads: Tensor) -> Tensor:
    """Orthogonal `[g, D, D]` that bring `[g, D, A]` closest to their common mean."""
    turns = torch.eye(heads.shape[1], dtype=heads.dtype).repeat(heads.shape[0], 1, 1)
    goal = heads[0]
    for _ in range(ROUNDS):
        left, _, right = torch.linalg.svd(goal @ heads.mT)
        turns = left @ right
        goal = (turns @ heads).mean(dim=0)
    return turns


def pair_phases(pairs: Tensor) -> Tensor:
    """Complex numbers of size 1, `[g, F]`, that bring `[g, F, A]` closest to their mean."""
    phases = torch.ones(pairs.shape[:2], dtype=pairs.dtype)
    goal = pairs[0]
    for _ in range(ROUNDS):
        inner = torch.einsum("fa,gfa->gf", goal, pairs.conj())
        size = inner.abs()
        phases = torch.where(size > 0, inner / size, torch.ones_like(inner))
        goal = (phases[..., None] * pairs).mean(dim=0)
    return phases


METHOD = MergeMethod(
    name="procrustes",
    summary="heads rotated towards their mean, then averaged; needs calibration",
    touches=("q", "k", "v", "o"),
    merge=merge,
    calibrated=True,
)
