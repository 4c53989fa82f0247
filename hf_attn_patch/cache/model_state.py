"""What of a model decides which keys it makes, so that pages of another state are never found.

Two looks. :func:`read` walks the whole model once per prompt: versions, addresses and a sample of
the values of all weights, plain attributes (adapters, scales, modes), configs, hooks. After every
step :meth:`ModelState.holds` compares versions, identities, adapters and the number of hooks, which
takes microseconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from hashlib import blake2b
from operator import attrgetter, is_
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..transformers_compat.compat import PretrainedConfig

SAMPLE = 128  # numbers of a weight that are looked at; smaller ones are looked at as a whole
# whose hooks leave keys as they are, or leave a trace in what is read here
KNOWN_HOOKS = ("hf_attn_patch", "transformers")
OFFLOADERS = "accelerate.hooks"  # replaces `forward` of each module by one that places tensors
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
LENGTH_DEPENDENT = ("dynamic", "longrope")  # rope types
ADAPTER_FIELDS = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
# raised by looking at a weight on the meta device, or of a class that cannot be taken apart
UNREADABLE = (RuntimeError, NotImplementedError, AttributeError, TypeError)
BOOKKEEPING = frozenset(vars(nn.Module()))  # torch's own: hooks by number, mode, submodules
_version = attrgetter("_version")


@dataclass(frozen=True)
class _Places:
    """Where a model keeps what may change: its modules' own dictionaries, never the modules."""

    tensors: tuple[dict[str, Any], ...]
    hooks: tuple[Mapping[int, Any], ...]
    own_hooks: tuple[Mapping[int, Any], ...]  # of the model itself, where each cache has its own
    adapters: tuple[dict[str, Any], ...]

    def all_tensors(self) -> list[Tensor]:
        values = itertools.chain.from_iterable(map(dict.values, self.tensors))
        return [x for x in values if x is not None]

    def hook_count(self) -> int:
        foreign = [hook for d in self.own_hooks for hook in d.values() if not _known_hook(hook)]
        return sum(map(len, self.hooks)) + sum(map(len, GLOBAL_HOOKS)) + len(foreign)

    def adapter_settings(self) -> list[str]:
        return [str([held.get(name) for name in ADAPTER_FIELDS]) for held in self.adapters]


GLOBAL_HOOKS = (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks)
# beside the model, so that a cache keeps neither it nor its weights alive
_PLACES: WeakKeyDictionary[nn.Module, _Places] = WeakKeyDictionary()


@dataclass(frozen=True)
class ModelState:
    """A model as it was at one moment.

    Args:
        key: equal for two states that make equal keys of equal inputs; None where that cannot be
            known, because somebody's code takes part, or chance does.
        why: what stands in the way, where `key` is None.
    """

    key: bytes | None
    why: str | None
    _model: ReferenceType[nn.Module]
    _tensors: tuple[ReferenceType[Tensor], ...] = ()
    _versions: tuple[int, ...] = ()
    _hooks: int = 0
    _adapters: tuple[str, ...] = ()

    def holds(self) -> bool:
        """Whether the model is still in this state, as far as a short look can tell."""
        model = self._model()
        places = None if model is None else _PLACES.get(model)
        if places is None:
            return False
        tensors = places.all_tensors()
        return (
            len(tensors) == len(self._tensors)
            and all(map(is_, tensors, [known() for known in self._tensors]))
            and _versions(tensors) == self._versions
            and places.hook_count() == self._hooks
            and tuple(places.adapter_settings()) == self._adapters
        )


def read(model: nn.Module) -> ModelState:
    """The state of a model now. Waits for its device."""
    modules = list(model.modules())
    why = _unpredictable(modules)
    if why is not None:
        return ModelState(None, why, ref(model))
    places = _PLACES[model] = _Places(
        tensors=tuple(d for m in modules for d in (m._parameters, m._buffers) if d),
        hooks=tuple(getattr(m, name) for m in modules[1:] for name in HOOKS),
        own_hooks=tuple(getattr(model, name) for name in HOOKS),
        adapters=tuple(vars(m) for m in modules if ADAPTER_FIELDS[0] in vars(m)),
    )
    tensors = places.all_tensors()
    digest = blake2b(digest_size=16)
    versions = _versions(tensors)
    sample = None if versions is None or _turns_by_length(modules) else _contents(tensors)
    if sample is None:  # nothing tells whether they will still be the same: a key used only once
        digest.update(repr(next(_once)).encode())
    else:
        digest.update(repr(versions).encode())
        digest.update(sample)
    for part in _settings(modules):
        digest.update(repr(part).encode())
    for device in sorted({x.device.type for x in tensors} - {"meta"}):
        mode = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        digest.update(repr(mode).encode())
    return ModelState(
        digest.digest(), None, ref(model), tuple(map(ref, tensors)), versions or (),
        places.hook_count(), tuple(places.adapter_settings()),
    )  # fmt: skip


_once = itertools.count()


def _versions(tensors: Iterable[Tensor]) -> tuple[int, ...] | None:
    """How often each was written to; None where somebody does not count."""
    try:
        return tuple(map(_version, tensors))
    except RuntimeError:  # made under torch.inference_mode()
        return None


def _unpredictable(modules: Iterable[nn.Module]) -> str | None:
    """What makes keys depend on more than can be read, None for nothing."""
    if any(GLOBAL_HOOKS):
        return "global forward hooks"
    for module in modules:
        kind = type(module).__name__
        if module.training:
            return f"{kind} in training mode (call model.eval())"
        for name in HOOKS:
            for hook in getattr(module, name).values():
                if not _known_hook(hook):
                    return f"a forward hook on {kind}"
        held = vars(module)
        if "forward" in held and type(held.get("_hf_hook")).__module__ != OFFLOADERS:
            return f"a `forward` of its own on {kind}"
    return None


def _turns_by_length(modules: Iterable[nn.Module]) -> bool:
    """Whether rotations depend on how long the longest text was so far."""
    kinds = [str(vars(module).get("rope_type")) for module in modules]
    return any(name in kind for kind in kinds for name in LENGTH_DEPENDENT)


def _known_hook(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).split(".")[0] in KNOWN_HOOKS


def _plain_tensors(x: Tensor) -> Iterator[Tensor]:
    """What a tensor subclass (a shard, a quantised weight) is made of."""
    if hasattr(x, "to_local"):
        yield from _plain_tensors(x.to_local())
    elif hasattr(x, "__tensor_flatten__"):
        names, _ = x.__tensor_flatten__()
        for name in names:
            yield from _plain_tensors(getattr(x, name))
    else:
        yield x


def _contents(tensors: Iterable[Tensor]) -> bytes | None:
    """Addresses and a sample of the values; None where they are not there to be looked at."""
    try:
        parts = [part for x in tensors for part in _plain_tensors(x.detach())]
        addresses = repr([(x.data_ptr(), tuple(x.shape), x.dtype) for x in parts]).encode()
        return addresses + _sample(parts)
    except UNREADABLE:
        return None


def _values(tensors: Iterable[Tensor]) -> bytes | None:
    try:
        return _sample(part for x in tensors for part in _plain_tensors(x.detach()))
    except UNREADABLE:
        return None


def _sample(parts: Iterable[Tensor]) -> bytes:
    """Some numbers of each tensor, copied to the host once per device."""
    picked: dict[torch.device, list[Tensor]] = {}
    for x in parts:
        if not x.numel():
            continue
        if x.device.type == "meta":
            raise NotImplementedError("a weight that is somewhere else")
        # an odd stride does not stay in one column
        flat = x.reshape(-1)[:: (x.numel() // SAMPLE) | 1]
        picked.setdefault(x.device, []).append(flat.contiguous().view(torch.uint8))
    return b"".join(torch.cat(some).cpu().numpy().tobytes() for some in picked.values())


def _settings(modules: Iterable[nn.Module]) -> Iterator[object]:
    """Class and plain attributes of every module, and what is in the configs."""
    configs: dict[int, Any] = {}
    tensors = []
    for module in modules:
        yield type(module).__qualname__
        for name, value in vars(module).items():
            if name in BOOKKEEPING:
                continue
            if isinstance(value, PretrainedConfig):
                configs[id(value)] = value
            elif isinstance(value, Tensor):
                tensors.append(value)
            elif _is_plain(value):
                yield name, _ordered(value)
    for config in configs.values():
        yield from _config(config)
    # computed by a forward pass, maybe: a new tensor with the same numbers is the same
    contents = _values(tensors)
    yield [tuple(x.shape) for x in tensors], next(_once) if contents is None else contents


def _config(config: Any) -> Iterator[object]:
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _config(value)
        elif _is_plain(value):
            yield name, _ordered(value)


_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device, Enum)


def _is_plain(value: object) -> bool:
    if value is None or isinstance(value, _PLAIN):
        return True
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return isinstance(value, (list, tuple, set, frozenset)) and all(map(_is_plain, value))


def _ordered(value: object) -> object:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else value
