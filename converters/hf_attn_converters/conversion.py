"""A conversion planned: what it will do, and what it takes to carry it out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .families import FamilySpec, Target, family_of
from .families.layouts import KV_ROLES, Heads, LayerHeads, Place, Slot
from .families.tensor_map import attention_tensors, obsolete_tensors, tied_copies
from .io.atomic_output import check_destination, free_bytes
from .io.checkpoint import Checkpoint, open_checkpoint
from .io.safetensors_reader import FLOAT_DTYPES, TensorInfo
from .merge import LayerFacts, Method
from .models import source_of

if TYPE_CHECKING:
    from .calibration.source_model import SourceModel
    from .calibration.statistics import Measured

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
    kv_heads_after: int  # of latents: all query heads, each has its own view of them
    kv_lora_rank: int | None = None  # latents alone
    qk_rope_head_dim: int | None = None
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


class Form(Protocol):
    """What becomes of a layer's attention: other KV heads (`KvHeads`), or latents (`Latents`)."""

    @property
    def method(self) -> Method: ...

    def tensors(self, work: Work, place: Place, info: TensorInfo) -> Sequence[TensorInfo]:
        """What the output holds in the place of one rewritten tensor."""

    def names(self, work: Work, layer: int) -> dict[str, str]:
        """The computed tensors of a layer: path below the layer -> name in the checkpoint."""

    def config(self, work: Work) -> dict[str, Any]:
        """The output's config.json."""

    def layer(
        self, work: Work, layer: int, heads: LayerHeads, facts: LayerFacts
    ) -> dict[str, Tensor]:
        """A layer's computed tensors by name, in their stored dtype and form."""

    def survey(
        self, work: Work, source: SourceModel, layers: Iterable[Measured]
    ) -> dict[str, Tensor] | None:
        """What must be known of all layers before the first is computed; None: nothing."""

    def informed(self, survey: Mapping[str, Tensor]) -> Form:
        """The same form, with what its survey found."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A plan with what it takes to carry it out."""

    plan: ConversionPlan
    source: Checkpoint
    family: FamilySpec
    target: Target
    form: Form
    changed: Mapping[str, Place]  # attention tensors that the conversion rewrites
    dropped: frozenset[str]

    @property
    def heads_before(self) -> Heads:
        return Heads(self.plan.query_heads, self.plan.kv_heads_before, self.plan.head_dim)

    @property
    def heads_after(self) -> Heads:
        return self.heads_before._replace(kv=self.plan.kv_heads_after)

    @property
    def method(self) -> Method:
        return self.form.method

    @property
    def is_exact(self) -> bool:
        """Whether heads are only repeated."""
        return self.plan.method == EXACT

    def infos_after(self, info: TensorInfo) -> Sequence[TensorInfo]:
        """What the output holds of a tensor of the source."""
        if place := self.changed.get(info.name):
            return self.form.tensors(self, place, info)
        if self._is_transposed(info.name):
            return [TensorInfo(info.name, info.dtype, info.shape[::-1])]
        return [info]

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
        writes, and config.json names no other; no other is run."""
        folder, files = self.source.folder, self.family.code
        named = self.source.config.get("auto_map") or {}
        return (
            bool(files)
            and isinstance(named, dict)
            and all(
                isinstance(x, str) and f"{x.rpartition('.')[0]}.py" in files for x in named.values()
            )
            and all(
                (folder / file).is_file() and (folder / file).read_text("utf-8") == source_of(file)
                for file in files
            )
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


@dataclass(frozen=True)
class Opened:
    """A source of a known family."""

    checkpoint: Checkpoint
    family: FamilySpec

    @classmethod
    def at(cls, source: str | Path) -> Opened:
        """Raises ValueError for whatever cannot be converted as it is."""
        return cls.of(open_checkpoint(Path(source)))

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Opened:
        return cls(checkpoint, family_of(checkpoint.config))

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """Of its attention tensors. Raises ValueError where headers and config.json disagree."""
        return attention_tensors(self.checkpoint, self.family)

    def work(
        self, target: Path, target_form: Target, form: Form, changed: Mapping[str, Place], *,
        cached: int, **settings: Any,
    ) -> Work:  # fmt: skip
        """The work of a conversion. `cached`: values per token and layer in the output's cache;
        `settings`: fields of the plan."""
        checkpoint, family = self.checkpoint, self.family
        config, dim = checkpoint.config, family.head_dim(checkpoint.config)
        check_destination(checkpoint.folder, target)
        dropped = tied_copies(checkpoint, family) | obsolete_tensors(checkpoint, target_form)
        kept = [info for info in checkpoint if info.name not in dropped]
        per_head = 0
        if family.kv_cache:
            per_head = sum(_bytes_per_head(info, self.places, dim) for info in kept)
        work = Work(
            plan=ConversionPlan(
                source=str(checkpoint.folder),
                target=str(target),
                model_type=family.model_type,
                model_type_after=target_form.model_type or family.model_type,
                layers=family.layers(config),
                query_heads=family.query_heads(config),
                head_dim=dim,
                kv_heads_before=family.kv_heads(config),
                tensors=0,
                tensors_changed=0,
                tensors_dropped=len(dropped),
                shards=len(checkpoint.shards),
                bytes_before=sum(info.nbytes for info in checkpoint),
                bytes_after=0,
                kv_bytes_per_token_before=family.kv_heads(config) * per_head,
                kv_bytes_per_token_after=cached * per_head // (2 * dim),
                disk_needed=0,
                disk_free=free_bytes(target),
                **settings,
            ),
            source=checkpoint,
            family=family,
            target=target_form,
            form=form,
            changed=changed,
            dropped=dropped,
        )
        after = [found for info in kept for found in work.infos_after(info)]
        computed = sum(len(work.infos_after(info)) for info in kept if info.name in changed)
        size = sum(info.nbytes for info in after)
        return replace(
            work,
            plan=replace(
                work.plan,
                tensors=len(after),
                tensors_changed=computed + sum(work.rewrite(info) is not None for info in kept),
                bytes_after=size,
                disk_needed=size + SLACK,
            ),
        )


def _bytes_per_head(info: TensorInfo, places: Mapping[str, Place], dim: int) -> int:
    """What one KV head of a tensor adds to a token's cache: K and V have the weights' dtype."""
    place = places.get(info.name)
    if place is None or place.kind != "weight" or place.slot.norm:
        return 0
    roles = sum(role in KV_ROLES for role in place.slot.roles)
    return roles * dim * FLOAT_DTYPES[info.dtype].itemsize


def check_architectures(family: FamilySpec, config: Mapping[str, Any], target: Target) -> None:
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
