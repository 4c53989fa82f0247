"""What a merge method is, and what it is told about a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..families.layouts import LayerHeads, Role


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """One layer beside its weights. E is the hidden size."""

    rotary_dims: int = 0  # leading dimensions of each head that RoPE turns; 0: it has none
    interleaved: bool = False  # RoPE pairs (2i, 2i + 1), as GPT-J; else (i, i + rotary_dims / 2)
    k_free: bool = True  # False: a norm on q or k forbids to scale and rotate them
    # E[x̃ x̃ᵀ], [E + 1, E + 1] float64, of the attention's input with a 1 appended: x̃ = [x; 1].
    # None for methods that need no data.
    covariance: Tensor | None = None
    # The same with each token weighted by the attention that it gets. None: as they come.
    attended: Tensor | None = None
    seed: int = 0  # of methods that draw; differs by layer


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a conversion finds a layer's new weights."""

    name: str
    summary: str
    calibrated: bool = False  # needs LayerFacts.covariance
    fitted: bool = False  # each layer is fitted afterwards to what the source's layer gives


@dataclass(frozen=True, kw_only=True)
class MergeMethod(Method):
    # The roles it is given, all of one layer together, and must give back. A method that also
    # rotates queries or outputs lists q and o here.
    touches: tuple[Role, ...]
    # (layer in canonical form and compute precision, KV heads wanted, facts) -> the same parts,
    # with that many heads in k and v. Called only when the wanted number divides the present one.
    merge: Callable[[LayerHeads, int, LayerFacts], LayerHeads]
