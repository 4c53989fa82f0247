"""Models that cache latents: their layers hand these to the attention function unexpanded.

Every latent attention of transformers caches ``[B, 1, K, R]`` and ``[B, 1, K, P]`` and passes them
through its method `expand_kv` before it calls the attention function. On each such layer, not on
its class, this puts a method that leaves them as they are while the layer's implementation is
``triton_mla``. Copies of a model take it along; a pickled one finds the class's own again, and gets
ours back at its next call.

Touches `expand_kv` and `kv_b_proj` of transformers' attention layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .compat import PreTrainedModel

NAME = "triton_mla"
INSTEAD = "load it with attn_implementation='triton_fa2'"


def refusal(model_class: type[PreTrainedModel]) -> tuple[str, str] | None:
    """(reason, fix) why a model class cannot take ``triton_mla``, None if it can."""
    from .compat import latent_attention

    kind = latent_attention(model_class)
    if kind == "full":
        return None
    if kind == "sparse":
        return (
            f"{model_class.__name__} picks its keys with an indexer (sparse attention), which the "
            "kernels over latents do not follow",
            "load it with attn_implementation='sdpa'",
        )
    return (
        f"{model_class.__name__} has no multi-head latent attention (no kv_lora_rank): there is "
        "no latent to attend to",
        INSTEAD,
    )


def prepare(model: nn.Module) -> None:
    """Let every latent attention layer within `model` hand its latents over."""
    for module in model.modules():
        if callable(getattr(type(module), "expand_kv", None)):
            hand_over(module)


def hand_over(module: nn.Module) -> None:
    """The same for one layer; a second time changes nothing."""
    # named like the method it stands for: that is what a pickle looks up
    module.__dict__["expand_kv"] = MethodType(expand_kv, module)


def hands_over(module: nn.Module) -> bool:
    """Whether the attention function gets latents from this layer, rather than keys and values."""
    found = module.__dict__.get("expand_kv")
    return isinstance(found, MethodType) and found.__func__ is expand_kv


def only_multiplies(linear: Any) -> bool:
    """Whether calling `kv_b_proj` comes to a product with its weight and nothing else.

    Hooks do more; adapters, parametrizations and some quantisations change its class, others the
    class of its weight, accelerate's offloading its `forward`.
    """
    import torch
    from torch.distributed.tensor import DTensor
    from torch.nn.modules import module

    hooks = (
        linear._forward_hooks, linear._forward_pre_hooks,
        module._global_forward_hooks, module._global_forward_pre_hooks,
    )  # fmt: skip
    return (
        type(linear) is torch.nn.Linear
        and linear.bias is None
        and type(linear.weight) in (torch.nn.Parameter, torch.Tensor, DTensor)
        and "forward" not in vars(linear)
        and not any(hooks)
    )


def parameters(module: Any) -> Iterator[Tensor]:
    """What a layer's expansion is trained by."""
    yield from module.kv_b_proj.parameters()


def expand_kv(self: Any, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for a layer's own method: ``[B, 1, K, R]`` and ``[B, 1, K, P]`` stay as they are."""
    from .compat import implementation_of

    if implementation_of(self.config) == NAME:
        return kv_nope, k_rot
    return expanded(self, kv_nope, k_rot)


def expanded(module: Any, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """Keys ``[B, H, K, N + P]`` and values ``[B, H, K, V]`` as the layer's own class makes them."""
    keys, values = type(module).expand_kv(module, kv_nope, k_rot)
    return keys, values
