"""One layer of a conversion: read into canonical heads, changed, brought into its stored form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..families.layouts import KV_ROLES, LayerHeads, Part, Place
from ..io.safetensors_reader import TensorInfo
from ..merge import LayerFacts, MergeMethod
from ..merge.grouping import group_heads
from ..merge.kv_heads import change_kv_heads, expand
from ..merge.mean import pool

if TYPE_CHECKING:
    from ..calibration.source_model import SourceModel
    from ..calibration.statistics import Measured
    from ..conversion import Work


@dataclass(frozen=True)
class KvHeads:
    """The form of a result that has K and V heads like its source, but another number of them."""

    method: MergeMethod
    group: bool  # heads change places first, so that those share that go best together

    def tensors(self, work: Work, place: Place, info: TensorInfo) -> list[TensorInfo]:
        hidden = work.family.hidden(work.source.config)
        shape = work.slot_after(place).shape(place.kind, work.heads_after, hidden)
        assert shape is not None
        return [TensorInfo(info.name, info.dtype, shape)]

    def names(self, work: Work, layer: int) -> dict[str, str]:
        return {
            f"{work.slot_after(place).module}.{place.kind}": name
            for name, place in work.places_of(layer).items()
        }

    def config(self, work: Work) -> dict[str, Any]:
        return config_after(work)

    def layer(
        self, work: Work, layer: int, heads: LayerHeads, facts: LayerFacts
    ) -> dict[str, Tensor]:
        return store_layer(work, layer, change_heads(work, heads, facts))

    def survey(self, work: Work, source: SourceModel, layers: Iterable[Measured]) -> None:
        return None

    def informed(self, survey: Mapping[str, Tensor]) -> KvHeads:
        return self


def convert_layer(work: Work, layer: int) -> dict[str, Tensor]:
    """The rewritten tensors of one layer by name, in their stored dtype and form."""
    return work.form.layer(work, layer, read_layer(work, layer), layer_facts(work, layer))


def read_layer(work: Work, layer: int) -> dict[Part, Tensor]:
    """The attention heads of one layer that the conversion rewrites, in canonical form.

    They keep their stored dtype when heads are only repeated, and are one precision wider when
    they are merged. Raises ValueError for NaN and infinity.
    """
    heads: dict[Part, Tensor] = {}
    for name, place in work.places_of(layer).items():
        stored = work.source.read(name)
        # NaN and infinity reach the extremes, and finding those is far quicker than isfinite().
        if not torch.stack(stored.aminmax()).isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity: the source checkpoint is damaged")
        if not work.is_exact:
            stored = stored.to(_wider(stored.dtype))
        if place.slot.parts(place.kind):  # o's bias belongs to no head
            heads |= place.slot.split(stored, place.kind, work.heads_before)
    return heads


def layer_facts(work: Work, layer: int) -> LayerFacts:
    """What the family says about one layer, for a merge method."""
    config, family = work.source.config, work.family
    return LayerFacts(
        rotary_dims=family.rotary_dims(config),
        interleaved=family.rotary is not None and family.rotary.interleaved,
        k_free=family.k_is_free(config),
        seed=layer,
    )


def change_heads(work: Work, heads: LayerHeads, facts: LayerFacts) -> dict[Part, Tensor]:
    """One layer's heads with the KV heads that the plan asks for."""
    form, after = work.form, work.plan.kv_heads_after
    assert isinstance(form, KvHeads)
    method = form.method
    if form.group:
        heads = group_heads(heads, after, facts)
    # A method that turns queries leaves K behind a norm as it is and pools it; so is its norm.
    # Any other treats the norm's scales as it treats the heads that they belong to.
    given = {
        part: tensor
        for part, tensor in heads.items()
        if part.role in method.touches and (part.kind != "norm" or "q" not in method.touches)
    }
    kv = {part: tensor for part, tensor in given.items() if part.role in KV_ROLES}
    assert kv, "every method touches K and V"
    changed = dict(heads) | dict(change_kv_heads(given, after, method, facts))
    for part, tensor in changed.items():
        if part.role in KV_ROLES and tensor.shape[0] != after:
            assert part.kind == "norm", part
            common = math.lcm(tensor.shape[0], after)
            changed[part] = pool(expand(tensor, common), after)
    return changed


def store_layer(work: Work, layer: int, heads: LayerHeads) -> dict[str, Tensor]:
    """Canonical heads -> the output's tensors by name, in their stored dtype and form.

    `heads` has every part that `read_layer` gave, with the KV heads of the plan.
    """
    stored: dict[str, Tensor] = {}
    for name, place in work.places_of(layer).items():
        dtype = work.dtype_of(name)
        slot = work.slot_after(place)
        parts = {part: heads[part].to(dtype) for part in slot.parts(place.kind)}
        for part, tensor in parts.items():
            assert tensor.shape[:2] == (work.heads_after.of(part.role), work.plan.head_dim), part
        stored[name] = slot.join(parts, place.kind)
    return stored


def config_after(work: Work) -> dict[str, Any]:
    """The source's config with head counts spelled out: absent, some families assume others."""
    config, target, family = work.source.config, work.target, work.family
    settings = family.settings(config)
    changes = {key: value for key, value in target.defaults.items() if settings.get(key) is None}
    changes |= target.config
    if target.kv_heads_key is not None:
        changes[target.kv_heads_key] = work.plan.kv_heads_after
    if target.head_dim_key is not None:
        changes[target.head_dim_key] = work.plan.head_dim
    written = {k: v for k, v in {**settings, **changes}.items() if k not in target.drops}
    if family.nested:
        written = {**config, family.nested: written}
    if target.model_type is not None:
        written["model_type"] = target.model_type
    return written | architectures_after(work)


def architectures_after(work: Work) -> dict[str, Any]:
    """The entry of config.json that names the model class; empty where it stays."""
    names, renamed = work.source.config.get("architectures"), work.target.architectures
    return {"architectures": [renamed[a] for a in names]} if renamed is not None and names else {}


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else torch.float64
