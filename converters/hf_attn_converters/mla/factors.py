"""One layer's K and V as a shared latent and a shared rotated key, in closed form.

Rotary embeddings turn pairs of dimensions, here complex numbers, one frequency at a time. Any
complex multiple of a pair may move from K into Q, so the pairs of all KV heads at one frequency are
G vectors, of which a few principal components can stand for all. The components that get a place
in the rotated key keep turning. What is left stands still in the latent, with its best constant in
place of the turn: that loses little where a frequency is low or attention is near. The latent is
the principal subspace of what stands still of K and of all of V together. Both are measured in
what an error adds to the layer's output, over the inputs that the layer really sees: Q's as they
come, K's and V's by the attention that they get.

The two halves of attention forgive constants: a constant in the keys that stand still cancels in
the softmax, and a constant in V leaves as a constant, because the weights sum to one. So the latent
need carry differences alone, and V's mean goes into the output projection's bias.

Compare: TransMLA (2502.07864) rotates heads into each other until few carry the positions, and
MHA2MLA (2502.14837) picks the pairs that keep turning by their norms.

Letters: H query heads, G KV heads, D head_dim, F = D / 2 frequencies, E hidden size, A = E + 1
where the projections have a bias, else E; R columns of the latent without its constant one, P of
the rotated key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..merge.affine import Projections, attended_of, covariance_of, from_pairs, roots, to_pairs
from ..merge.method import LayerFacts


@dataclass(frozen=True)
class Factors:
    """A layer in float64. A query head h is ``turn[h] @ q[h]``, q the source's."""

    turn: Tensor  # [H, D + P, D]: the part that stands still, then the rotated part
    rotated: Tensor  # [P, A]: the shared rotated key
    latent: Tensor  # [R, E]
    keys: Tensor  # [G, D, R]: from the latent to each KV head's keys that stand still
    values: Tensor  # [G, D, R]: the same to its values
    o_bias: Tensor  # [E]: what the latent leaves out of V's mean, through the output projection


@dataclass(frozen=True)
class Pairs:
    """K's pairs by components that all KV heads share, the largest first at each frequency.

    ``z[g, f] = sum_c vectors[f, g, c] / weight[g, f] * component_c``.
    """

    z: Tensor  # [G, F, A] complex
    weight: Tensor  # [G, F]: root of how much an error in a head's pair adds to the output
    vectors: Tensor  # [F, G, G] complex, unitary: a component in each column
    energy: Tensor  # [F, G]: what leaving a component out adds to the output's error

    @classmethod
    def of(cls, p: Projections, facts: LayerFacts, reach: Tensor) -> Pairs:
        """Args: reach ``[H]`` of :func:`score_reach`."""
        columns = p.k.shape[-1]
        covariance, attended = covariance_of(facts, columns), attended_of(facts, columns)
        z, q = to_pairs(p.k, facts), to_pairs(p.q, facts)
        size = (_through(q, covariance) * q.conj()).real.sum(-1)  # [H, F]: E|q x|²
        by_head = 0.5 * reach[:, None] * size  # of a turning pair only half is along the query
        weight = by_head.unflatten(0, (-1, p.repeats)).sum(1).sqrt()
        seen = weight[..., None] * z
        gram = torch.einsum("gfa,hfa->fgh", _through(seen, attended), seen.conj())
        energy, vectors = torch.linalg.eigh(gram)
        return cls(z, weight, vectors.flip(-1), energy.flip(-1).clamp_min(0))

    def chosen(self, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first ``counts[f]`` components of each frequency, and what they leave of each pair.

        Returns: components ``[P / 2, A]``, maps ``[G, P / 2]`` with ``z = maps * component + rest``
        at each one's frequency, and the rest ``[G, F, A]``.
        """
        slots = [(f, c) for f, count in enumerate(counts.tolist()) for c in range(count)]
        frequency = torch.tensor([f for f, _ in slots])
        vectors = torch.stack([self.vectors[f, :, c] for f, c in slots], dim=1)  # [G, P / 2]
        weight, z = self.weight[:, frequency], self.z[:, frequency]
        components = torch.einsum("gs,gs,gsa->sa", vectors.conj(), weight.to(z.dtype), z)
        maps = torch.where(weight > 0, vectors / weight, torch.zeros_like(vectors))
        taken = torch.zeros_like(self.z).index_add_(1, frequency, maps[..., None] * components)
        full = (counts == len(self.z))[:, None] & (self.weight > 0).mT[..., None].all(1)
        rest = torch.where(full, 0.0, self.z - taken)
        # as large as the pairs that it stands for
        size = z.abs().square().sum(-1).mean(0).sqrt() / components.abs().square().sum(-1).sqrt()
        size = torch.where(size.isfinite() & (size > 0), size, 1.0)
        return components * size[:, None], maps / size, rest


def factorise(
    p: Projections, facts: LayerFacts, *, rank: int, counts: Tensor, still: Tensor, gain: float
) -> Factors:
    """One layer's factors.

    Args:
        p: the source's projections, with a bias as their last column where there is one.
        facts: with the covariance of the layer's inputs, and of those attended.
        rank: R, at most ``2 G D``.
        counts: ``[F]``: how many components of each frequency are rotated; their sum is P / 2.
        still: ``[F]`` complex, what stands for the turn of a pair that is not rotated.
        gain: what the source multiplies scores by, beside ``1 / sqrt(D)``.
    """
    dim, hidden = p.v.shape[1], p.o.shape[-1]
    mean, centred = second_moments(facts)
    covariance = covariance_of(facts, p.q.shape[-1])
    reach = score_reach(p, centred, gain)
    components, maps, rest = Pairs.of(p, facts, reach).chosen(counts)

    eye = torch.eye(dim, dtype=p.q.dtype).expand(len(p.q), dim, dim)
    pairs = to_pairs(eye, facts)  # [H, F, D]
    frequency = torch.arange(len(counts)).repeat_interleave(counts)
    owner = torch.arange(len(p.k)).repeat_interleave(p.repeats)  # [H]
    calm = from_pairs(pairs * still[..., None], facts)
    turning = from_pairs(pairs[:, frequency] * maps[owner].conj()[..., None], facts)

    queries = calm @ p.q  # [H, D, A]
    moments = torch.einsum("h,hda,ab,hcb->hdc", reach, queries, covariance, queries)
    inner = torch.einsum("hde,hce->hdc", p.o, p.o)
    weights = torch.stack([moments, inner]).unflatten(1, (-1, p.repeats)).sum(2)  # [2, G, D, D]
    root, inverse = roots(weights)
    heads = torch.stack([from_pairs(rest, facts), p.v])[..., :hidden]  # [2, G, D, E]
    stacked = (root @ heads).flatten(0, 2)
    basis = torch.linalg.eigh(stacked @ centred @ stacked.mT).eigenvectors[:, -rank:]
    latent = basis.mT @ stacked
    keys, values = inverse @ basis.unflatten(0, heads.shape[:3])
    size = p.v[..., :hidden].norm(dim=-1).mean() / latent.norm(dim=-1).square().mean().sqrt()
    size = size if size.isfinite() and size > 0 else torch.ones_like(size)

    middle = p.v @ mean[: p.v.shape[-1]] - values @ (latent @ mean[:hidden])  # [G, D]
    return Factors(
        turn=torch.cat([calm, turning], dim=1) * gain * ((dim + 2 * len(components)) / dim) ** 0.5,
        rotated=from_pairs(components, facts),
        latent=latent * size,
        keys=keys / size,
        values=values / size,
        o_bias=torch.einsum("hd,hde->e", middle[owner], p.o),
    )


def score_reach(p: Projections, centred: Tensor, gain: float) -> Tensor:
    """``[H]``: how much an error of 1 in a head's unscaled q·k adds to the output's square.

    An error in a score moves weight between keys, so it counts by how much the head's answers
    differ: the variance of its values behind the output projection.
    """
    hidden = p.o.shape[-1]
    v = p.v[..., :hidden]
    spread = torch.einsum("gda,ab,gcb->gdc", v, centred, v).repeat_interleave(p.repeats, dim=0)
    variance = torch.einsum("hde,hdc,hce->h", p.o, spread, p.o)
    return variance * gain**2 / p.v.shape[1]


def second_moments(facts: LayerFacts) -> tuple[Tensor, Tensor]:
    """The attended inputs' mean with a 1 appended `[E + 1]`, and their covariance about it."""
    moments = attended_of(facts)
    mean = moments[-1] / moments[-1, -1]
    return mean, moments[:-1, :-1] - torch.outer(mean[:-1], mean[:-1])


def _through(x: Tensor, matrix: Tensor) -> Tensor:
    """Complex ``[..., A]`` times a real ``[A, A]``."""
    return torch.complex(x.real @ matrix, x.imag @ matrix)
