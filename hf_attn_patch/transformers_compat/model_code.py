"""What a model's own Python code shows about its attention, read and never run.

transformers composes models from classes of one file. From a model's class this follows the names
that its classes mention, and stops at other models, which are looked at by themselves.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

MASK_MODULE = "transformers.masking_utils"
# a slice of queries, or the heads' dimension taken away
MASK_AS_4D = r"\b(v|\w*mask\w*)\[:, (:, [a-z_]\w*|0, :), :\]"


@dataclass(frozen=True)
class AttentionCode:
    """A class that calls the attention function of its model's implementation."""

    name: str
    keywords: frozenset[str]  # passed by name; what comes with **kwargs is not seen
    passes_window: bool  # in every call
    always_causal: bool  # nothing in it says that it may not be
    caches: bool  # updates a KV cache


@dataclass(frozen=True)
class ClassTable:
    """A dict of attention classes by implementation, as SAM's and Falcon's."""

    name: str
    implementations: tuple[str, ...]


@dataclass
class ModelCode:
    """What the code of one model shows, without the models inside it."""

    attention: list[AttentionCode] = field(default_factory=list)
    tables: list[ClassTable] = field(default_factory=list)
    builds_masks: bool = False  # by transformers' masking_utils
    asks_for_flash: bool = False  # does other things for names with "flash"
    slices_masks: bool = False  # the model itself, as 4D, unless a name has "flash" (gemma4)
    builds_models: bool = False  # through an auto class: they are looked at when they are built
    inner_models: list[type[PreTrainedModel]] = field(default_factory=list)

    @property
    def packs_for_flash(self) -> bool:
        """Whether it calls attention once for all images under a name with "flash", else for each
        image apart (Qwen2-VL's vision tower and its kin)."""
        packed = [layer for layer in self.attention if "cu_seq_lens_q" in layer.keywords]
        return self.asks_for_flash and bool(packed) and len(packed) == len(self.attention)

    @property
    def keywords(self) -> frozenset[str]:
        """All that is passed by name to attention functions."""
        return frozenset().union(*(layer.keywords for layer in self.attention))


_READ: dict[type, ModelCode] = {}


def model_code(model_class: type[PreTrainedModel]) -> ModelCode:
    """What is reached from a model's class; empty for a model without source (a notebook's)."""
    if model_class not in _READ:
        _READ[model_class] = _read(model_class)
    return _READ[model_class]


def _read(model_class: type[PreTrainedModel]) -> ModelCode:
    code = ModelCode()
    seen: set[type] = set()
    waiting: list[type] = [c for c in model_class.__mro__ if _may_show(c)]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        module = sys.modules.get(current.__module__)
        node = _classes(module).get(current.__qualname__) if module else None
        if module is None or node is None:
            continue
        if current is model_class and "is_flash_attention_requested" in _names(node):
            code.slices_masks = re.search(MASK_AS_4D, ast.unparse(node)) is not None
        layer = attention_code(node)
        if layer is not None:
            code.attention.append(layer)
        code.tables += _tables(node, module)
        for name in _names(node):
            mentioned = vars(module).get(name)
            if getattr(mentioned, "__module__", None) == MASK_MODULE:
                code.builds_masks = True
            elif name == "is_flash_attention_requested":
                code.asks_for_flash = True
            elif re.fullmatch(r"Auto(Model|Backbone)\w*", name):
                code.builds_models = True
            elif not isinstance(mentioned, type) or not _may_show(mentioned):
                continue
            elif not issubclass(mentioned, PreTrainedModel):
                waiting += [c for c in mentioned.__mro__ if _may_show(c)]
            elif mentioned not in model_class.__mro__ and mentioned not in code.inner_models:
                code.inner_models.append(mentioned)
    return code


def parts(model_class: type[PreTrainedModel]) -> list[type[PreTrainedModel]]:
    """A model's class and all that its code builds by name, outermost first."""
    listed = [model_class]
    for part in listed:
        listed += [inner for inner in model_code(part).inner_models if inner not in listed]
    return listed


def attention_classes(module: ModuleType) -> list[AttentionCode]:
    """All classes of a file that call an attention function."""
    found = (attention_code(node) for node in _classes(module).values())
    return [layer for layer in found if layer is not None]


def attention_code(node: ast.ClassDef) -> AttentionCode | None:
    """What a class shows of its calls of an attention function; None if it makes none."""
    functions = {
        target.id
        for assign in ast.walk(node)
        if isinstance(assign, (ast.Assign, ast.AnnAssign)) and assign.value is not None
        and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(assign.value)
        for target in (assign.targets if isinstance(assign, ast.Assign) else [assign.target])
        if isinstance(target, ast.Name)
    }  # fmt: skip
    calls = [
        call
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in functions
    ]
    if not calls:
        return None
    keywords = [{k.arg for k in call.keywords if k.arg is not None} for call in calls]
    return AttentionCode(
        name=node.name,
        keywords=frozenset().union(*keywords),
        passes_window=all("sliding_window" in given for given in keywords),
        always_causal=all(_is_true(value) for value in _causality(node, calls)),
        caches=re.search(r"\.update\(", ast.unparse(node)) is not None,
    )


def _causality(node: ast.ClassDef, calls: list[ast.Call]) -> Iterator[ast.expr]:
    """Every expression that decides whether a layer is causal."""
    for call in calls:
        for keyword in call.keywords:
            if keyword.arg == "is_causal" and ast.unparse(keyword.value) != "self.is_causal":
                yield keyword.value
    for assign in ast.walk(node):
        targets = assign.targets if isinstance(assign, ast.Assign) else []
        if any(ast.unparse(target) in ("self.is_causal", "is_causal") for target in targets):
            assert isinstance(assign, ast.Assign)
            yield assign.value


def _is_true(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def _may_show(cls: type) -> bool:
    """Whether a class can be part of a model's own code."""
    home = cls.__module__
    library = home.startswith("transformers.") and not home.startswith("transformers.models.")
    return issubclass(cls, nn.Module) and not library and not home.startswith("torch.")


@cache
def _classes(module: ModuleType) -> dict[str, ast.ClassDef]:
    tree = _tree(module)
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


@cache
def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(source_of(module))


def source_of(module: ModuleType) -> str:
    """A module's source, empty where there is none: a notebook, a frozen application."""
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return ""


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _tables(node: ast.ClassDef, module: ModuleType) -> Iterator[ClassTable]:
    """Tables that a class looks its attention up in by the implementation's name."""
    for part in ast.walk(node):
        if not (isinstance(part, ast.Subscript) and isinstance(part.value, ast.Name)):
            continue
        table: Any = vars(module).get(part.value.id)
        by_name = "attn_implementation" in ast.unparse(part.slice)
        if by_name and isinstance(table, dict) and all(isinstance(key, str) for key in table):
            yield ClassTable(part.value.id, tuple(table))
