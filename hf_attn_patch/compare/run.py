"""compare(): load the source and its candidates, and measure them on the same text."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from ..loading import (
    Kind,
    LoadedModel,
    ModelSpec,
    check_same_tokens,
    kind_of,
    labels,
    load,
    parse_spec,
)
from .divergence import measure_quality
from .encoders import EncoderQuality, measure_encoders
from .generation import Generation, measure_generation
from .options import CompareOptions, Comparison
from .records import read_record
from .speed import Speed, measure_speed
from .tasks import TaskScore, check_tasks, measure_tasks
from .text import (
    Documents,
    first_scored,
    prompts_from,
    read_documents,
    read_prompts,
    sliding_windows,
    special_tokens_before,
    tokenize,
    tokenize_documents,
)
from .weights import compare_weights

# (what is being done, steps done now, steps in all)
Progress = Callable[[str, int, int], None]

GENERATED_PROMPTS = 8  # taken from the text when no prompts file is given


def compare(
    source: str,
    candidates: Sequence[str],
    options: CompareOptions,
    progress: Progress = lambda what, done, total: None,
) -> Comparison:
    """Compare each candidate with the source. All are `PATH[@implementation]`, see `parse_spec`.

    All models are loaded at once: their memory adds up. Raises ValueError for misuse.
    """
    specs = [parse_spec(text) for text in (source, *candidates)]
    if len(specs) < 2:
        raise ValueError("name at least one candidate to compare the source with")
    documents = read_documents(options.text)
    prompts = _prompts(options, documents.text)
    check_tasks(options.tasks)
    kind = _common_kind(specs)
    models = []
    for i, (spec, label) in enumerate(zip(specs, labels(specs), strict=True)):
        progress("loading", i, len(specs))
        models.append(
            load(spec, dtype=options.dtype, device=options.device, label=label, kind=kind)
        )
    progress("loading", len(specs), len(specs))
    check_same_tokens(models, documents.text)
    _check_positions(models, options)
    found = Comparison(
        source=models[0].label,
        candidates=tuple(m.label for m in models[1:]),
        quality=[],
        generation=[],
        speed=[],
        options=options,
        provenance=provenance(models, options),
        weights=compare_weights(models),
        records=[read_record(m.label, m.spec.path) for m in models],
        specs=tuple(spec.label for spec in specs),
    )
    if kind.decodes:
        found = _with_quality(found, models, documents, progress)
        found = replace(found, generation=_generation(models, prompts, options, progress))
        found = replace(found, tasks=_tasks(models, options, progress))
    else:
        found = replace(found, encoders=_encoders(models, documents.text, options, progress))
    sweep = _sweep(models, documents.text, options, progress)
    return replace(found, sweep=sweep, speed=sweep[: len(models)])


def _common_kind(specs: Sequence[ModelSpec]) -> Kind:
    kinds = [kind_of(spec.path) for spec in specs]
    for spec, kind in zip(specs[1:], kinds[1:], strict=True):
        if kind.decodes != kinds[0].decodes:
            raise ValueError(
                f"{spec.path} is a {kind.name}, {specs[0].path} a {kinds[0].name}: they have "
                "nothing to compare"
            )
    # an encoder without a head is all that a candidate or the source may be
    return next((kind for kind in kinds if kind.auto_class == "AutoModel"), kinds[0])


def _check_positions(models: Sequence[LoadedModel], options: CompareOptions) -> None:
    """Raises ValueError when a window or a timing needs more positions than a model has."""
    wanted = {"--window": min(options.window, options.max_tokens)}
    if options.rounds:
        wanted["--context with --decode-tokens"] = max(c for c, _ in options.settings) + (
            options.decode_tokens if models[0].decodes else 0
        )
    if not models[0].decodes:
        del wanted["--window"]  # rows of masked tokens have a length of their own
    for loaded in models:
        has = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        for option, positions in wanted.items():
            if has is not None and positions > has:
                raise ValueError(
                    f"{loaded.label} has {has} positions, not the {positions} that "
                    f"{option} takes: ask for fewer"
                )


def _prompts(options: CompareOptions, text: str) -> list[str]:
    if options.prompts is not None:
        return read_prompts(options.prompts)
    return prompts_from(text, GENERATED_PROMPTS)


def _counter(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    done = 0
    progress(what, 0, total)

    def step(n: int) -> None:
        nonlocal done
        done += n
        progress(what, done, total)

    return step


def _with_quality(
    found: Comparison, models: list[LoadedModel], documents: Documents, progress: Progress
) -> Comparison:
    options = found.options
    if not options.max_tokens:
        return found
    tokens, units, name = tokenize_documents(models[0].tokenizer, documents, options.max_tokens)
    _check_length(tokens, options)
    before = special_tokens_before(models[0].tokenizer, tokens)
    windows = sliding_windows(tokens, window=options.window, stride=options.stride, before=before)
    first = first_scored(before)
    step = _counter(progress, "quality", len(models) * (len(tokens) - first))
    quality = measure_quality(models, windows, step, units[first:])
    begin = " ".join(models[0].tokenizer.convert_ids_to_tokens(tokens[:before].tolist()))
    return replace(
        found,
        quality=quality,
        units=name,
        provenance=found.provenance | {"windows begin with": begin or "no special token"},
    )


def _check_length(tokens: Tensor, options: CompareOptions) -> None:
    least = min(options.window, options.max_tokens)
    if len(tokens) < least:
        raise ValueError(
            f"{options.text} has {len(tokens)} tokens, less than one window of {least}: give a "
            "longer text, or a smaller --window"
        )


def _generation(
    models: list[LoadedModel], prompts: list[str], options: CompareOptions, progress: Progress
) -> list[Generation]:
    if not options.new_tokens:
        return []
    step = _counter(progress, "generation", len(models) * len(prompts))
    return measure_generation(
        models, prompts, new_tokens=options.new_tokens, chat=options.chat, progress=step
    )


def _encoders(
    models: list[LoadedModel], text: str, options: CompareOptions, progress: Progress
) -> list[EncoderQuality]:
    if not options.max_tokens:
        return []
    return measure_encoders(
        models, text, options.max_tokens, _counter(progress, "quality", len(models))
    )


def _tasks(
    models: list[LoadedModel], options: CompareOptions, progress: Progress
) -> list[TaskScore]:
    if not options.tasks:
        return []
    step = _counter(progress, "tasks", len(models))
    return measure_tasks(models, options.tasks, limit=options.task_limit, progress=step)


def _sweep(
    models: list[LoadedModel], text: str, options: CompareOptions, progress: Progress
) -> list[Speed]:
    """All models at every (context, batch), one after the other; none with 0 rounds."""
    if not options.rounds:
        return []
    longest = max(context for context, _ in options.settings)
    tokens = tokenize(models[0].tokenizer, text, longest)
    step = _counter(progress, "speed", len(options.settings) * len(models) * (options.rounds + 1))
    return [
        row
        for context, batch in options.settings
        for row in measure_speed(
            models,
            tokens,
            context=context,
            batch=batch,
            new_tokens=options.decode_tokens,
            rounds=options.rounds,
            progress=step,
        )
    ]


def provenance(models: Sequence[LoadedModel], options: CompareOptions) -> dict[str, str]:
    """On what and with what it was measured."""
    import transformers

    import hf_attn_patch

    device = models[0].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} ({name}), {torch.get_num_threads()} threads",
        "dtype": ", ".join(sorted({str(m.model.dtype).removeprefix("torch.") for m in models})),
        "hf_attn_patch": hf_attn_patch.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "text sha256": _digest(options.text),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
