"""Which pairs keep turning: one choice for all layers, made before the first is converted.

The frequencies of the rotated key stand in config.json, so all layers share them; which component
of K has a place is each layer's own. What a component loses when it stands still depends on how far
attention reaches: a place goes to the frequency where rotating one more component spares the layers
most, each layer's loss counted as a share of what its K says in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """F frequencies of the source, P columns of the rotated key."""

    frequencies: Tensor  # [F] float32, of a pair's turn per token
    counts: Tensor  # [F] int64: how many components of each frequency keep turning
    still: Tensor  # [F] complex: what best stands for the turn of those that do not
    gain: Tensor  # []: what the source's rotary embedding multiplies scores by

    @property
    def slots(self) -> Tensor:
        """``[P / 2]`` float32: the frequency of each rotated pair."""
        return self.frequencies.repeat_interleave(self.counts)

    def tensors(self) -> dict[str, Tensor]:
        """For a file of safetensors, which has no complex numbers."""
        return {
            "frequencies": self.frequencies,
            "counts": self.counts,
            "still": torch.view_as_real(self.still).contiguous(),
            "gain": self.gain,
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Rotation:
        """The inverse of :meth:`tensors`."""
        still = torch.view_as_complex(tensors["still"])
        return cls(tensors["frequencies"], tensors["counts"], still, tensors["gain"])


def choose(energies: Tensor, still: Tensor, pairs: int) -> Tensor:
    """``[F]`` int64: how many components of each frequency get one of `pairs` places.

    Args:
        energies: ``[F, G]``, what leaving out the c-th component of a frequency loses; falls
            along c.
        still: ``[F]``; its square is the share that is kept without a place.
    """
    gains = energies * (1 - still.abs().square())[:, None]
    order = gains.flatten().argsort(descending=True, stable=True)[:pairs]
    return torch.bincount(order // gains.shape[1], minlength=len(gains))


def mean_turn(distances: Tensor, frequencies: Tensor) -> Tensor:
    """``[F]`` complex128, E[e^{iwΔ}]: the constant nearest to a pair's turn over a distance Δ.

    Args:
        distances: ``[S]``, how much is attended at a distance of 0, 1, ... tokens.
    """
    angles = frequencies.double()[:, None] * torch.arange(len(distances))
    turns = torch.polar(torch.ones_like(angles), angles)
    return (turns * (distances / distances.sum())).sum(-1)
