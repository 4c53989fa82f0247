"""check(): would this model run with that implementation here, on what, and if not, what then?"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import torch

from .capabilities import Accepted, Rejected, Verdict
from .registration import model_check
from .registry import IMPLEMENTATIONS, AttentionImpl, is_registered
from .swa_config import stored
from .transformers_compat import compat, private_names
from .transformers_compat.config_values import layer_value
from .transformers_compat.model_code import parts

NOT_CAUSAL = "use attn_implementation='triton_fa2'"


def check(
    model_or_config_or_name: Any,
    device: torch.device | str | None = None,
    implementation: str = "triton_fa2",
) -> Verdict:
    """Whether a model would run with an implementation, on which backend and why.

    Args:
        model_or_config_or_name: a model, a config, or what ``AutoConfig.from_pretrained`` takes.
        device: where the tensors will be; by default the model's own, else the best one here.
        implementation: a name of :func:`list_implementations`.

    Returns:
        ``Accepted(backend, reason)`` or ``Rejected(reason, fix)``; ``.ok`` tells them apart.

    Raises:
        OSError: a name that AutoConfig cannot find.
    """
    impl = _find(implementation)
    if isinstance(impl, Rejected):
        return impl
    refusal = private_names.refusal(impl.name)
    if refusal is not None:
        return Rejected(*refusal)
    if not is_registered(impl.name):
        return Rejected(
            f"{impl.name!r} is not registered with transformers", "call hf_attn_patch.register()"
        )
    model, config = _resolve(model_or_config_or_name)
    refused = _model_verdict(model, config, impl)
    if refused is not None:
        return refused
    verdict = impl.requires.check(_device_type(model, device))
    if isinstance(verdict, Rejected):
        return verdict
    return Accepted(verdict.backend, f"{_describe(config)}: {verdict.reason}")


def _find(name: str) -> AttentionImpl | Rejected:
    for impl in IMPLEMENTATIONS:
        if impl.name == name:
            return impl
    known = [impl.name for impl in IMPLEMENTATIONS]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return Rejected(
        f"there is no attention implementation {name!r}", f"{hint}possible: {', '.join(known)}"
    )


def _resolve(subject: Any) -> tuple[compat.PreTrainedModel | None, Any]:
    if isinstance(subject, compat.PreTrainedModel):
        return subject, subject.config
    if isinstance(subject, compat.PretrainedConfig):
        return None, subject
    from transformers import AutoConfig

    return None, AutoConfig.from_pretrained(subject, trust_remote_code=False)


def _model_verdict(
    model: compat.PreTrainedModel | None, config: Any, impl: AttentionImpl
) -> Rejected | None:
    model_class = type(model) if model is not None else compat.model_class_of(config)
    if model_class is None:
        return Rejected(
            f"transformers has no model class for {config.model_type!r}",
            "pass the model itself instead of its config or name",
        )
    for part, model_type in _parts(model, model_class, config):
        refused = model_check.refusal(part, model_type, impl.name)
        if refused is not None:
            return Rejected(*refused)
    text = config.get_text_config(decoder=True)
    dim = compat.head_dim_of(text)
    if dim is not None and dim > impl.supports.head_dim_forward:
        return Rejected(
            f"head_dim is {dim}, the largest possible is {impl.supports.head_dim_forward}",
            "use attn_implementation='sdpa'",
        )
    if impl.supports.rolling_cache:
        return _window_verdict(text)
    return None


def _parts(
    model: compat.PreTrainedModel | None, model_class: type[compat.PreTrainedModel], config: Any
) -> Iterator[tuple[type[compat.PreTrainedModel], str]]:
    """Every model that would be built with the name, outermost first, and its model_type."""
    if model is not None:
        for module in model.modules():
            if isinstance(module, compat.PreTrainedModel):
                yield type(module), module.config.model_type
        return
    for part in parts(model_class):
        kind = config if part is model_class else getattr(part, "config_class", None)
        yield part, getattr(kind, "model_type", "") or config.model_type
    for name in getattr(config, "sub_configs", None) or ():  # built through an auto class
        inner = getattr(config, name, None)
        inner_class = None if inner is None else compat.model_class_of(inner)
        if inner_class is not None:
            yield from _parts(None, inner_class, inner)


def _window_verdict(text: Any) -> Rejected | None:
    if stored(text) is not None or layer_value(text, "sliding_window"):
        return None
    return Rejected(
        f"a model of type {text.model_type!r} has no window in its config",
        "load it and call hf_attn_patch.configure_swa(model, window=4096), or " + NOT_CAUSAL,
    )


def _device_type(model: compat.PreTrainedModel | None, device: torch.device | str | None) -> str:
    if device is not None:
        return torch.device(device).type
    if model is not None:
        return str(model.device.type)
    for kind in ("cuda", "xpu"):
        backend = getattr(torch, kind, None)
        if backend is not None and backend.is_available():
            return kind
    return "cpu"


def _describe(config: Any) -> str:
    text = config.get_text_config(decoder=True)
    heads = layer_value(text, "num_attention_heads")
    kv_heads = layer_value(text, "num_key_value_heads") or heads
    described = [f"{config.model_type}"]
    if heads:
        described.append(f"{heads} query and {kv_heads} key/value heads")
    dim = compat.head_dim_of(text)
    if dim:
        described.append(f"head_dim {dim}")
    window = layer_value(text, "sliding_window")
    if window:
        described.append(f"window {window}")
    return ", ".join(described)
