"""Families that transformers does not route through its attention interface, and what we do.

``ADAPTERS`` are served by code of ours; everything else that ignores the interface is refused at
load by :mod:`..registration.model_check`, with a hint from ``FIX_HINTS`` where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import falcon


@dataclass(frozen=True, kw_only=True)
class FamilyAdapter:
    """How one family is brought to the implementations."""

    model_type: str
    install: Callable[[str], None]  # makes the family know an implementation's name
    remove: Callable[[str], None]
    prepare: Callable[[Any], None]  # a model of the family, while it is built
    unfit: dict[str, str] = field(default_factory=dict)  # implementation: why it is refused


ADAPTERS: dict[str, FamilyAdapter] = {
    adapter.model_type: adapter
    for adapter in (
        FamilyAdapter(
            model_type="falcon",
            install=falcon.install,
            remove=falcon.remove,
            prepare=falcon.prepare,
            unfit={"triton_paged_flash2": falcon.NOT_BATCHED},
        ),
    )
}
