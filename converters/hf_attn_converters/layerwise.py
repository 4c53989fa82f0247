"""Calibrated conversion: layer after layer is measured, computed, perhaps fitted, and stored.

What a layer becomes is written to a file of its own; the streaming writer takes it from there, and
an interrupted run continues behind the last finished layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibration import Calibration
from .calibration.fit import Use, fit_layer
from .calibration.source_model import SourceModel, rows_at_once
from .calibration.statistics import Measured, Watch, run_layer
from .calibration.tokens import Progress, Tokens, calibration_tokens
from .conversion import Work
from .heads.layer import layer_facts, read_layer
from .target_layer import TargetLayers

TOKENS_FILE, SURVEY_FILE = "tokens.safetensors", "survey.safetensors"


def calibrate_layers(
    work: Work,
    folder: Path,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> tuple[Work, dict[str, Any]]:
    """Write ``folder/<n>.safetensors`` for every layer n: the tensors that the method changes.

    Returns the work, now with what its form had to know ahead, and what the conversion's record
    says of it all. `progress` counts layers. Raises ValueError where transformers cannot build the
    model or the text is unusable.
    """
    say = progress or (lambda done, total, what: None)
    folder.mkdir(exist_ok=True)
    settings = calibration or Calibration()
    source = source_model(
        work,
        device=settings.device or best_device(),
        tokens_at_once=settings.fit.step_tokens,
    )
    settings = settings.at_most(source.positions)
    tokens = _tokens(work, folder, settings, source, say)
    watch = Watch(source, tokens.ids)
    work = _surveyed(work, folder, watch, say)
    errors = _Conversion(work, folder, watch, settings).run(say)
    record: dict[str, Any] = {
        "origin": tokens.origin,
        "tokens": tokens.count,
        "sequence_length": tokens.ids.shape[1],
        "windows_begin_with": tokens.begin,
        "windows_end_with": tokens.end,
        "seed": settings.seed,
    }
    if work.method.fitted:
        record |= {"fit": asdict(settings.fit), "errors": [round(e, 6) for e in errors]}
    return work, record


def source_model(work: Work, **options: Any) -> SourceModel:
    """The model of a conversion's source. `options`: device and tokens_at_once of `SourceModel`."""
    return SourceModel(
        work.source.folder,
        work.family,
        layers=work.plan.layers,
        trust_remote_code=work.is_our_code,
        **options,
    )


def _tokens(
    work: Work, folder: Path, settings: Calibration, source: SourceModel, progress: Progress
) -> Tokens:
    """The tokens, from an interrupted run's file where there is one."""
    path = folder / TOKENS_FILE
    if path.exists():
        tensors, about = _load(path)
        return Tokens(tensors["ids"], about["origin"], about["begin"], about["end"])
    with source.products():
        found = calibration_tokens(settings, source, progress)
    together = rows_at_once(found.ids, settings.fit.step_tokens)
    found = replace(found, ids=found.ids[: len(found.ids) // together * together].contiguous())
    about = {"origin": found.origin, "begin": found.begin, "end": found.end}
    _save(path, {"ids": found.ids}, about)
    return found


def _surveyed(work: Work, folder: Path, watch: Watch, progress: Progress) -> Work:
    """With what the form has to know of all layers: from an interrupted run's file, if there."""
    path, count = folder / SURVEY_FILE, work.plan.layers

    def layers() -> Iterator[Measured]:
        for measured in watch.layers():
            yield measured
            progress(measured.layer + 1, count, f"survey of layer {measured.layer}")

    if not path.exists():
        found = work.form.survey(work, watch.source, layers())
        if found is None:
            return work
        _save(path, found, {})
    return replace(work, form=work.form.informed(_load(path)[0]))


class _Conversion:
    """The layers one after the other, with the hidden states that reach each."""

    def __init__(self, work: Work, folder: Path, watch: Watch, settings: Calibration) -> None:
        self.work, self.folder, self.watch, self.settings = work, folder, watch, settings
        self.device = watch.source.device
        self.targets = TargetLayers(work) if work.method.fitted else None

    def run(self, progress: Progress) -> list[float]:
        """Each layer's error after its fit, relative to what the layer adds; [] without fits."""
        count = self.work.plan.layers
        errors: list[float] = []
        ours: list[Tensor] = []
        for seen in self.watch.layers():
            layer, path = seen.layer, self.folder / f"{seen.layer}.safetensors"
            if self.watch.shared or layer == 0:
                ours = seen.inputs
            if not path.exists():
                tensors, about = self._computed(seen), {}
                if self.targets is not None:
                    tensors, error = self._fit(seen, tensors, ours)
                    about["error"] = repr(error)
                _save(path, tensors, about)
            if self.targets is not None:
                tensors, about = _load(path)
                errors.append(float(about["error"]))
                if not self.watch.shared:
                    new = self.targets.filled(layer, seen.module, tensors, self.device)
                    call = self.targets.call(self.watch.calls[layer][0])
                    ours = [run_layer(new, ours[0], call, self.device)]
            progress(layer + 1, count, f"layer {layer}")
        return errors

    def _computed(self, seen: Measured) -> dict[str, Tensor]:
        work, layer = self.work, seen.layer
        seed = self.settings.seed * work.plan.layers + layer
        facts = replace(seen.facts(layer_facts(work, layer)), seed=seed)
        return work.form.layer(work, layer, read_layer(work, layer), facts)

    def _fit(
        self, seen: Measured, tensors: Mapping[str, Tensor], ours: list[Tensor]
    ) -> tuple[dict[str, Tensor], float]:
        assert self.targets is not None
        calls = [self.targets.call(call) for call in self.watch.calls[seen.layer]]
        uses = [Use(*use) for use in zip(ours, seen.outputs, calls, strict=True)]
        new = self.targets.filled(seen.layer, seen.module, tensors, self.device)
        names = self.targets.stored_names(seen.layer, new)
        parameters = dict(new.named_parameters())
        attention = [parameters[own] for own, name in names.items() if name in tensors]
        others = [parameters[own] for own, name in names.items() if name not in tensors]
        fit = self.settings.fit
        error = fit_layer(new, attention, others, uses, fit, seed=self.settings.seed + seen.layer)
        if not fit.other_lr:
            names = {own: name for own, name in names.items() if name in tensors}
        dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        return {
            name: parameters[own]
            .detach()
            .cpu()
            .to(dtypes.get(name) or self.work.dtype_of(name))
            .contiguous()
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
