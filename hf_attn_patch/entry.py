"""The doors: what transformers holds and calls, and the two tables where it holds them.

Nothing heavy is imported until a door is used. So the implementations can be registered at the very
moment transformers' modelling code is imported, also when this package itself is what imports it.
What every decode step calls imports by full names: to find a relative one takes twice as long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def fa2_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``triton_fa2``: query ``[B, Hq, Q, D]``, key, value ``[B, Hkv, K, D]`` to ``[B, Q, Hq, Dv]``.

    Arguments as transformers documents them for its attention interface.
    """
    from hf_attn_patch.forward import attend
    from hf_attn_patch.swa_settings import OWN_WINDOWS

    return attend("triton_fa2", OWN_WINDOWS, module, query, key, value, attention_mask, **kwargs)


def paged_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``triton_paged_flash2``: as ``triton_fa2``, and continuous batching where a `cache` comes."""
    from hf_attn_patch.forward import attend
    from hf_attn_patch.swa_settings import OWN_WINDOWS

    if cache is not None:
        from .continuous import attend_pages

        return attend_pages(module, query, key, value, cache, **kwargs), None
    name = "triton_paged_flash2"
    return attend(name, OWN_WINDOWS, module, query, key, value, attention_mask, **kwargs)


def swa_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``triton_swa``: causal layers see the configured window and sinks; else as ``triton_fa2``.

    Raises:
        ValueError: neither configure_swa nor the model's config gives a window.
    """
    from .forward import attend
    from .swa_settings import required

    settings = required(getattr(module, "config", None))
    return attend("triton_swa", settings, module, query, key, value, attention_mask, **kwargs)


def mla_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``triton_mla``: query ``[B, H, Q, D]``, latents ``[B, 1, K, R]`` and rotated keys
    ``[B, 1, K, P]`` as they are cached, to ``[B, Q, H, Dv]``.

    Raises:
        ValueError: a layer without latents, or whose expanding weights are not plain.
    """
    from .mla import attend

    return attend(module, query, key, value, attention_mask, **kwargs)


def fa2_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """Mask for ``triton_fa2``: arguments as transformers' ``sdpa_mask``, answer in compact form."""
    from hf_attn_patch.masks import answer
    from hf_attn_patch.swa_settings import OWN_WINDOWS

    return answer("triton_fa2", OWN_WINDOWS, batch_size, q_length, kv_length, **kwargs)


def paged_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """Mask for ``triton_paged_flash2``: as for ``triton_fa2``; continuous batching reads none."""
    from hf_attn_patch.masks import answer
    from hf_attn_patch.swa_settings import OWN_WINDOWS

    name = "triton_paged_flash2"
    return answer(name, OWN_WINDOWS, batch_size, q_length, kv_length, **kwargs)


def mla_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """Mask for ``triton_mla``: as for ``triton_fa2``."""
    from .masks import answer
    from .swa_settings import OWN_WINDOWS

    return answer("triton_mla", OWN_WINDOWS, batch_size, q_length, kv_length, **kwargs)


def swa_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """Mask for ``triton_swa``: the same, narrowed to the configured window and sinks."""
    from .masks import answer
    from .swa_settings import required

    settings = required(kwargs.get("config"))
    return answer("triton_swa", settings, batch_size, q_length, kv_length, **kwargs)


def interfaces() -> tuple[tuple[str, dict[str, Any]], ...]:
    """transformers' global name -> function tables, attention first, with a word for messages."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    return (
        ("attention", AttentionInterface._global_mapping),
        ("mask", AttentionMaskInterface._global_mapping),
    )


def batching_prefix() -> str:
    """What continuous batching puts before a name; from transformers 5.19 on, nothing."""
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return "paged|" if (int(major), int(minor)) < (5, 19) else ""
