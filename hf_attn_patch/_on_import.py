"""Registers with transformers as soon as the part of it that is concerned is imported, not before.

``transformers.modeling_utils`` imports torch's compiler, which imports Triton: seconds that a
command line's ``--help`` should not cost. Every model needs these modules, so waiting for them is
never too late.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from . import batching_update, flash_names

MODELLING = "transformers.modeling_utils"


def register_with_transformers() -> None:
    """Register now what transformers has imported already, and the rest when it is imported."""
    _when_imported(MODELLING, _register_implementations)
    _when_imported("transformers.models.auto.configuration_auto", _register_configurations)
    _when_imported("transformers.models.auto.modeling_auto", _register_models)
    for module in flash_names.LISTING:
        _when_imported(module, flash_names.admit)
    _when_imported(batching_update.MANAGER, batching_update.admit)


def _register_implementations() -> None:
    from .registry import register

    register()


def _register_configurations() -> None:
    from .models.encoders import register_configurations

    register_configurations()


def _register_models() -> None:
    from .models.encoders import register_models

    register_models()


def _when_imported(module: str, action: Callable[[], None]) -> None:
    if module in sys.modules:
        action()
    elif not any(isinstance(f, _Waiting) and f.module == module for f in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(module, action))


class _Waiting(MetaPathFinder):
    """Finds nothing itself; puts a loader that registers around the one module it waits for."""

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self.module = module
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)  # done either way, and find_spec below must not come back here
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self.action)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader, action: Callable[[], None]) -> None:
        self.loader = loader
        self.action = action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # the module keeps its own loader: tools ask it for the source
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.action()
