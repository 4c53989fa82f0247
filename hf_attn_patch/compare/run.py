"""compare(): load the source and its candidates, and measure them on the same text."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .divergence import Quality, measure_quality
from .generation import Generation, measure_generation
from .models import LoadedModel, check_same_tokens, labels, load, parse_spec
from .speed import Speed, measure_speed
from .text import prompts_from, read_prompts, read_text, sliding_windows, tokenize

# (what is being done, steps done now, steps in all)
Progress = Callable[[str, int, int], None]

GENERATED_PROMPTS = 8  # taken from the text when no prompts file is given


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    text: Path
    prompts: Path | None = None  # None: sentence beginnings of the text
    max_tokens: int = 4096  # of the text; 0 leaves perplexity and divergence out
    window: int = 512
    stride: int = 256
    new_tokens: int = 64  # per prompt; 0 leaves generation out
    chat: bool | None = None  # None: through the chat template if there is one
    context: int = 512  # prompt tokens of the speed measurement
    decode_tokens: int = 32
    rounds: int = 3  # 0 leaves speed out
    dtype: str = "auto"  # auto: each checkpoint's own
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (leave it out) or more")
        if self.context < 1:
            raise ValueError(f"context must be 1 token or more, got {self.context}")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Lists run in the order source, candidates; empty for what was left out."""

    source: str
    candidates: tuple[str, ...]
    quality: list[Quality]
    generation: list[Generation]
    speed: list[Speed]
    options: CompareOptions
    provenance: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for json.dumps."""
        options = asdict(self.options)
        options |= {k: str(v) for k, v in options.items() if isinstance(v, Path)}
        generation = [
            asdict(g) | {"exact": g.exact, "median_divergence": g.median_divergence}
            for g in self.generation
        ]
        return {
            "source": self.source,
            "candidates": list(self.candidates),
            "quality": [asdict(q) for q in self.quality],
            "generation": generation,
            "speed": [asdict(s) for s in self.speed],
            "options": options,
            "provenance": self.provenance,
        }


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
    text = read_text(options.text)
    prompts = _prompts(options, text)
    models = []
    for i, (spec, label) in enumerate(zip(specs, labels(specs), strict=True)):
        progress("loading", i, len(specs))
        models.append(load(spec, dtype=options.dtype, device=options.device, label=label))
    progress("loading", len(specs), len(specs))
    check_same_tokens(models, text)
    return Comparison(
        source=models[0].label,
        candidates=tuple(m.label for m in models[1:]),
        quality=_quality(models, text, options, progress),
        generation=_generation(models, prompts, options, progress),
        speed=_speed(models, text, options, progress),
        options=options,
        provenance=provenance(models),
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


def _quality(
    models: list[LoadedModel], text: str, options: CompareOptions, progress: Progress
) -> list[Quality]:
    if not options.max_tokens:
        return []
    tokens = tokenize(models[0].tokenizer, text, options.max_tokens)
    windows = sliding_windows(tokens, window=options.window, stride=options.stride)
    return measure_quality(models, windows, _counter(progress, "quality", len(tokens) - 1))


def _generation(
    models: list[LoadedModel], prompts: list[str], options: CompareOptions, progress: Progress
) -> list[Generation]:
    if not options.new_tokens:
        return []
    step = _counter(progress, "generation", len(models) * len(prompts))
    return measure_generation(
        models, prompts, new_tokens=options.new_tokens, chat=options.chat, progress=step
    )


def _speed(
    models: list[LoadedModel], text: str, options: CompareOptions, progress: Progress
) -> list[Speed]:
    if not options.rounds:
        return []
    return measure_speed(
        models,
        tokenize(models[0].tokenizer, text, options.context),
        context=options.context,
        new_tokens=options.decode_tokens,
        rounds=options.rounds,
        progress=_counter(progress, "speed", len(models) * (options.rounds + 1)),
    )


def provenance(models: Sequence[LoadedModel]) -> dict[str, str]:
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
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
