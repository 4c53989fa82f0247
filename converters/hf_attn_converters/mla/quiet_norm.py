"""A latent's RMSNorm, switched off: one column is a constant that outweighs all others.

DeepSeek-V3 normalises its latents; K and V of other models are linear in the layer's input. With a
constant c in one column and x in the n others, the norm divides by sqrt((c² + |x|²) / (n + 1)),
which is a constant up to |x|² / (2 c²). c is a bias, so every other weight keeps its natural size,
trains as usual and fits bfloat16 and float16. It costs one column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOUD = 256.0  # how many times the largest possible x the constant is: an error of 8e-6 at most
HIGHEST = 2.0**15  # of the constant: float16 ends at 65504


@dataclass(frozen=True)
class QuietNorm:
    """A projection to n columns in front of such a norm, and the constant column before them."""

    weight: Tensor  # [n + 1, E]: of the projection
    bias: Tensor  # [n + 1]
    norm: Tensor  # [n + 1]: the norm's weight; 0 for the constant column, which nothing reads
    undo: float  # what reads the norm's output must multiply with


def quiet_norm(weight: Tensor, bias: Tensor | None, scales: Tensor) -> QuietNorm:
    """Args: weight ``[n, E]`` and bias ``[n]`` of x; scales ``[E]``, of the RMSNorm in front.

    What that norm gives has a length of at most sqrt(E) before its scales, hence x has a bound
    whatever the text.
    """
    count, hidden = weight.shape
    scaled = weight * scales
    largest = math.sqrt(hidden * torch.linalg.eigvalsh(scaled @ scaled.mT)[-1].clamp_min(0).item())
    if bias is not None:
        largest += bias.norm().item()
    wanted = max(LOUD * largest, 1.0)
    constant = min(2.0 ** math.ceil(math.log2(wanted)), HIGHEST)
    size = min(1.0, constant / wanted)
    # A number that bfloat16 holds, so that the gain is the same in every dtype.
    norm = torch.tensor(constant / math.sqrt(count + 1)).bfloat16().double().item()
    first = weight.new_zeros(1)
    return QuietNorm(
        weight=torch.cat([weight.new_zeros(1, hidden), weight * size]),
        bias=torch.cat(
            [first + constant, bias * size if bias is not None else first.expand(count)]
        ),
        norm=torch.cat([first, first.expand(count) + norm]),
        undo=constant / (norm * math.sqrt(count + 1) * size),
    )
