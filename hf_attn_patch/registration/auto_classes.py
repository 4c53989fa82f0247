"""Converted encoders (`bert_gqa`, `roberta_gqa`, `albert_gqa`) without remote code.

The classes belong to the converters, which put them into every folder that they write. Here
transformers' auto classes learn their names, so that `from_pretrained` finds them without
`trust_remote_code`. Names, not classes, which is how transformers enters its own: the public
`register` wants a class, and importing BERT while transformers is being imported, which is when
this runs, goes in circles. So this file touches private names of the auto classes' tables; where
they are not as expected (:mod:`..private_names`), the folders need `trust_remote_code` again.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_attn_converters.models import Encoder


def register_configurations() -> None:
    """Let AutoConfig read the configurations. For when its table has been imported."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if _tables_changed():
        return
    table: Any = CONFIG_MAPPING
    for encoder in _encoders():
        if encoder.ours not in table:  # else somebody else's, or ours already
            table._mapping[encoder.ours] = encoder.config_class
            table._modules[encoder.ours] = _Later(encoder)


def register_models() -> None:
    """Let the auto classes build the models. For when their tables have been imported."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if _tables_changed():
        return
    register_configurations()
    configurations: Any = CONFIG_MAPPING
    for encoder in _encoders():
        module = configurations._modules.get(encoder.ours)
        if not isinstance(module, _Later):
            continue  # somebody else's
        for auto, name in encoder.auto_classes.items():
            table: Any = getattr(modeling_auto, auto)._model_mapping
            table._reverse_config_mapping[encoder.config_class] = encoder.ours
            table._model_mapping.setdefault(encoder.ours, name)
            table._modules[encoder.ours] = module


@dataclass(frozen=True)
class _Later:
    """Stands where transformers expects a model's package; imports it when a class is wanted."""

    encoder: Encoder

    def __getattr__(self, name: str) -> Any:
        autos = {ours: auto for auto, ours in self.encoder.auto_classes.items()}
        file = "configuration" if name == self.encoder.config_class else "modeling"
        if name.startswith("__") or (file == "modeling" and name not in autos):
            raise AttributeError(name)
        package = "hf_attn_converters.models"
        found = getattr(importlib.import_module(f"{package}.{file}_{self.encoder.ours}"), name)
        # so that a model saved again takes its code along, as it came
        found.register_for_auto_class(autos.get(name, "AutoConfig"))
        return found


def _tables_changed() -> bool:
    from ..transformers_compat import private_names

    return any(
        m.wanted.module.startswith("transformers.models.auto.") for m in private_names.missing()
    )


def _encoders() -> list[Encoder]:
    from hf_attn_converters.models import ENCODERS

    return list(ENCODERS.values())
