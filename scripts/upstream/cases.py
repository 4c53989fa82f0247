"""What pytest collects: their test class for the family that :mod:`.plugin` was asked for."""

from __future__ import annotations

import importlib
import unittest
from typing import Any

from upstream import plugin
from upstream.families import FAMILIES, Tester


def theirs(module: str, name: str) -> type:
    """A class of theirs. Not a name of this module: pytest would collect it without a model."""
    found: type = getattr(importlib.import_module(f"tests.{module}"), name)
    return found


def common_tests(name: str) -> type:
    """Their mixins over one family, as their file for the model would have it."""
    plugin.make_importable()
    importlib.import_module("tests.test_modeling_common").np = plugin.Strict()  # type: ignore[attr-defined]
    family = FAMILIES[name]
    mixins = [theirs("test_modeling_common", "ModelTesterMixin")]
    if family.kind != "encoder":
        mixins.append(theirs("generation.test_utils", "GenerationTesterMixin"))
    if family.kind == "decoder":
        mixins.append(theirs("test_training_mixin", "TrainingTesterMixin"))
    classes = family.model_classes()
    if plugin.chosen.in_place:
        for model_class in classes:  # gemma2 and gpt_oss ask for what sdpa cannot do, and ours can
            model_class._supports_sdpa = True
    members: dict[str, Any] = {"model_tester": Tester(family), "all_model_classes": classes}
    named = f"{family.prefix}ModelTest"
    return type(named, (*mixins, unittest.TestCase), members | family.traits)


Collected = common_tests(plugin.chosen.family)
