"""The implementations, each described in one place. Read this file first.

To add one: write its forward (:mod:`.attention.dense`) and its mask function
(:mod:`.masking.functions`), give both a door in :mod:`.registration.functions`, add a literal to
``IMPLEMENTATIONS``. Importing this file imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from .capabilities import Capabilities, DeviceRequirement, Requirements
from .registration import functions, model_check
from .transformers_compat import batching_update, flash_names, private_names, tables


@dataclass(frozen=True, kw_only=True)
class AttentionImpl:
    """One value of ``attn_implementation=``."""

    name: str
    summary: str
    forward: Callable[..., Any]
    mask: Callable[..., Any]  # never optional: without one, transformers drops the padding
    supports: Capabilities
    requires: Requirements


TRITON = {"backend": "triton", "package": "triton", "minimum": (3, 6), "extra": "gpu"}
ON_ANY_DEVICE = Requirements(
    devices=(
        DeviceRequirement(device="cuda", **TRITON),  # type: ignore[arg-type]
        DeviceRequirement(device="xpu", **TRITON),  # type: ignore[arg-type]
        DeviceRequirement(device="cpu", backend="blockwise PyTorch"),
    )
)

IMPLEMENTATIONS: tuple[AttentionImpl, ...] = (
    AttentionImpl(
        name="triton_fa2",
        summary="FlashAttention-2, forward and backward; the model's own windows, softcap, sinks",
        forward=functions.fa2_forward,
        mask=functions.fa2_mask,
        supports=Capabilities(),
        requires=ON_ANY_DEVICE,
    ),
    AttentionImpl(
        name="triton_swa",
        summary="the same with a window on any causal model, first tokens kept, a rolling cache",
        forward=functions.swa_forward,
        mask=functions.swa_mask,
        supports=Capabilities(sink_tokens=True, rolling_cache=True),
        requires=ON_ANY_DEVICE,
    ),
    AttentionImpl(
        name="triton_paged_flash2",  # transformers batches continuously for names with "flash" only
        summary="triton_fa2, and continuous batching (generate_batch, scripts/serve.py) in place",
        forward=functions.paged_forward,
        mask=functions.paged_mask,
        supports=Capabilities(continuous_batching=True),
        requires=ON_ANY_DEVICE,
    ),
    AttentionImpl(
        name="triton_mla",
        summary="multi-head latent attention (DeepSeek): decodes without expanding the cache",
        forward=functions.mla_forward,
        mask=functions.mla_mask,
        # models with latents only: none of them is bidirectional or asks for softcap or sinks
        supports=Capabilities(
            latents=True, full=False, gqa=False, softcap=False, sink_logits=False
        ),
        requires=ON_ANY_DEVICE,
    ),
)


def list_implementations() -> tuple[AttentionImpl, ...]:
    """Every implementation of this package, registered or not."""
    return IMPLEMENTATIONS


def find(name: str) -> AttentionImpl:
    """The implementation called `name`.

    Raises:
        ValueError: there is none; the message lists them.
    """
    for impl in IMPLEMENTATIONS:
        if impl.name == name:
            return impl
    known = ", ".join(impl.name for impl in IMPLEMENTATIONS)
    raise ValueError(
        f"attention implementation {name!r} does not exist in hf_attn_patch; possible: {known}. "
        "transformers' own are used without it: eager, sdpa, flex_attention."
    )


def register(names: Iterable[str] | None = None) -> None:
    """Make the implementations known to transformers; runs on ``import hf_attn_patch``.

    Calling it again changes nothing.

    Args:
        names: only these; all by default.

    Raises:
        ValueError: an unknown name, or a name that somebody else has registered. Nothing is
            registered then. Or this release of transformers lacks what a name needs.
    """
    if names is None:  # what this release of transformers cannot be given was warned of
        chosen = tuple(i for i in IMPLEMENTATIONS if private_names.refusal(i.name) is None)
    else:
        chosen = tuple(find(name) for name in names)
    for impl in chosen:
        refused = private_names.refusal(impl.name)
        if refused is not None:
            raise ValueError(f"{impl.name!r} cannot be registered: {refused[0]}; {refused[1]}")
    places = [place for impl in chosen for place in _places(impl)]
    for place in places:
        other = place.table.get(place.key)
        if other is not None and not _is_ours(other):
            raise ValueError(
                f"the {place.kind} name {place.key!r} is already registered by "
                f"{getattr(other, '__module__', '?')}.{getattr(other, '__qualname__', other)}; "
                "it is not overwritten. Remove that registration first, or register() only the "
                "other names."
            )
    for place in places:
        place.table[place.key] = place.function
    _watch()


def unregister(names: Iterable[str] | None = None) -> None:
    """Take the implementations out of transformers again; those of somebody else stay.

    A loaded model that uses one of them cannot run until it is given another by
    ``set_attn_implementation``.

    Raises:
        ValueError: an unknown name.
    """
    chosen = IMPLEMENTATIONS if names is None else tuple(find(name) for name in names)
    for impl in chosen:
        for place in _places(impl) if is_registered(impl.name) else ():
            if _is_ours(place.table.get(place.key)):
                del place.table[place.key]
    model_check.remove()
    _watch()


def is_registered(name: str) -> bool:
    """Whether transformers now knows `name`, and means this package by it."""
    if private_names.missing_for(name):
        return False
    return all(_is_ours(table.get(name)) for _, table in tables.interfaces())


class _Place(NamedTuple):
    """One entry of one of transformers' tables."""

    kind: str
    table: dict[str, Any]
    key: str
    function: Callable[..., Any]


def _places(impl: AttentionImpl) -> Iterator[_Place]:
    (attention, attentions), (mask, masks) = tables.interfaces()
    yield _Place(attention, attentions, impl.name, impl.forward)
    yield _Place(mask, masks, impl.name, impl.mask)
    if impl.supports.continuous_batching and tables.batching_prefix():
        # without a mask: this name only ever gets a batch of the manager's, which needs none
        yield _Place(attention, attentions, tables.batching_prefix() + impl.name, impl.forward)


def _watch() -> None:
    names = frozenset(impl.name for impl in IMPLEMENTATIONS if is_registered(impl.name))
    if names:
        model_check.install(names)
    flash = frozenset(name for name in names if "flash" in name)
    flash_names.install(flash)
    batching_update.install(flash)


def _is_ours(function: object) -> bool:
    # by module and not by identity: a reloaded package still owns what it registered before
    return getattr(function, "__module__", "").split(".")[0] == __name__.split(".")[0]
