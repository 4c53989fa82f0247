"""The mask functions: transformers calls them once per forward pass, before any layer.

They answer in the compact forms of :mod:`.formats` wherever the pattern is one that the kernels
know, and build a dense mask only where it is not, saying so once.

Trap worth knowing: generating with a static cache, transformers calls this twice and passes the
first answer in as ``attention_mask`` of the second call, so a 2D answer must also be a valid
question.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..swa_config import SwaSettings
from ..transformers_compat import compat, unsupported
from . import formats, sinks
from .patterns import MaskRequest, Pattern, read_pattern

logger = compat.logging.get_logger(__name__)


def answer(
    name: str,
    settings: SwaSettings,
    batch_size: int,
    q_length: int,
    kv_length: int,
    **kwargs: Any,
) -> Tensor | None:
    """Mask function of the implementation `name`; arguments as transformers' ``sdpa_mask``.

    Raises:
        ValueError: the config is of a model that does not call the attention function.
    """
    request = _request(name, batch_size, q_length, kv_length, kwargs)
    config = request.config
    # in this order: to read a field of a config takes longer than to know its class
    if not compat.traits(config).interface and not _adapted(config):
        unsupported.raise_unsupported(config, name)
    if settings.sinks:
        sinks.tell(request, _reach(request))
    return build(request, settings)


def _adapted(config: Any) -> bool:
    return getattr(config, "model_type", None) in unsupported.ADAPTED


def _request(
    name: str, batch: int, q_length: int, kv_length: int, kwargs: dict[str, Any]
) -> MaskRequest:
    attention_mask = kwargs.get("attention_mask")
    return MaskRequest(
        batch_size=batch,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=kwargs.get("q_offset", 0),
        kv_offset=kwargs.get("kv_offset", 0),
        mask_function=kwargs.get("mask_function", compat.causal_mask_function),
        attention_mask=None if attention_mask is None else attention_mask.bool(),
        causal_skip=kwargs.get("allow_is_causal_skip", True),
        bidirectional_skip=kwargs.get("allow_is_bidirectional_skip"),
        local_size=kwargs.get("local_size"),
        use_vmap=kwargs.get("use_vmap", False),
        device=kwargs.get("device", "cpu"),
        config=kwargs.get("config"),
        named_flash="flash" in name,
    )


def build(request: MaskRequest, settings: SwaSettings) -> Tensor | None:
    """The mask of a request in its most compact form."""
    pattern = read_pattern(request)
    if pattern is None:
        return _dense(request, settings, None)
    if pattern.packed is not None:
        if _captured(pattern.packed):
            return formats.uncounted(request.device)
        if torch.compiler.is_compiling() or not (
            _takes_compact(request, pattern) and _layers_agree(request, pattern)
        ):
            return _dense(request, settings, pattern)
        return formats.packed(pattern.packed)
    if pattern.causal:
        return _causal(request, settings, pattern)
    return _bidirectional(request, settings, pattern)


def _takes_compact(request: MaskRequest, pattern: Pattern) -> bool:
    # 2D masks are for models made for FlashAttention; a window must then come with the call
    traits = compat.traits(request.config)
    passes = traits.passes_window if pattern.causal else traits.all_pass_window
    sliced = traits.slices_masks and not request.named_flash
    return traits.compact_masks and not sliced and (pattern.window is None or passes)


def _is_encoder(config: Any) -> bool:
    """A model that calls itself an encoder asks for a causal mask in generate() only, and asks
    again with the answer, for a bidirectional one: a compact answer would be taken for padding."""
    decodes = getattr(config, "is_decoder", True) or getattr(config, "is_encoder_decoder", False)
    return not decodes


def _layers_agree(request: MaskRequest, pattern: Pattern) -> bool:
    """Whether a layer's own word on causality is the pattern's, whichever layer it is."""
    traits = compat.traits(request.config)
    return not (traits.may_not_be_causal if pattern.causal else traits.always_causal)


def _captured(x: Tensor) -> bool:
    """Whether work on `x` is being recorded into a CUDA graph, which cannot look at its values."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _causal(r: MaskRequest, settings: SwaSettings, pattern: Pattern) -> Tensor | None:
    reach = _reach(r)
    if settings.sinks and r.kv_offset > 0:
        raise ValueError(
            "triton_swa keeps the first tokens (sinks), but this cache has dropped them. Pass "
            "past_key_values=hf_attn_patch.RollingCache(model.config), or call "
            "configure_swa(model, ...) again: it makes generate() use one."
        )
    wants_dense = not r.causal_skip and not _adapted(r.config)
    if reach is None or wants_dense:
        return _dense(r, settings, pattern)
    rolled = settings.sinks > 0 and reach > r.kv_length
    if reach > r.kv_length and not rolled:  # queries ahead of the cache: no bottom-right alignment
        return _dense(r, settings, pattern)
    columns = sinks.rolled_columns(r, reach, settings.sinks) if rolled else None
    padding = _padding(r, 0 if rolled else r.kv_offset, reach)
    if columns is not None:
        padding = columns.gather(padding)
        reach = r.kv_length
    if _is_encoder(r.config) and r.q_length > 1:
        return _dense(r, settings, pattern)
    # one query without a window sees all keys, causal or not
    agreed = _layers_agree(r, pattern) or (r.q_length == 1 and pattern.window is None)
    if not _takes_compact(r, pattern):
        plain = padding is None and reach == r.kv_length and pattern.window is None
        return None if plain and agreed and not rolled else _dense(r, settings, pattern)
    if padding is None and (reach < r.kv_length or not agreed):
        padding = formats.first_keys(r.batch_size, reach, r.device)
    return padding if agreed or padding is None else formats.stated(padding)


def _bidirectional(r: MaskRequest, settings: SwaSettings, pattern: Pattern) -> Tensor | None:
    traits = compat.traits(r.config)
    # a decoder used as an encoder
    causal_layers = traits.always_causal or getattr(r.config, "is_causal", True) is False
    if not r.bidirectional_skip:
        return _dense(r, settings, pattern)
    padding = _padding(r, r.kv_offset, r.kv_length)
    if pattern.window is not None and pattern.window < max(r.q_length, r.kv_length):
        aligned = (
            r.q_length == r.kv_length
            and isinstance(r.q_offset, int)
            and r.q_offset == r.kv_offset
            and not causal_layers
        )
        if not (aligned and traits.window_is_exclusive and _takes_compact(r, pattern)):
            return _dense(r, settings, pattern)
        return padding
    if padding is not None:
        return formats.same_for_all_queries(padding)
    if causal_layers:
        everything = formats.first_keys(r.batch_size, r.kv_length, r.device)
        return formats.same_for_all_queries(everything)
    return None


def _reach(r: MaskRequest) -> int | None:
    """Keys up to and with the last query's own position; None if only the device knows."""
    offset = r.q_offset
    if isinstance(offset, Tensor):  # a static cache's count
        if torch.compiler.is_compiling() or (offset.device.type != "cpu" and r.q_length == 1):
            return None
        offset = int(offset)
    return offset + r.q_length - r.kv_offset


def _padding(r: MaskRequest, start: int, length: int) -> Tensor | None:
    """``[B, length]`` from position `start`, None if nothing is hidden."""
    if r.attention_mask is None:
        return None
    mask = r.attention_mask
    if mask.shape[1] != length:  # else it is whole, or our own answer, cropped before
        mask = mask[:, start : start + length]
        mask = torch.nn.functional.pad(mask, (0, length - mask.shape[1]))
    # looking waits for a GPU: worth it once per prompt, not at every step
    may_look = mask.device.type == "cpu" or r.q_length > 1
    if may_look and not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask.contiguous()


def _dense(r: MaskRequest, settings: SwaSettings, pattern: Pattern | None) -> Tensor:
    """``[B, 1, Q, K]`` bool, as transformers builds it for sdpa, narrowed by the settings."""
    if r.q_length > 1 and not torch.compiler.is_compiling():
        logger.warning_once(
            f"hf_attn_patch: a model of type {getattr(r.config, 'model_type', '?')!r} asks for a "
            "mask that the kernels do not know as a pattern; a dense one is built for it, which "
            "takes memory for every query and key. The result is the same."
        )
    function = r.mask_function
    if settings.window is not None and (pattern is None or pattern.causal):
        function = sinks.narrowed(r, settings, pattern)
    reach = _reach(r) if settings.sinks else None
    rolled = r.kv_offset == 0 and reach is not None and reach > r.kv_length
    total = reach if rolled and reach is not None else r.kv_length
    mask = compat.sdpa_mask(
        batch_size=r.batch_size,
        q_length=r.q_length,
        kv_length=total,
        q_offset=r.q_offset,  # type: ignore[arg-type]  # a static cache gives a tensor
        kv_offset=r.kv_offset,
        mask_function=function,
        attention_mask=r.attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=r.use_vmap,
        device=r.device,
    )
    assert mask is not None  # it is left out only where skipping is allowed
    if rolled:
        return sinks.rolled_columns(r, total, settings.sinks).gather_dense(mask)
    if not torch.compiler.is_compiling() and _hides_nothing(r):
        formats.let_positions_tell(mask)
    return mask


def _hides_nothing(r: MaskRequest) -> bool:
    """Whether there is no padding in a prompt of one row, the only one that can be packed."""
    if r.batch_size != 1 or r.q_length == 1:
        return False
    return r.attention_mask is None or bool(r.attention_mask.all())
