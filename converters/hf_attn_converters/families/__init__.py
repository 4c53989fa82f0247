"""All that a new family touches: one `FamilySpec` literal in one of the tables beside this file.

A family says where its projections are (`layout`), how its config.json spells head counts, which
values transformers assumes when config.json is silent, and what form the result takes (`targets`).
Nothing else in this package knows a family's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import encoders, fused, refused, separate
from .spec import Condition, FamilySpec, Rotary, Target

FAMILIES: dict[str, FamilySpec] = {
    spec.name or spec.model_type: spec
    for spec in (*separate.SPECS, *fused.SPECS, *encoders.SPECS, *refused.SPECS)
}


def family_of(config: Mapping[str, Any]) -> FamilySpec:
    """The family of a parsed config.json. Raises ValueError, listing the known, for others."""
    model_type = config.get("model_type")
    named = [spec for spec in FAMILIES.values() if spec.model_type == model_type]
    for spec in named:
        if all(condition.holds(config) for condition in spec.when):
            for condition in spec.needs:
                if not condition.holds(config):
                    raise ValueError(
                        f"{model_type} with {condition.key}={condition.found(config)!r} cannot be "
                        f"converted; possible: {condition.value!r}"
                    )
            return spec
    if named:
        flags = sorted({condition.key for spec in named for condition in spec.when})
        raise ValueError(
            f"config.json: no {model_type} has "
            + ", ".join(f"{flag}={config.get(flag)!r}" for flag in flags)
        )
    raise ValueError(
        f"config.json: model_type {model_type!r} cannot be converted; known families: "
        f"{', '.join(sorted({spec.model_type for spec in FAMILIES.values()}))}"
    )


__all__ = ["FAMILIES", "Condition", "FamilySpec", "Rotary", "Target", "family_of"]
