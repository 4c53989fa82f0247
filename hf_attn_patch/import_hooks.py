"""Registers with transformers as soon as the part of it that is concerned is imported, not before.

``transformers.modeling_utils`` imports torch's compiler, which imports Triton: seconds that a
command line's ``--help`` should not cost. Every model needs these modules, so waiting for them is
never too late.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from .transformers_compat import batching_update, flash_names, private_names

MODELLING = "transformers.modeling_utils"


def register_with_transformers() -> None:
    """Register now what transformers has imported already, and the rest when it is imported."""
    for module in private_names.modules():  # looked at before anything is made of them
        _when_imported(module, partial(_look, module))
    _when_imported(MODELLING, _register_implementations)
    _when_imported("transformers.models.auto.configuration_auto", _register_configurations)
    _when_imported("transformers.models.auto.modeling_auto", _register_models)
    for module in flash_names.LISTING:
        _when_imported(module, flash_names.admit)
    _when_imported(batching_update.MANAGER, batching_update.admit)


_registered = False


def _look(module: str) -> None:
    private_names.look(module)
    if _registered:  # until then what is missing is gathered for one warning
        private_names.warn()


def _register_implementations() -> None:
    global _registered
    from .registry import register

    register()
    _registered = True
    private_names.warn()


def _register_configurations() -> None:
    from .registration.auto_classes import register_configurations

    register_configurations()


def _register_models() -> None:
    from .registration.auto_classes import register_models

    register_models()


def _when_imported(module: str, action: Callable[[], None]) -> None:
    if module in sys.modules:
        action()
        return
    for finder in sys.meta_path:
        if isinstance(finder, _Waiting):
            finder.actions.setdefault(module, []).append(action)
            return
    sys.meta_path.insert(0, _Waiting({module: [action]}))


class _Waiting(MetaPathFinder):
    """Finds nothing itself; puts a loader that registers around the modules it waits for."""

    def __init__(self, actions: dict[str, list[Callable[[], None]]]) -> None:
        self.actions = actions

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # taken out either way, and the search below must not come back here
        actions = self.actions.pop(fullname, None)
        if actions is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, actions)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader, actions: list[Callable[[], None]]) -> None:
        self.loader = loader
        self.actions = actions

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # the module keeps its own loader: tools ask it for the source
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        for action in self.actions:
            action()
