"""Continuous batching from transformers 5.24 on: the layers update the manager's cache themselves.

Up to 5.23 the manager's cache reached the attention function as ``cache=``. Now a layer calls
``cache.update(keys, values, layer_idx, kwargs=kwargs)`` first, and this copies every key of the
batch out of the pages before any attention function sees it. So the manager gets a cache whose
`update`, for models that run with a name of ours, leaves the pages alone and puts the cache into
the layer's keywords: then :mod:`..attention.continuous` finds everything as it always did.

One global name of transformers is written and put back again: ``PagedAttentionCache`` in
``generation.continuous_batching.continuous_api``, where the manager makes its cache. The class
itself stays as it is, and so does every manager of a model with another implementation.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

MANAGER = "transformers.generation.continuous_batching.continuous_api"
CACHE = "PagedAttentionCache"

_names: frozenset[str] = frozenset()


def install(names: frozenset[str]) -> None:
    """Serve the caches of models that run with one of `names`; replaces the earlier set."""
    global _names
    _names = names
    admit()


def admit() -> None:
    """Write the name, if the manager's module has been imported; else for when it is."""
    manager = sys.modules.get(MANAGER)
    theirs = getattr(manager, CACHE, None)
    if manager is None or theirs is None:
        return
    theirs = getattr(theirs, "theirs", theirs)  # ours already, or from before a reload
    served = bool(_names) and _updated_by_layers(theirs)
    setattr(manager, CACHE, _handing_over(theirs) if served else theirs)


def taken_over(cache: Any, layer_idx: int) -> None:
    """To be called by the attention function that got `cache` in its keywords."""
    if getattr(cache, "handed_over", None) == layer_idx:
        cache.handed_over = None


def _updated_by_layers(theirs: type) -> bool:
    """Whether layers can: the keywords of the layer are an argument (5.19 and later)."""
    update = getattr(theirs, "update", None)
    return update is not None and "kwargs" in inspect.signature(update).parameters


@functools.cache
def _handing_over(theirs: type) -> type:
    import torch

    class HandedOver(theirs):  # type: ignore[misc]
        """transformers' PagedAttentionCache; our attention functions read and write its pages."""

        handed_over: int | None = None  # the layer whose attention has not answered yet

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def update(
            self, key_states: Any, value_states: Any, layer_idx: int, kwargs: dict[str, Any]
        ) -> Any:
            if self.config._attn_implementation not in _names:
                return super().update(key_states, value_states, layer_idx, kwargs)
            # without a check, an attention function other than ours would see the new keys alone
            if self.handed_over is not None:
                layer, self.handed_over = self.handed_over, None
                raise ValueError(
                    f"continuous batching with {self.config._attn_implementation!r}: layer {layer} "
                    "did not hand its keywords on to the attention function of that name, so the "
                    "pages were not read. Use generate(), or attn_implementation='sdpa'."
                )
            self.handed_over = layer_idx
            kwargs["cache"] = self
            return key_states, value_states

    HandedOver.theirs = theirs
    HandedOver.__name__ = HandedOver.__qualname__ = theirs.__name__
    return HandedOver
