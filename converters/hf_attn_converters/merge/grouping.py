"""Which heads share: an order of the KV heads that puts those together that lose least.

Heads may change places in q, k, v and o together without changing the model (not under ALiBi, whose
slopes are numbered). A group's cost is what csvd loses on it: the share of its keys' and of its
values' weighted energy that lies outside the best shared head. Compare QCQA (2406.10247) and
AsymGQA (2406.14963), which search for groups too, by the weights' distance or by trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..families.layouts import KV_ROLES, LayerHeads, Part
from .affine import attended_of, covariance_of, projections, square_root, to_pairs
from .method import LayerFacts

SEARCHED = 8  # heads up to which every grouping is tried
ROUNDS = 20  # of swaps at most, beyond that

Cost = Callable[[tuple[int, ...]], float]


def group_heads(layer: LayerHeads, count: int, facts: LayerFacts) -> dict[Part, Tensor]:
    """The layer with its heads in an order whose neighbours go best together."""
    cost = group_cost(layer, facts)
    heads = next(x.shape[0] for part, x in layer.items() if part.role in KV_ROLES)
    order = torch.tensor([h for group in best_groups(heads, count, cost) for h in group])
    found: dict[Part, Tensor] = {}
    for part, x in layer.items():
        repeats = x.shape[0] // heads  # query heads follow their KV head
        found[part] = x.unflatten(0, (heads, repeats))[order].flatten(0, 1)
    return found


def best_groups(heads: int, count: int, cost: Cost) -> list[tuple[int, ...]]:
    """`heads` heads in `count` groups of one size, cheap ones: the cheapest of all up to
    SEARCHED heads, beyond that where swapping two heads no longer helps."""
    size = heads // count
    known = cache(cost)
    if heads <= SEARCHED:
        return min(_partitions(tuple(range(heads)), size), key=lambda gs: sum(map(known, gs)))
    pairs = torch.zeros(heads, heads)
    for a in range(heads):
        for b in range(a):
            pairs[a, b] = pairs[b, a] = known((b, a))
    return _swapped([*range(heads)], size, pairs)


def _partitions(heads: tuple[int, ...], size: int) -> Iterator[list[tuple[int, ...]]]:
    if not heads:
        yield []
        return
    first, rest = heads[0], heads[1:]
    for others in torch.combinations(torch.arange(len(rest)), size - 1).tolist():
        chosen = (first, *(rest[i] for i in others))
        left = tuple(h for h in rest if h not in chosen)
        for groups in _partitions(left, size):
            yield [chosen, *groups]


def _swapped(order: list[int], size: int, pairs: Tensor) -> list[tuple[int, ...]]:
    """Swap heads between groups while the sum of pair costs falls."""
    groups = torch.tensor(order).view(-1, size)
    for _ in range(ROUNDS):
        improved = False
        for a in range(len(groups)):
            for b in range(a + 1, len(groups)):
                improved |= _swap_best(groups, a, b, pairs)
        if not improved:
            break
    return [tuple(group) for group in groups.tolist()]


def _swap_best(groups: Tensor, a: int, b: int, pairs: Tensor) -> bool:
    """The best swap between two groups, in place; False when none helps."""
    one, two = groups[a], groups[b]
    own = pairs[one][:, one].sum(1)[:, None] + pairs[two][:, two].sum(1)
    other = pairs[one][:, two].sum(1)[:, None] + pairs[two][:, one].sum(1)
    gain = own - other + 2 * pairs[one][:, two]
    best = int(gain.argmax())
    i, j = divmod(best, len(two))
    if gain[i, j] <= 1e-9:
        return False
    groups[a, i], groups[b, j] = groups[b, j].clone(), groups[a, i].clone()
    return True


@dataclass(frozen=True)
class _Grams:
    """Inner products of all heads' weighted rows; a group's is a part of it."""

    whole: list[Tensor]  # [H, H, D, D] each: values, keys without RoPE
    pairs: Tensor | None  # [F, H, H] complex: keys under RoPE


def group_cost(layer: LayerHeads, facts: LayerFacts) -> Cost:
    """The cost of a group of KV heads, given by their numbers."""
    grams = _grams(layer, facts)

    def cost(group: tuple[int, ...]) -> float:
        at = torch.tensor(group)
        total = 0.0
        for gram in grams.whole:
            dim = gram.shape[-1]
            part = gram[at][:, at].transpose(1, 2).flatten(2).flatten(0, 1)  # [gD, gD]
            values = torch.linalg.eigvalsh(part)
            total += _outside(values, dim)
        if grams.pairs is not None:
            values = torch.linalg.eigvalsh(grams.pairs[:, at][:, :, at])
            total += _outside(values, 1)
        return total

    return cost


def _outside(values: Tensor, kept: int) -> float:
    """The share of the sum that lies outside the `kept` largest of ascending eigenvalues."""
    whole = float(values.clamp_min(0).sum())
    return float(values[..., :-kept].clamp_min(0).sum()) / whole if whole > 0 else 0.0


def _grams(layer: LayerHeads, facts: LayerFacts) -> _Grams:
    p = projections(layer)
    covariance = covariance_of(facts, p.v.shape[-1])
    asked = square_root(covariance)
    root = square_root(attended_of(facts, p.v.shape[-1]))
    heads, turned = p.k.shape[0], facts.rotary_dims
    q, o = (x.unflatten(0, (heads, p.repeats)) for x in (p.q, p.o))
    seen = [square_root(torch.einsum("hrde,hrce->hdc", o, o)) @ p.v @ root]
    pairs = None
    if facts.k_free and turned:
        z, zq = to_pairs(p.k, facts), to_pairs(q, facts)
        size = (zq @ asked.to(zq.dtype)).abs().square().sum(dim=(1, -1)).sqrt()
        rows = size[..., None] * (z @ root.to(z.dtype))  # [H, F, A]
        pairs = torch.einsum("hfa,gfa->fhg", rows, rows.conj())
    if facts.k_free and turned < p.k.shape[1]:
        asking = q[:, :, turned:]
        weights = torch.einsum("hrda,ab,hrcb->hdc", asking, covariance, asking)
        seen.append(square_root(weights) @ p.k[:, turned:] @ root)
    return _Grams([torch.einsum("hda,gca->hgdc", x, x) for x in seen], pairs)
