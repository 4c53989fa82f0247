"""Registers the implementations as soon as transformers' modelling code is imported, not before.

``transformers.modeling_utils`` imports torch's compiler, which imports Triton: seconds that a
command line's ``--help`` should not cost. Every model needs that module, so waiting for it is never
too late.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODELLING = "transformers.modeling_utils"


def register_with_transformers() -> None:
    """Register now if the modelling code is there, else when it is imported."""
    if MODELLING in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    from .registry import register

    register()


class _Waiting(MetaPathFinder):
    """Finds nothing itself; puts a loader that registers around the one module it waits for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODELLING:
            return None
        sys.meta_path.remove(self)  # done either way, and find_spec below must not come back here
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # the module keeps its own loader: tools ask it for the source
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register()
