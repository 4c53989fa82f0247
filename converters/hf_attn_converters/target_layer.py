"""Layers of the model that the output will be, filled with a source layer and new attention."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .layer import config_after
from .plan import Work


class TargetLayers:
    """Raises ValueError where transformers cannot build the output's model."""

    def __init__(self, work: Work) -> None:
        import transformers

        self.work = work
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(config_after(work)))
            for file, text in work.extra_files.items():
                (folder / file).write_text(text)
            ours = bool(work.extra_files)
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=ours)
            auto = getattr(transformers, work.family.auto_class)
            with torch.device("meta"):
                model = auto.from_config(config, trust_remote_code=ours)
        # On the meta device: without weights.
        self.empty: nn.ModuleList = model.get_submodule(work.family.layers_path)

    @torch.no_grad()
    def filled(
        self, layer: int, old: nn.Module, stored: Mapping[str, Tensor], device: str = "cpu"
    ) -> nn.Module:
        """The target's layer in float32: `stored` by checkpoint name, all else from `old`."""
        new = copy.deepcopy(self.empty[layer]).to_empty(device=device).float().eval()
        theirs = dict(old.named_parameters()) | dict(old.named_buffers())
        names = self._names(layer)
        for own, tensor in [*new.named_parameters(), *new.named_buffers()]:
            value = stored.get(names.get(own, ""))
            if value is None:
                value = theirs[own]
                if value.shape != tensor.shape:  # Conv1D to Linear
                    assert self.work.target.transposed, own
                    value = value.mT
            tensor.copy_(value)
        return new

    def stored_names(self, layer: int, new: nn.Module) -> dict[str, str]:
        """Parameter names -> checkpoint names, of all that the checkpoint stores as it is."""
        names = self._names(layer)
        own, name = next(iter(names.items()))
        prefix = name.removesuffix(own)
        held = {info.name: self.work.info_after(info) for info in self.work.source}
        found = {own: prefix + own for own, _ in new.named_parameters()} | names
        shapes = {own: tuple(p.shape) for own, p in new.named_parameters()}
        return {
            own: name
            for own, name in found.items()
            if name in held and held[name].shape == shapes[own]
        }

    def _names(self, layer: int) -> dict[str, str]:
        """The same of the attention tensors that the conversion changes."""
        return {
            f"{self.work.slot_after(place).module}.{place.kind}": name
            for name, place in self.work.places_of(layer).items()
        }
