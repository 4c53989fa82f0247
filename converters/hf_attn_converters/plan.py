"""What a conversion will do, from headers alone: every check that needs no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, open_checkpoint
from .families import FamilySpec, family_of
from .kv_heads import check_kv_heads, is_exact
from .layouts import KV_ROLES, Part, Place
from .merge import MergeMethod, method_named
from .output import check_destination, free_bytes
from .safetensors_file import FLOAT_DTYPES, TensorInfo

EXACT = "exact"  # the method of a conversion that only repeats heads
SLACK = 16 << 20  # bytes kept free beside the weights, for tokenizer files and indexes


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    source: str
    target: str
    model_type: str
    method: str  # EXACT when heads are only repeated
    layers: int
    query_heads: int
    head_dim: int
    kv_heads_before: int
    kv_heads_after: int
    tensors: int
    tensors_changed: int
    tensors_dropped: int  # tied copies that config.json makes superfluous
    shards: int
    bytes_before: int
    bytes_after: int
    kv_bytes_per_token_before: int  # at the checkpoint's own dtype
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
    method: MergeMethod
    changed: Mapping[str, Place]  # tensors that the method rewrites
    dropped: frozenset[str]

    def info_after(self, info: TensorInfo) -> TensorInfo:
        """A tensor's description in the output."""
        place = self.changed.get(info.name)
        if place is None or place.role not in KV_ROLES:
            return info
        rows = self.plan.kv_heads_after * self.plan.head_dim
        return TensorInfo(info.name, info.dtype, (rows, *info.shape[1:]))


def plan_conversion(
    source: str | Path, target: str | Path, *, num_key_value_heads: int, method: str = "mean"
) -> Work:
    """Check everything that headers can tell. Raises ValueError for misuse and bad input."""
    source, target = Path(source), Path(target)
    merge = method_named(method)
    checkpoint = open_checkpoint(source)
    config = checkpoint.config
    family = family_of(config)
    hq, before = family.query_heads(config), family.kv_heads(config)
    after, dim = num_key_value_heads, family.head_dim(config)
    check_kv_heads(query_heads=hq, before=before, after=after)
    exact = is_exact(before, after)
    places = _attention_tensors(checkpoint, family)
    touched = KV_ROLES if exact else merge.touches
    changed = {name: place for name, place in places.items() if place.role in touched}
    check_destination(source, target)

    dropped = _tied_copies(checkpoint, family)
    kept = [info for info in checkpoint if info.name not in dropped]
    kv_weights = [i for i in kept if i.name in changed and _is_kv_weight(changed[i.name])]
    per_head = sum(dim * i.nbytes // (i.shape[0] * i.shape[1]) for i in kv_weights)
    work = Work(
        plan=ConversionPlan(
            source=str(source),
            target=str(target),
            model_type=family.model_type,
            method=EXACT if exact else merge.name,
            layers=family.layers(config),
            query_heads=hq,
            head_dim=dim,
            kv_heads_before=before,
            kv_heads_after=after,
            tensors=len(kept),
            tensors_changed=len(changed),
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
        method=merge,
        changed=changed,
        dropped=dropped,
    )
    size = sum(work.info_after(info).nbytes for info in kept)
    return replace(work, plan=replace(work.plan, bytes_after=size, disk_needed=size + SLACK))


def _is_kv_weight(place: Place) -> bool:
    return place.role in KV_ROLES and place.kind == "weight"


def _attention_tensors(checkpoint: Checkpoint, family: FamilySpec) -> dict[str, Place]:
    """Every attention projection by name, its shape checked against config.json."""
    config = checkpoint.config
    layers, shapes = family.layers(config), _shapes(config, family)
    places: dict[str, Place] = {}
    for info in checkpoint:
        place = family.layout.locate(info.name)
        if place is None:
            continue
        shape = shapes.get((place.role, place.kind))
        if shape is None:
            hint = "merge the adapter first" if "lora" in place.kind else "dequantize it first"
            raise ValueError(f"{info.name} is no plain weight; {hint}")
        if info.shape != shape:
            raise ValueError(
                f"{info.name} has shape {list(info.shape)}, config.json asks for {list(shape)}; "
                "one of them is wrong"
            )
        if info.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{info.name} is {info.dtype}; possible: {', '.join(FLOAT_DTYPES)}. Dequantize it"
            )
        places[info.name] = place
    have = set(places.values())
    for layer in range(layers):
        for role in ("q", *KV_ROLES, "o"):
            if Place(layer, role, "weight") not in have:
                raise ValueError(
                    f"layer {layer} has no {role} projection: the checkpoint is incomplete, "
                    f"or no {family.model_type} model"
                )
    if extra := max(place.layer for place in have) + 1 - layers:
        raise ValueError(f"config.json says {layers} layers, the weights hold {layers + extra}")
    return places


def _tied_copies(checkpoint: Checkpoint, family: FamilySpec) -> frozenset[str]:
    """Tensors that config.json ties to another one with the same bytes."""
    if not checkpoint.config.get("tie_word_embeddings", False):
        return frozenset()
    infos = {info.name: info for info in checkpoint}
    return frozenset(
        copy
        for copy, original in family.tied
        if copy in infos
        and original in infos
        and infos[copy].nbytes == infos[original].nbytes
        and all(
            bytes(a) == bytes(b)
            for a, b in zip(checkpoint.chunks(copy), checkpoint.chunks(original), strict=True)
        )
    )


def _shapes(
    config: Mapping[str, Any], family: FamilySpec
) -> dict[tuple[str, str], tuple[int, ...]]:
    """The stored shape of every part that a separate projection can have."""
    dim, hidden = family.head_dim(config), family.hidden(config)
    queries = family.query_heads(config) * dim
    rows = {"q": queries} | dict.fromkeys(KV_ROLES, family.kv_heads(config) * dim)
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for role, count in rows.items():
        shapes |= {(role, "weight"): (count, hidden), (role, "bias"): (count,)}
    return shapes | {("o", "weight"): (hidden, queries), ("o", "bias"): (hidden,)}


def parts_of(work: Work, layer: int) -> dict[Part, str]:
    """The tensors of one layer that the method rewrites together."""
    parts: dict[Part, str] = {}
    for name, place in work.changed.items():
        if place.layer == layer and not (place.role == "o" and place.kind == "bias"):
            parts[Part(place.role, "weight" if place.kind == "weight" else "bias")] = name
    return parts
