"""Layers of the model that the output will be, filled with a source layer and new attention."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .calibration.source_model import Call
from .conversion import Work
from .io.reading import reading


class TargetLayers:
    """Raises ValueError where transformers cannot build the output's model."""

    def __init__(self, work: Work) -> None:
        import transformers

        self.work = work
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(work.form.config(work)))
            for file, text in work.extra_files.items():
                (folder / file).write_text(text)
            ours = bool(work.extra_files)
            auto = getattr(transformers, work.family.auto_class)
            with torch.device("meta"), reading(work.source.folder):
                config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=ours)
                model = auto.from_config(config, trust_remote_code=ours)
        # On the meta device: without weights.
        self.empty: nn.ModuleList = model.get_submodule(work.family.layers_path)
        self.rotary: nn.Module | None = None
        if path := work.target.rotary_path:
            self.rotary = type(model.get_submodule(path))(config)

    def call(self, call: Call) -> Call:
        """How a layer of the output is called where the source's is called so."""
        if self.rotary is None:
            return call
        positions: Tensor = call.kwargs["position_ids"]
        like = torch.empty(0, device=positions.device)
        turns = self.rotary.to(positions.device)(like, positions)
        return replace(call, kwargs=call.kwargs | {"position_embeddings": turns})

    @torch.no_grad()
    def filled(
        self, layer: int, old: nn.Module, stored: Mapping[str, Tensor], device: str = "cpu"
    ) -> nn.Module:
        """The target's layer in float32: `stored` by checkpoint name, all else from `old`."""
        new = copy.deepcopy(self.empty[layer]).to_empty(device=device).float().eval()
        theirs = dict(old.named_parameters()) | dict(old.named_buffers())
        names = self.work.form.names(self.work, layer)
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
        names = self.work.form.names(self.work, layer)
        own, name = next(iter(names.items()))
        prefix = name.removesuffix(own)
        held = {new.name: new for old in self.work.source for new in self.work.infos_after(old)}
        found = {own: prefix + own for own, _ in new.named_parameters()} | names
        shapes = {own: tuple(p.shape) for own, p in new.named_parameters()}
        return {
            own: name
            for own, name in found.items()
            if name in held and held[name].shape == shapes[own]
        }
