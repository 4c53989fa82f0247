"""What the source's heads attend to: how much to each token, and how far.

Attention is anything but even. A first token that takes most of the weight, near tokens, names:
what such keys and values say must be kept more exactly than what hardly any query reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Attended:
    """One call of a layer's attention. Letters: N sequences, S tokens."""

    received: Tensor  # [N, S]: how much a token's value counts
    together: Tensor  # [N, S, S]: the weights of all heads, summed: a row for each query

    @classmethod
    def of(cls, maps: Iterable[Tensor]) -> Attended:
        """From the weights ``[N, S, S]`` of each head.

        An error in one value reaches an output by the square of the weight that the query gives it.
        """
        received = together = torch.zeros(())
        for weights in maps:
            received = received + weights.square().sum(-2)
            together = together + weights
        return cls(received, together)

    def distances(self) -> Tensor:
        """``[S]`` float64: how much is attended at a distance of 0, 1, ... tokens back.

        A text's first token is left out: heads rest on it wherever they are.
        """
        length = self.together.shape[-1]
        rows, columns = torch.tril_indices(length, length, device=self.together.device)
        rows, columns = rows[columns > 0], columns[columns > 0]
        found = torch.zeros(length, dtype=torch.float64)
        weights = self.together.sum(0)[rows, columns]
        return found.index_add_(0, (rows - columns).cpu(), weights.double().cpu())


@contextmanager
def watching(module: nn.Module, see: Callable[[Attended], None]) -> Iterator[None]:
    """`see` is told of every attention of a module, be it torch's function or eager, which
    returns its weights."""

    def look(module: nn.Module, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor):  # [N, H, S, S]
            see(Attended.of(weights.unbind(1)))

    handle = module.register_forward_hook(look)
    try:
        with _Calls(see):
            yield
    finally:
        handle.remove()


class _Calls(TorchFunctionMode):
    """Sees the calls of torch's attention."""

    def __init__(self, see: Callable[[Attended], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            self.see(Attended.of(weights_of(*args, **(kwargs or {}))))
        return func(*args, **(kwargs or {}))


def weights_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Iterator[Tensor]:
    """The weights in :func:`torch.nn.functional.scaled_dot_product_attention` of the same.

    ``[N, S, S]`` of each query head, one head at a time: they are large.
    """
    repeats = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    unseen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    unseen = unseen.triu(1) if is_causal else torch.zeros_like(unseen)
    for head in range(query.shape[1]):
        scores = query[:, head].float() @ key[:, head // repeats].float().mT * scale
        if attn_mask is not None:
            mask = attn_mask[:, head if attn_mask.shape[1] > 1 else 0]
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -torch.inf)
            else:
                scores = scores + mask
        yield scores.masked_fill(unseen, -torch.inf).softmax(-1)
