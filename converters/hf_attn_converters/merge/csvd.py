"""Covariance-weighted SVD: each group's heads share the best subspace, in closed form.

A layer has exact freedoms: a value head may be multiplied by any invertible matrix when the output
projection undoes it; a key head under RoPE by one complex number per frequency, without RoPE by
any invertible matrix, when its queries undo it. Each member of a group is approximated by the
shared head times a map of its own; the map is then moved into q or o, where it costs nothing. The
shared head is the least-squares optimum over the inputs that the layer really sees, weighted by
what the queries and the output projection make of it, and by the attention that each token gets.

Compare: ASVD and Palu (2407.21118) for low-rank K and V with activation statistics, and
align-before-merge (2412.20677), which rotates and then averages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..families.layouts import LayerHeads
from .affine import (
    attended_of,
    covariance_of,
    from_pairs,
    layer_heads,
    projections,
    roots,
    square_root,
    to_pairs,
)
from .mean import pool
from .method import LayerFacts, MergeMethod


def merge(layer: LayerHeads, count: int, facts: LayerFacts) -> LayerHeads:
    p = projections(layer)
    group, repeats = p.k.shape[0] // count, p.repeats
    attended = attended_of(facts, p.v.shape[-1])
    keys, values = [], []
    for number in range(count):
        members = slice(number * group, (number + 1) * group)
        readers = slice(members.start * repeats, members.stop * repeats)
        # [g, r, D, .]: the query heads of each member
        q, o = (x[readers].unflatten(0, (group, repeats)) for x in (p.q, p.o))

        weights = torch.einsum("grde,grce->gdc", o, o)
        shared, maps = shared_head(p.v[members], weights, attended)
        values.append(shared)
        p.o[readers] = torch.einsum("gdc,grde->grce", maps, o).flatten(0, 1)

        if facts.k_free:
            shared, q = _merge_keys(p.k[members], q, facts)
            keys.append(shared)
            p.q[readers] = q.flatten(0, 1)
    p.k = torch.stack(keys) if facts.k_free else pool(p.k, count)
    p.v = torch.stack(values)
    return layer_heads(p, layer)


def _merge_keys(k: Tensor, q: Tensor, facts: LayerFacts) -> tuple[Tensor, Tensor]:
    """k `[g, D, A]` and its queries `[g, r, D, A]` -> the shared key `[D, A]`, new queries."""
    turned, columns = facts.rotary_dims, k.shape[-1]
    covariance, attended = covariance_of(facts, columns), attended_of(facts, columns)
    parts: list[tuple[Tensor, Tensor]] = []
    if turned:
        z, zq = to_pairs(k, facts), to_pairs(q, facts)
        asked = (zq @ square_root(covariance).to(zq.dtype)).abs().square()
        importance = asked.sum(dim=(1, -1))  # [g, F]
        shared, maps = shared_pairs(z, importance, square_root(attended))
        new = from_pairs(zq * maps.conj()[:, None, :, None], facts)
        parts.append((from_pairs(shared, facts), new))
    if turned < k.shape[1]:
        still, asking = k[:, turned:], q[:, :, turned:]
        weights = torch.einsum("grda,ab,grcb->gdc", asking, covariance, asking)
        head, maps = shared_head(still, weights, attended)
        parts.append((head, torch.einsum("gdc,grda->grca", maps, asking)))
    return torch.cat([x for x, _ in parts]), torch.cat([x for _, x in parts], dim=2)


def shared_head(heads: Tensor, weights: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """One head for several: heads_h ≈ maps_h @ shared, optimal for inputs with `covariance`.

    Args:
        heads: ``[g, D, A]``; weights ``[g, D, D]``, how much an error in each head's output counts
            (OᵀO for values, E[q qᵀ] for keys); covariance ``[A, A]`` of the inputs.

    Returns:
        shared ``[D, A]``, as large as the mean member, and maps ``[g, D, D]``.
    """
    members, dim, _ = heads.shape
    root, inverse = roots(weights)
    stacked = (root @ heads).flatten(0, 1)  # [g * D, A]
    basis = torch.linalg.eigh(stacked @ covariance @ stacked.mT).eigenvectors[:, -dim:]
    shared = basis.mT @ stacked
    maps = inverse @ basis.unflatten(0, (members, dim))
    scale = _scale(heads.norm(dim=(1, 2)).mean(), shared.norm())
    return shared * scale, maps / scale


def shared_pairs(z: Tensor, importance: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """The same under RoPE, frequency by frequency: z_h ≈ maps_h * shared, complex.

    Args:
        z: ``[g, F, A]`` complex; importance ``[g, F]``; root ``[A, A]`` of the covariance.

    Returns:
        shared ``[F, A]`` and maps ``[g, F]``, complex.
    """
    weight = importance.sqrt()
    seen = (weight[..., None] * z) @ root.to(z.dtype)
    gram = torch.einsum("gfa,hfa->fgh", seen, seen.conj())
    top = torch.linalg.eigh(gram).eigenvectors[..., -1]  # [F, g]
    shared = torch.einsum("fg,gf,gfa->fa", top.conj(), weight.to(z.dtype), z)
    maps = torch.where(weight > 0, top.mT / weight, torch.zeros_like(top.mT))
    scale = _scale(z.abs().square().sum(-1).mean(0).sqrt(), shared.abs().square().sum(-1).sqrt())
    return shared * scale[:, None], maps / scale


def _scale(wanted: Tensor, found: Tensor) -> Tensor:
    return torch.where((wanted > 0) & (found > 0), wanted / found, torch.ones_like(found))


METHOD = MergeMethod(
    name="csvd",
    summary="shared subspace weighted by the covariance of the layer's inputs; closed form",
    touches=("q", "k", "v", "o"),
    merge=merge,
    calibrated=True,
)
