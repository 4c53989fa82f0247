"""The doors: what transformers holds and calls, and the two tables where it holds them.

Nothing heavy is imported until a door is used. So the implementations can be registered at the very
moment transformers' modelling code is imported, also when this package itself is what imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..swa_config import SwaSettings


class _Behind(NamedTuple):
    """What the doors lead to."""

    attend: Callable[..., tuple[Tensor, Tensor | None]]
    answer: Callable[..., Tensor | None]
    own_windows: SwaSettings


# Kept once a door was used: every layer of every step passes here, and to look for a module would
# take it a tenth of a small step's attention.
_behind: _Behind | None = None


def _open() -> _Behind:
    global _behind
    from ..attention.dense import attend
    from ..masking.functions import answer
    from ..swa_config import OWN_WINDOWS

    _behind = _Behind(attend, answer, OWN_WINDOWS)
    return _behind


def fa2_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``triton_fa2``: query ``[B, Hq, Q, D]``, key, value ``[B, Hkv, K, D]`` to ``[B, Q, Hq, Dv]``.

    Arguments as transformers documents them for its attention interface.
    """
    behind = _behind or _open()
    return behind.attend(
        "triton_fa2", behind.own_windows, module, query, key, value, attention_mask, **kwargs
    )


def paged_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``triton_paged_flash2``: as ``triton_fa2``, and continuous batching where a `cache` comes."""
    if cache is not None:
        from ..attention.continuous import attend_pages

        return attend_pages(module, query, key, value, cache, **kwargs), None
    if "write_index" in kwargs:
        from ..attention.continuous import refuse_without_pages

        refuse_without_pages()
    behind = _behind or _open()
    name = "triton_paged_flash2"
    return behind.attend(
        name, behind.own_windows, module, query, key, value, attention_mask, **kwargs
    )


def swa_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``triton_swa``: causal layers see the configured window and sinks; else as ``triton_fa2``.

    Raises:
        ValueError: neither configure_swa nor the model's config gives a window.
    """
    from ..swa_config import required

    behind = _behind or _open()
    settings = required(getattr(module, "config", None))
    return behind.attend(
        "triton_swa", settings, module, query, key, value, attention_mask, **kwargs
    )


def mla_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``triton_mla``: query ``[B, H, Q, D]``, latents ``[B, 1, K, R]`` and rotated keys
    ``[B, 1, K, P]`` as they are cached, to ``[B, Q, H, Dv]``.

    Raises:
        ValueError: a layer without latents, or whose expanding weights are not plain.
    """
    from ..attention.mla import attend

    return attend(module, query, key, value, attention_mask, **kwargs)


def fa2_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """Mask for ``triton_fa2``: arguments as transformers' ``sdpa_mask``, answer in compact form."""
    behind = _behind or _open()
    return behind.answer(
        "triton_fa2", behind.own_windows, batch_size, q_length, kv_length, **kwargs
    )


def paged_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """Mask for ``triton_paged_flash2``: as for ``triton_fa2``; continuous batching reads none."""
    behind = _behind or _open()
    name = "triton_paged_flash2"
    return behind.answer(name, behind.own_windows, batch_size, q_length, kv_length, **kwargs)


def mla_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """Mask for ``triton_mla``: as for ``triton_fa2``."""
    behind = _behind or _open()
    return behind.answer(
        "triton_mla", behind.own_windows, batch_size, q_length, kv_length, **kwargs
    )


def swa_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """Mask for ``triton_swa``: the same, narrowed to the configured window and sinks."""
    from ..swa_config import required

    behind = _behind or _open()
    settings = required(kwargs.get("config"))
    return behind.answer("triton_swa", settings, batch_size, q_length, kv_length, **kwargs)
