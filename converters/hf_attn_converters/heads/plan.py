"""Other KV heads: every check that headers allow, and the work that it will be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..conversion import EXACT, Opened, Work, check_architectures
from ..families import FamilySpec, Target
from ..families.layouts import KV_ROLES, Layout, Place, Role
from ..merge import METHODS, MergeMethod, method_named
from ..merge.kv_heads import check_kv_heads, is_exact
from .layer import KvHeads


def plan_conversion(
    source: str | Path,
    target: str | Path,
    *,
    num_key_value_heads: int,
    method: str = "mean",
    group_heads: bool = False,
    tensor_parallel_size: int | None = None,
) -> Work:
    """Check everything that headers can tell. Raises ValueError for misuse and bad input.

    `group_heads` puts those heads next to each other that lose least by sharing.
    `tensor_parallel_size` is the number of devices that the result is meant for; each gets whole
    KV heads, so it must divide them.
    """
    merge = method_named(method)
    opened = Opened.at(source)
    family, config = opened.family, opened.checkpoint.config
    before, after = family.kv_heads(config), num_key_value_heads
    target_form = _target(family, config, after)
    _check_parallel(after, family.query_heads(config), tensor_parallel_size)
    check_architectures(family, config, target_form)
    exact = is_exact(before, after)
    if group_heads:
        _check_grouping(family, config, merge, before, after)
    layout = target_form.layout or family.layout
    return opened.work(
        Path(target),
        target_form,
        KvHeads(merge, group_heads),
        _changed(opened.places, layout, KV_ROLES if exact else merge.touches),
        method=EXACT if exact else merge.name,
        kv_heads_after=after,
        cached=2 * after * family.head_dim(config),
    )


def _target(family: FamilySpec, config: Mapping[str, Any], after: int) -> Target:
    """The form of the result. Raises ValueError for impossible counts and for nothing to do."""
    hq, before = family.query_heads(config), family.kv_heads(config)
    if before != after or after < 1 or hq % after:
        check_kv_heads(query_heads=hq, before=before, after=after)
        return family.target(config, after)
    settings = family.settings(config)
    for target in family.targets:  # the same heads in another class: GPT-2 as GPT-BigCode
        if target.as_is and target.can_hold(settings, after, hq):
            return target
    check_kv_heads(query_heads=hq, before=before, after=after)
    raise AssertionError("check_kv_heads refuses equal counts")


def _check_grouping(
    family: FamilySpec, config: Mapping[str, Any], method: MergeMethod, before: int, after: int
) -> None:
    if not method.calibrated:
        raise ValueError(
            f"group_heads needs a calibrated method, got {method.name}; possible: "
            f"{', '.join(sorted(name for name, m in METHODS.items() if m.calibrated))}"
        )
    if not family.heads_can_move(config):
        raise ValueError(
            f"{family.model_type} with {family.heads_numbered_by} numbers its heads: they cannot "
            "change places; leave out group_heads"
        )
    if before % after or before == after:
        raise ValueError(
            f"group_heads needs whole groups: {after} does not divide {before} KV heads"
        )


def _check_parallel(after: int, query_heads: int, devices: int | None) -> None:
    if devices is None:
        return
    if devices < 1:
        raise ValueError(f"tensor_parallel_size must be at least 1, got {devices}")
    if after % devices:
        possible = [
            n for n in range(1, query_heads + 1) if query_heads % n == 0 and n % devices == 0
        ]
        instead = (
            f"choose {' or '.join(map(str, possible))} KV heads"
            if possible
            else ("no number of KV heads fits this model")
        )
        raise ValueError(f"{after} KV heads cannot be split over {devices} devices; {instead}")


def _changed(
    places: Mapping[str, Place], layout: Layout, touched: tuple[Role, ...]
) -> dict[str, Place]:
    """The tensors that hold a touched role, or that the target stores in another form."""
    return {
        name: place
        for name, place in places.items()
        if place.slot.parts(place.kind)
        and (
            any(role in touched for role in place.slot.roles)
            or layout.slot_for(place.slot.roles, place.slot.norm) != place.slot
        )
    }
