"""The arguments of a model's forward call: under which names they come, and which of them a page's
key covers.

transformers calls the cache ``past_key_values`` up to 5.23 and ``cache`` from 5.24 on; callers may
pass it, and everything else, by position.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol
from weakref import ReferenceType, finalize, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..transformers_compat.compat import Cache

CACHE_NAMES = ("past_key_values", "cache")
# arguments that are in a page's key, and those that reach no key or value
COVERED = {
    "input_ids": "the key itself",
    "attention_mask": "tells padding, which is in no page",
    "position_ids": "held to the tokens' places in their rows",
    "past_key_values": "the cache",
    "cache": "the cache, from transformers 5.24 on",
    "use_cache": "whether the cache is handed back",
    "return_dict": "the form of the answer",
    "logits_to_keep": "which logits are computed",
    "labels": "the loss, after all layers",
    "output_attentions": "what else is handed back",
    "output_hidden_states": "what else is handed back",
    "output_router_logits": "what else is handed back",
}


OWN_CACHE = ("PREFIX_TUNING", "CARTRIDGE")  # kinds of PEFT's prompt learning


@dataclass(frozen=True)
class ForwardInputs:
    """What a model was called with.

    Args:
        ids: ``[B, S]``, None where the keys are not made of token ids alone.
        positions: ``[..., B|1, S]`` as the caller gave them, None for the model's own count.
        mask_columns: of a 2D attention mask; None without one.
        why: what a page's key would not cover, where `ids` is None.
        model: that is called.
    """

    ids: Tensor | None
    positions: Tensor | None
    mask_columns: int | None
    why: str | None
    model: ReferenceType[nn.Module]


_NAMES: dict[type, tuple[str, ...]] = {}


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """Arguments of a model's forward, in order."""
    kind = type(model)
    if kind not in _NAMES:
        signature = inspect.signature(kind.forward)
        named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        _NAMES[kind] = tuple(p.name for p in signature.parameters.values() if p.kind in named)[1:]
    return _NAMES[kind]


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call under their names."""
    if not args:
        return kwargs
    names = parameter_names(model)
    return {names[i] if i < len(names) else f"argument {i}": x for i, x in enumerate(args)} | kwargs


def cache_name(model: nn.Module) -> str:
    """What this release calls the cache in a model's forward."""
    names = parameter_names(model)
    return next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[0])


def find_cache(given: Mapping[str, Any]) -> Any:
    """The cache among a forward call's arguments, None without one."""
    for name in CACHE_NAMES:
        if isinstance(given.get(name), Cache):
            return given[name]
    return next((x for x in given.values() if isinstance(x, Cache)), None)


def read_inputs(model: nn.Module, given: Mapping[str, Any]) -> ForwardInputs:
    """What a page's key can be made of."""
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    why = not_covered(model, given)
    if why is None and not isinstance(ids, Tensor):
        why = "no input_ids"
    two_dimensional = isinstance(mask, Tensor) and mask.dim() == 2
    return ForwardInputs(
        ids=ids if why is None else None,
        positions=given.get("position_ids"),
        mask_columns=mask.shape[1] if isinstance(mask, Tensor) and two_dimensional else None,
        why=why,
        model=ref(model),
    )


def not_covered(model: nn.Module | None, given: Mapping[str, Any]) -> str | None:
    """The arguments that a key made of ids, positions and padding says nothing about."""
    if model is not None and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "what the encoder read"
    if model is not None and virtual_tokens(model) is not None:
        return "PEFT's virtual tokens"
    names = [name for name, x in given.items() if name not in COVERED and not _is_nothing(x)]
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        names.append("attention_mask")
    if positions is not None and not isinstance(positions, Tensor):
        names.append("position_ids")
    return ", ".join(names) or None


def virtual_tokens(model: nn.Module) -> str | None:
    """Kind of PEFT's prompt learning whose ``generate()`` drives `model`, None without."""
    driver = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    config = getattr(driver, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        return None
    return str(getattr(config.peft_type, "value", config.peft_type))


def _is_nothing(x: Any) -> bool:
    # what encoders of a text without images have found is an empty dictionary
    return x is None or (isinstance(x, (Mapping, list, tuple)) and not x)


def refuse_other_cache(model: nn.Module) -> None:
    """Raises ValueError where PEFT would put a cache of its own in the place of a PagedCache."""
    kind = virtual_tokens(model)
    if kind in OWN_CACHE:
        raise ValueError(
            f"PEFT's {kind} brings keys and values in a cache of its own, which leaves a "
            "PagedCache unused: call generate() without past_key_values"
        )


def refuse_resuming(columns: int, why: str) -> NoReturn:
    """Raises ValueError for a call that does not go on from what start() has found."""
    raise ValueError(
        f"start() found {columns} columns of this prompt in pages, which the model's call does not "
        f"go on from: it brings {why}. Give start() all the inputs of generate(), right before it, "
        "and call the model that the cache was made with; or call cache.reset() instead of start()"
    )


def counts_tokens(
    positions: Tensor | None, before: Iterable[int], real: Iterable[int], columns: int, new: int
) -> bool:
    """Whether each new token's position is its place among its row's tokens. Waits for the device.

    Args:
        positions: ``[..., B|1, new]``; None: the model counts columns from `columns` on.
        before: tokens that each row has already; real: how many of its `new` columns are tokens.
    """
    held, count = list(before), list(real)
    if positions is None:
        # some count what the mask shows instead; without padding that is the same
        return all(n == columns for n in held) and all(n == new for n in count)
    if (
        positions.dim() < 2
        or positions.shape[-1] != new
        or positions.shape[-2] not in (1, len(held))
    ):
        return False
    device = positions.device
    column = torch.arange(new, device=device)
    begin = new - torch.tensor(count, device=device)[:, None]  # [B, 1]
    place = torch.tensor(held, device=device)[:, None] + column - begin
    return bool(((positions == place) | (column < begin)).all())


def real_tokens(mask: Tensor | None, batch: int, columns: int) -> list[int]:
    """How many of each row's columns are no padding, which must come first; mask ``[B, S]``."""
    if mask is None:
        return [columns] * batch
    if tuple(mask.shape) != (batch, columns):
        raise ValueError(
            f"the attention mask is {list(mask.shape)}, the tokens are {[batch, columns]}"
        )
    mask = mask.bool()
    count = mask.sum(-1)
    first = torch.arange(columns, 0, -1, device=mask.device)
    if not torch.equal(mask, first <= count[:, None]):
        raise ValueError(
            "a PagedCache takes padding only before a row's tokens; set "
            "tokenizer.padding_side='left', or use transformers' DynamicCache for other masks"
        )
    found: list[int] = count.tolist()
    return found


def check_earlier(mask: Tensor, held: list[int], batch: int) -> None:
    """Raises ValueError when a mask hides tokens that are in pages, or shows padding."""
    if len(held) != batch:  # empty, or to be multiplied
        held = [n for n in held for _ in range(batch // max(1, len(held)))]
    shown = mask.sum(-1).tolist()
    if shown != (held or [0] * batch):
        raise ValueError(
            f"the attention mask shows {shown} earlier tokens of the rows, this cache holds "
            f"{held}: pass the mask that they were computed with and ones for what was "
            "generated (without a mask generate() takes every pad token for padding)"
        )


class Watcher(Protocol):
    """A cache that is told what the model is called with."""

    inputs: ForwardInputs | None
    length: int

    @property
    def resumed(self) -> bool: ...


def watch(model: nn.Module, cache: Watcher) -> None:
    """Tell a cache, as long as it lives, what the model's forward passes with it are given."""
    reference = ref(cache)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alive = reference()
        if alive is None or torch.compiler.is_compiling():
            return
        given = by_name(module, args, kwargs)
        found = find_cache(given)
        if alive in (found, getattr(found, "self_attention_cache", None)):
            alive.inputs = read = read_inputs(module, given)
            if read.why is not None and alive.resumed:  # before the model makes something of it
                refuse_resuming(alive.length, read.why)

    def forget(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        alive = reference()
        if alive is not None:
            alive.inputs = None

    before = model.register_forward_pre_hook(note, with_kwargs=True)
    after = model.register_forward_hook(forget, always_call=True)
    finalize(cache, _remove, before, after)


def _remove(*handles: RemovableHandle) -> None:
    for handle in handles:
        handle.remove()
