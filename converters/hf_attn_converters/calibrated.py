"""Calibrated conversion: layer after layer is measured, merged, perhaps fitted, and stored.

What a layer becomes is written to a file of its own; the streaming writer takes it from there, and
an interrupted run continues behind the last finished layer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Calibration, Progress, Tokens, calibration_tokens
from .fit import Use, fit_layer
from .layer import change_heads, layer_facts, read_layer, store_layer
from .plan import Work
from .source_model import Call, SourceModel, rows_at_once
from .target_layer import TargetLayers

# Added to the covariance's diagonal, as a share of its mean: for what the text never showed.
DAMPING = 1e-6
TOKENS_FILE = "tokens.safetensors"


def calibrate_layers(
    work: Work,
    folder: Path,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``folder/<n>.safetensors`` for every layer n: the tensors that the method changes.

    Returns what the conversion's record says of it. `progress` counts layers. Raises ValueError
    where transformers cannot build the model or the text is unusable.
    """
    say = progress or (lambda done, total, what: None)
    folder.mkdir(exist_ok=True)
    settings = calibration or Calibration()
    source = SourceModel(work, settings.device or best_device(), settings.fit.step_tokens)
    settings = settings.at_most(source.positions)
    tokens = _tokens(work, folder, settings, source, say)
    errors = _Conversion(work, folder, source, tokens.ids, settings).run(say)
    record: dict[str, Any] = {
        "origin": tokens.origin,
        "tokens": tokens.count,
        "sequence_length": tokens.ids.shape[1],
        "seed": settings.seed,
    }
    if work.method.fitted:
        record |= {"fit": asdict(settings.fit), "errors": [round(e, 6) for e in errors]}
    return record


def _tokens(
    work: Work, folder: Path, settings: Calibration, source: SourceModel, progress: Progress
) -> Tokens:
    """The tokens, from an interrupted run's file where there is one."""
    path = folder / TOKENS_FILE
    if path.exists():
        tensors, about = _load(path)
        return Tokens(tensors["ids"], about["origin"])
    found = calibration_tokens(settings, work.source.folder, source.model, progress)
    together = rows_at_once(found.ids, settings.fit.step_tokens)
    found = replace(found, ids=found.ids[: len(found.ids) // together * together].contiguous())
    _save(path, {"ids": found.ids}, {"origin": found.origin})
    return found


class _Conversion:
    """The layers one after the other, with the hidden states that reach each."""

    def __init__(
        self, work: Work, folder: Path, source: SourceModel, ids: Tensor, settings: Calibration
    ) -> None:
        self.work, self.folder, self.source = work, folder, source
        self.ids, self.settings = ids, settings
        self.calls = source.calls(ids)
        self.targets = TargetLayers(work) if work.method.fitted else None

    def run(self, progress: Progress) -> list[float]:
        """Each layer's error after its fit, relative to what the layer adds; [] without fits."""
        count = self.work.plan.layers
        errors: list[float] = []
        # Layers that share their weights are used several times each, on inputs of their own.
        shared = any(len(calls) > 1 for calls in self.calls)
        theirs = ours = [] if shared else [self.source.first_inputs(self.ids)]
        for layer in range(count):
            if shared:
                theirs = ours = self.source.all_inputs(self.ids, layer)
            calls, path = self.calls[layer], self.folder / f"{layer}.safetensors"
            old = self.source.float_layer(layer)
            covariance, outputs = self._measure(old, theirs, calls)
            if not path.exists():
                tensors, about = self._merge(layer, covariance), {}
                if self.targets is not None:
                    uses = [Use(*use) for use in zip(ours, outputs, calls, strict=True)]
                    tensors, error = self._fit(layer, old, tensors, uses)
                    about["error"] = repr(error)
                _save(path, tensors, about)
            if self.targets is not None:
                tensors, about = _load(path)
                errors.append(float(about["error"]))
                if not shared:
                    new = self.targets.filled(layer, old, tensors, self.source.device)
                    ours = [self._run(new, ours[0], calls[0])]
            theirs = outputs
            progress(layer + 1, count, f"layer {layer}")
        return errors

    @torch.no_grad()
    def _measure(
        self, old: nn.Module, inputs: list[Tensor], calls: list[Call]
    ) -> tuple[Tensor, list[Tensor]]:
        """E[x̃ x̃ᵀ] of what the layer's queries are made of, and the layer's outputs."""
        total: Tensor | None = None
        seen = 0

        def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal total, seen
            x = args[0].flatten(0, -2)
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            part = (x.T @ x).double().cpu()
            total, seen = part if total is None else total + part, seen + len(x)

        query = next(slot for slot in self.work.family.layout.slots if "q" in slot.roles)
        handle = old.get_submodule(query.module).register_forward_pre_hook(watch)
        outputs = [self._run(old, x, call) for x, call in zip(inputs, calls, strict=True)]
        handle.remove()
        assert total is not None
        covariance = total / seen
        if not covariance.isfinite().all():
            raise ValueError("the source's hidden states hold NaN or infinity: is it damaged?")
        covariance.diagonal().add_(DAMPING * covariance.diagonal().mean())
        return covariance, outputs

    @torch.no_grad()
    def _run(self, layer: nn.Module, inputs: Tensor, call: Call) -> Tensor:
        """[N, S, E] through a layer, a batch at a time; hidden states wait in main memory."""
        batches = (batch.to(self.source.device) for batch in inputs.split(call.rows))
        return torch.cat([call.run(layer, batch).cpu() for batch in batches])

    def _merge(self, layer: int, covariance: Tensor) -> dict[str, Tensor]:
        facts = replace(
            layer_facts(self.work, layer),
            covariance=covariance,
            seed=self.settings.seed * self.work.plan.layers + layer,
        )
        heads = change_heads(self.work, read_layer(self.work, layer), facts)
        return store_layer(self.work, layer, heads)

    def _fit(
        self, layer: int, old: nn.Module, tensors: Mapping[str, Tensor], uses: list[Use]
    ) -> tuple[dict[str, Tensor], float]:
        assert self.targets is not None
        new = self.targets.filled(layer, old, tensors, self.source.device)
        names = self.targets.stored_names(layer, new)
        parameters = dict(new.named_parameters())
        attention = [parameters[own] for own, name in names.items() if name in tensors]
        others = [parameters[own] for own, name in names.items() if name not in tensors]
        fit = self.settings.fit
        error = fit_layer(new, attention, others, uses, fit, seed=self.settings.seed + layer)
        if not fit.other_lr:
            names = {own: name for own, name in names.items() if name in tensors}
        return {
            name: parameters[own].detach().cpu().to(self.work.dtype_of(name)).contiguous()
            for own, name in names.items()
        }, error


def best_device() -> str:
    """An accelerator where torch has one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else str(accelerator)


def _save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    fresh = path.with_suffix(".new")
    save_file(dict(tensors), fresh, metadata=dict(about))
    with fresh.open("rb") as file:  # a resumed run trusts what has the final name
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names: list[str] = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
