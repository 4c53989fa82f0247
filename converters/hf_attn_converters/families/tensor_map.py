"""Which of a checkpoint's tensors matter to a conversion, checked against its config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..io.checkpoint import Checkpoint
from ..io.safetensors_reader import FLOAT_DTYPES
from .layouts import Heads, Place
from .spec import FamilySpec, Target


def attention_tensors(checkpoint: Checkpoint, family: FamilySpec) -> dict[str, Place]:
    """Every attention tensor by name, its shape checked against config.json."""
    config = checkpoint.config
    heads = Heads(family.query_heads(config), family.kv_heads(config), family.head_dim(config))
    places: dict[str, Place] = {}
    for info in checkpoint:
        place = family.layout.locate(info.name)
        if place is None:
            continue
        shape = place.slot.shape(place.kind, heads, family.hidden(config))
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
    _check_complete(places, family, family.layers(config))
    return places


def _check_complete(places: Mapping[str, Place], family: FamilySpec, layers: int) -> None:
    have = set(places.values())
    for layer in range(layers):
        for slot in family.layout.slots:
            if Place(layer, slot, "weight") not in have:
                raise ValueError(
                    f"layer {layer} has no {slot.module}.weight: the checkpoint is incomplete, "
                    f"or no {family.model_type} model"
                )
    if extra := max(place.layer for place in have) + 1 - layers:
        raise ValueError(f"config.json says {layers} layers, the weights hold {layers + extra}")


def obsolete_tensors(checkpoint: Checkpoint, target: Target) -> frozenset[str]:
    if not target.obsolete:
        return frozenset()
    return frozenset(i.name for i in checkpoint if re.fullmatch(target.obsolete, i.name))


def tied_copies(checkpoint: Checkpoint, family: FamilySpec) -> frozenset[str]:
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
