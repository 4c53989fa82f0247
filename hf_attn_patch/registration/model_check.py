"""Refuses a model that would ignore the name it was given, while it is being built.

transformers accepts any registered name for any model, also for those whose code never looks at it;
some of them then compute attention under our mask and silently lose causality. PyTorch calls a hook
whenever a submodule is added to a module; that is early enough to stop before any weight is made,
touches no class of transformers, and can be taken away again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from ..transformers_compat.compat import PreTrainedModel

_names: frozenset[str] = frozenset()
_handle: RemovableHandle | None = None


def install(names: frozenset[str]) -> None:
    """Watch models that are built with one of `names`; replaces the earlier set."""
    global _names, _handle
    from torch.nn.modules.module import register_module_module_registration_hook

    _names = names
    if _handle is None:
        _handle = register_module_module_registration_hook(_on_submodule)


def remove() -> None:
    """Stop watching and take the names out of the families that were adapted."""
    global _names, _handle
    from ..models import ADAPTERS

    for adapter in ADAPTERS.values():
        for name in _names:
            adapter.remove(name)
    if _handle is not None:
        _handle.remove()
    _names, _handle = frozenset(), None


def refusal(
    model_class: type[PreTrainedModel], model_type: str, name: str
) -> tuple[str, str] | None:
    """(reason, fix) why a model class cannot take the implementation `name`, None if it can.

    Speaks of the class itself; the models inside it are asked for when they are built.
    """
    from ..models import ADAPTERS
    from ..transformers_compat import latent_layers, unsupported

    adapter = ADAPTERS.get(model_type)
    if adapter is None:
        refused = _code_refuses(model_class, model_type, name)
    else:
        refused = adapter.unfit.get(name)
    if refused is None:
        return latent_layers.refusal(model_class) if name == latent_layers.NAME else None
    reason, fix = refused if isinstance(refused, tuple) else (refused, None)
    return reason, fix or unsupported.fix_for(model_type)


def _code_refuses(
    model_class: type[PreTrainedModel], model_type: str, name: str
) -> str | tuple[str, str] | None:
    """What in a model's code stands against an implementation: a reason, maybe with its fix."""
    from ..attention import keywords
    from ..transformers_compat import compat
    from ..transformers_compat.model_code import model_code

    code = model_code(model_class)
    for table in code.tables:
        if name not in table.implementations:
            known = " and ".join(table.implementations)
            return (
                f"{model_class.__name__} looks its attention up in {table.name}, which has {known}",
                f"load it with attn_implementation={table.implementations[-1]!r}",
            )
    if compat.ignores_interface(model_class) and not compat.is_only_a_part(model_class, code):
        return (
            f"{model_class.__name__} computes its attention itself; transformers' code for "
            f"{model_type!r} does not call the attention function of that name"
        )
    if compat.eager_only(model_class):
        return f"transformers declares that {model_class.__name__} works with eager attention only"
    unknown = keywords.unserved(code.keywords)
    if unknown is not None:
        return (
            f"{model_class.__name__} passes {unknown}= to its attention, which "
            f"{name!r} does not serve and may not ignore",
            keywords.INSTEAD.get(unknown, keywords.DEFAULT_INSTEAD),
        )
    return None


def _on_submodule(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    # runs for every module of every model in the process: the common case must leave early
    config = module.__dict__.get("config")
    if config is None or getattr(config, "_attn_implementation", None) not in _names:
        return
    from ..models import ADAPTERS
    from ..transformers_compat import compat, latent_layers
    from ..transformers_compat.model_code import model_code

    if not isinstance(module, compat.PreTrainedModel):
        return
    wanted = config._attn_implementation
    refused = refusal(type(module), config.model_type, wanted)
    if refused is not None:
        reason, fix = refused
        raise ValueError(
            f"attn_implementation={wanted!r} is refused: {reason}. Instead: {fix}. If it is one "
            "part of a larger model, name an implementation for each part, such as "
            f'attn_implementation={{"text_config": "{wanted}", "": "eager"}}.'
        )
    adapter = ADAPTERS.get(config.model_type)
    if adapter is not None:
        adapter.install(wanted)
        adapter.prepare(module)
    else:
        if compat.ignores_interface(type(module)):
            compat.logging.get_logger(__name__).warning_once(
                f"hf_attn_patch: {type(module).__name__} computes its attention itself, whatever "
                f"attn_implementation says; {wanted!r} serves the other parts of the model."
            )
        compat.learn_traits(module)
        code = model_code(type(module))
        # some models do less, or worse, for names without "flash": they get the other name
        if code.packs_for_flash or (code.slices_masks and wanted == "triton_fa2"):
            named = next((name for name in sorted(_names) if "flash" in name), wanted)
            config._attn_implementation = named
    if wanted == latent_layers.NAME and submodule is not None:
        latent_layers.prepare(submodule)
