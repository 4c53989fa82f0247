"""What the source's heads attend to: how far, and how much to each token.

Attention is anything but even. A first token that takes most of the weight, near tokens, names:
what such keys say must be kept more exactly than what hardly any query reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..merge.affine import Projections, from_pairs, to_pairs
from ..merge.method import LayerFacts


@dataclass(frozen=True)
class Attention:
    """A layer's causal attention. Letters: N sequences, S tokens, E hidden size, F frequencies."""

    p: Projections
    facts: LayerFacts
    frequencies: Tensor  # [F] float32, of a pair's turn per token
    gain: float  # what scores are multiplied by, beside 1 / sqrt(D)

    def received(self, x: Tensor) -> Tensor:
        """``[N, S, E]`` -> ``[N, S]``: how much a token's key and value count.

        An error in one key or value reaches an output by the square of the weight that the query
        gives it. The root of the sum over all queries lies between that, which a first token would
        have nearly to itself, and the same for every token.
        """
        return torch.stack(
            [torch.stack([m.square().sum(0) for m in self._maps(one)]).mean(0).sqrt() for one in x]
        )

    def distances(self, x: Tensor) -> Tensor:
        """``[N, S, E]`` -> ``[S]`` float64: how much is attended at a distance of 0, 1, ... tokens.

        A text's first token is left out: heads rest on it wherever they are.
        """
        length = x.shape[1]
        rows, columns = torch.tril_indices(length, length, device=x.device)
        later = columns > 0
        rows, columns = rows[later], columns[later]
        found = torch.zeros(length, dtype=torch.float64)
        for one in x:
            together = sum(self._maps(one), torch.zeros(length, length, device=x.device))
            found.index_add_(0, (rows - columns).cpu(), together[rows, columns].double().cpu())
        return found

    @torch.no_grad()
    def _maps(self, x: Tensor) -> Iterator[Tensor]:
        """Each head's weights ``[S, S]``, one head at a time: they are large."""
        length = len(x)
        angles = self.frequencies.to(x.device)[:, None] * torch.arange(length, device=x.device)
        turn = torch.polar(torch.ones_like(angles), angles)  # [F, S]
        ones = x.new_ones(length, self.p.q.shape[-1] - x.shape[-1])
        inputs = torch.cat([x, ones], dim=-1).float().T
        q, k = (heads.to(inputs) @ inputs for heads in (self.p.q, self.p.k))  # [., D, S]
        q, k = (from_pairs(to_pairs(y, self.facts) * turn, self.facts) for y in (q, k))
        unseen = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        for head in range(len(q)):
            scores = (q[head].mT @ k[head // self.p.repeats]) * (self.gain * q.shape[1] ** -0.5)
            yield scores.masked_fill(unseen, -torch.inf).softmax(-1)
