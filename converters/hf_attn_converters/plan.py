"""What a conversion will do, from headers alone: every check that needs no weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint, open_checkpoint
from .families import FamilySpec, Target, family_of
from .kv_heads import check_kv_heads, is_exact
from .layouts import KV_ROLES, Heads, Layout, Place, Role, Slot
from .located import attention_tensors, obsolete_tensors, tied_copies
from .merge import METHODS, MergeMethod, method_named
from .models import source_of
from .output import check_destination, free_bytes
from .safetensors_file import FLOAT_DTYPES, TensorInfo

EXACT = "exact"  # the method of a conversion that only repeats heads
SLACK = 16 << 20  # bytes kept free beside the weights, for tokenizer files and indexes


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    source: str
    target: str
    model_type: str
    model_type_after: str  # another where transformers holds fewer KV heads in another class
    method: str  # EXACT when heads are only repeated
    layers: int  # that have weights of their own: 1 for ALBERT
    query_heads: int
    head_dim: int
    kv_heads_before: int
    kv_heads_after: int
    tensors: int
    tensors_changed: int
    tensors_dropped: int  # tied copies that config.json makes superfluous, old mask buffers
    shards: int
    bytes_before: int
    bytes_after: int
    kv_bytes_per_token_before: int  # at the checkpoint's own dtype; 0 for encoders: no cache
    kv_bytes_per_token_after: int
    disk_needed: int
    disk_free: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A plan with what it takes to carry it out."""

    plan: ConversionPlan
    source: Checkpoint
    family: FamilySpec
    target: Target
    method: MergeMethod
    group_heads: bool  # heads change places first, so that those share that go best together
    changed: Mapping[str, Place]  # attention tensors that the conversion rewrites
    dropped: frozenset[str]

    @property
    def heads_before(self) -> Heads:
        return Heads(self.plan.query_heads, self.plan.kv_heads_before, self.plan.head_dim)

    @property
    def heads_after(self) -> Heads:
        return self.heads_before._replace(kv=self.plan.kv_heads_after)

    def info_after(self, info: TensorInfo) -> TensorInfo:
        """A tensor's description in the output. Names stay."""
        if place := self.changed.get(info.name):
            hidden = self.family.hidden(self.source.config)
            shape = self.slot_after(place).shape(place.kind, self.heads_after, hidden)
            assert shape is not None
            return TensorInfo(info.name, info.dtype, shape)
        if self._is_transposed(info.name):
            return TensorInfo(info.name, info.dtype, info.shape[::-1])
        return info

    def rewrite(self, info: TensorInfo) -> Callable[[Tensor], Tensor] | None:
        """How a tensor beside the attention changes its form; None when it is copied."""
        return _transpose if self._is_transposed(info.name) else None

    def places_of(self, layer: int) -> dict[str, Place]:
        """The tensors of one layer that are rewritten together."""
        return self._by_layer.get(layer, {})

    def slot_after(self, place: Place) -> Slot:
        """Where the target keeps what a slot of the source holds."""
        layout = self.target.layout or self.family.layout
        return layout.slot_for(place.slot.roles, place.slot.norm)

    def dtype_of(self, name: str) -> torch.dtype:
        """The stored dtype of an attention tensor."""
        return FLOAT_DTYPES[self.source.shard_of(name).tensors[name].dtype]

    @property
    def extra_files(self) -> Mapping[str, str]:
        """Files that the output needs beside weights and config.json: name -> text."""
        return {file: source_of(file) for file in self.target.code}

    @property
    def files_left_out(self) -> frozenset[str]:
        """Files of the source that the output must not copy: code of the form it leaves."""
        return frozenset(self.family.code) | frozenset(self.target.code)

    @property
    def is_our_code(self) -> bool:
        """Whether the code that came with the source is, letter by letter, what this package
        writes; no other is run."""
        folder = self.source.folder
        return bool(self.family.code) and all(
            (folder / file).is_file() and (folder / file).read_text("utf-8") == source_of(file)
            for file in self.family.code
        )

    @cached_property
    def _by_layer(self) -> dict[int, dict[str, Place]]:
        layers: dict[int, dict[str, Place]] = {}
        for name, place in self.changed.items():
            layers.setdefault(place.layer, {})[name] = place
        return layers

    def _is_transposed(self, name: str) -> bool:
        return bool(self.target.transposed) and bool(re.fullmatch(self.target.transposed, name))


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous()


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
    source, target = Path(source), Path(target)
    merge = method_named(method)
    checkpoint = open_checkpoint(source)
    config = checkpoint.config
    family = family_of(config)
    hq, before = family.query_heads(config), family.kv_heads(config)
    after, dim = num_key_value_heads, family.head_dim(config)
    form = _target(family, config, after)
    _check_parallel(after, hq, tensor_parallel_size)
    _check_architectures(family, config, form)
    exact = is_exact(before, after)
    if group_heads:
        _check_grouping(family, config, merge, before, after)
    places = attention_tensors(checkpoint, family)
    layout = form.layout or family.layout
    changed = _changed(places, layout, KV_ROLES if exact else merge.touches)
    check_destination(source, target)

    dropped = tied_copies(checkpoint, family) | obsolete_tensors(checkpoint, form)
    kept = [info for info in checkpoint if info.name not in dropped]
    per_head = sum(_bytes_per_head(info, places, dim) for info in kept) if family.kv_cache else 0
    work = Work(
        plan=ConversionPlan(
            source=str(source),
            target=str(target),
            model_type=family.model_type,
            model_type_after=form.model_type or family.model_type,
            method=EXACT if exact else merge.name,
            layers=family.layers(config),
            query_heads=hq,
            head_dim=dim,
            kv_heads_before=before,
            kv_heads_after=after,
            tensors=len(kept),
            tensors_changed=0,
            tensors_dropped=len(dropped),
            shards=len(checkpoint.shards),
            bytes_before=sum(info.nbytes for info in checkpoint),
            bytes_after=0,
            kv_bytes_per_token_before=before * per_head,
            kv_bytes_per_token_after=after * per_head,
            disk_needed=0,
            disk_free=free_bytes(target),
        ),
        source=checkpoint,
        family=family,
        target=form,
        method=merge,
        group_heads=group_heads,
        changed=changed,
        dropped=dropped,
    )
    size = sum(work.info_after(info).nbytes for info in kept)
    rewritten = len(changed) + sum(work.rewrite(info) is not None for info in kept)
    return replace(
        work,
        plan=replace(
            work.plan, tensors_changed=rewritten, bytes_after=size, disk_needed=size + SLACK
        ),
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


def _check_architectures(family: FamilySpec, config: Mapping[str, Any], target: Target) -> None:
    names = config.get("architectures") or []
    if target.architectures is None:
        return
    if not isinstance(names, list):
        raise ValueError(f"config.json: architectures must be a list, got {names!r}")
    for name in names:
        if name not in target.architectures:
            raise ValueError(
                f"{name} has no counterpart in {target.model_type}; possible: "
                f"{', '.join(sorted(target.architectures))}"
            )


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


def _bytes_per_head(info: TensorInfo, places: Mapping[str, Place], dim: int) -> int:
    """What one KV head of a tensor adds to a token's cache: K and V have the weights' dtype."""
    place = places.get(info.name)
    if place is None or place.kind != "weight" or place.slot.norm:
        return 0
    roles = sum(role in KV_ROLES for role in place.slot.roles)
    return roles * dim * FLOAT_DTYPES[info.dtype].itemsize
