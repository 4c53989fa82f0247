"""What each benchmark can be asked: one place for `hf-attn bench` and for scripts/bench_*.py.

A class is named as its benchmark's module, whose `run` takes its fields. Nothing heavy is imported
here, and no command line's library: a GPU machine has argparse only.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints


class Positional(str):
    """The help of a field that is given by its place, not by its name."""


Out = Annotated[Path | None, "Append the results to this CSV."]
Threads = Annotated[int, "CPU threads."]
Rounds = Annotated[int, "Timed calls of each."]
Dtype = Annotated[str, "float32 or bfloat16."]
Device = Annotated[str, "cpu or cuda."]
Impls = Annotated[Sequence[str] | None, "Only these implementations."]
Checkpoint = Annotated[Path | None, Positional("Folder of a causal language model.")]
Budget = Annotated[float, "Seconds after which nothing new is begun."]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention on this machine's CPU: each implementation beside SDPA and FlexAttention."""

    rows: Annotated[Sequence[str] | None, "Only these rows. By default all."] = None
    out: Out = None
    threads: Threads = 2
    quick: Annotated[bool, "Small shapes and few rounds."] = False


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How the cost of attention on this machine's CPU grows with length."""

    curves: Annotated[Sequence[str] | None, "Only these curves. By default all."] = None
    out: Out = None
    threads: Threads = 1
    longest: Annotated[int | None, "No length above so many tokens."] = None
    rounds: Rounds = 9


@dataclass(frozen=True, kw_only=True)
class Mla:
    """A latent attention layer's decoding step on the CPU beside transformers' own."""

    keys: Annotated[Sequence[int], "Tokens in the cache."] = (1024, 4096, 16384)
    dtypes: Annotated[Sequence[str], "fp32, bf16 or both."] = ("fp32", "bf16")
    out: Out = None
    threads: Threads = 1
    budget_s: Annotated[float, "Seconds for each timing."] = 20.0


@dataclass(frozen=True, kw_only=True)
class Short:
    """Short prompts, one at a time, beside sdpa: what a call costs where attention is small."""

    checkpoint: Annotated[Path, Positional("Folder of a causal language model.")]
    prompts: Annotated[Sequence[int], "Their tokens."] = (16, 64, 128)
    new_tokens: Annotated[int, "Generated per prompt."] = 32
    dtype: Dtype = "float32"
    rounds: Rounds = 15
    threads: Threads = 1
    out: Out = None


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Many requests at once (generate_batch): tokens per second and memory."""

    checkpoint: Checkpoint = None
    shape: Annotated[str | None, "Random weights and prompts in a checkpoint's place."] = None
    text: Annotated[Path | None, "File that the prompts are cut from, .xz or plain."] = None
    device: Device = "cpu"
    impls: Impls = None
    requests: Annotated[int, "Prompts."] = 32
    shortest: Annotated[int, "Tokens of the shortest prompt."] = 32
    longest: Annotated[int, "Tokens of the longest prompt."] = 512
    new_tokens: Annotated[int, "Generated per prompt."] = 64
    dtype: Dtype = "float32"
    page_size: Annotated[int, "Tokens of a page."] = 64
    max_batch_tokens: Annotated[int, "Tokens of one pass at most."] = 2048
    rounds: Rounds = 3
    threads: Threads = 2
    out: Out = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """A whole model: prefill, decode steps and training steps, with their memory."""

    checkpoint: Checkpoint = None
    shape: Annotated[str | None, "Random weights in a checkpoint's place."] = None
    phases: Annotated[Sequence[str] | None, "Only prefill, decode or training."] = None
    batches: Annotated[Sequence[int] | None, "Sequences at once. By default the phase's."] = None
    contexts: Annotated[Sequence[int] | None, "Tokens of each. By default the phase's."] = None
    impls: Impls = None
    dtype: Dtype = "float32"
    device: Device = "cpu"
    quick: Annotated[bool, "The smallest of each phase, once."] = False
    rounds: Rounds = 5
    threads: Threads = 2
    budget_s: Budget = 540.0
    out: Out = None


@dataclass(frozen=True, kw_only=True)
class Convert:
    """The converter beside `cp` of the same bytes: throughput and peak memory."""

    gigabytes: Annotated[float, "Size of the source."] = 4
    shards: Annotated[int, "Files of the source."] = 8
    rounds: Rounds = 3
    folder: Annotated[Path | None, "Where to work."] = None
    out: Out = None


BENCHMARKS = {kind.__name__.lower(): kind for kind in (
    Attention, Growth, Mla, Short, Generate, Model, Convert,
)}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Option:
    """One field as a command line needs it."""

    name: str
    kind: type  # of one value
    many: bool
    default: Any  # MISSING where it must be given
    help: str

    @property
    def positional(self) -> bool:
        return isinstance(self.help, Positional)

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def flag(self) -> str:
        return f"--{self.name.removesuffix('_s').replace('_', '-')}"


def options_of(benchmark: str) -> list[Option]:
    """The options of a benchmark, in order."""
    kind = BENCHMARKS[benchmark]
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in fields(kind):
        annotated = hints[field.name]
        plain, text = annotated.__origin__, annotated.__metadata__[0]
        parts = [part for part in get_args(plain) if part is not type(None)]
        if type(None) in get_args(plain):
            plain = parts[0]
        many = get_origin(plain) is Sequence
        one = get_args(plain)[0] if many else plain
        found.append(Option(name=field.name, kind=one, many=many, default=field.default, help=text))
    return found


def run(benchmark: str, given: dict[str, Any], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run a benchmark with what a command line gave; `say` is told what it is about to measure."""
    module = importlib.import_module(f"{__package__}.{benchmark}")
    if note := _slow(given):
        say(note)
    if "say" in inspect.signature(module.run).parameters:
        given = given | {"say": say}
    found: list[dict[str, Any]] = module.run(**given)
    return found


def _slow(given: dict[str, Any]) -> str | None:
    """That the dtype asked for is one which the device multiplies slowly."""
    if given.get("dtype") != "bfloat16" and "bf16" not in given.get("dtypes", ()):
        return None
    import torch

    from hf_attn_converters.precision import slow_note

    return slow_note(torch.bfloat16, given.get("device", "cpu"), "float32 is what people run here")


# --- what was found, for a reader ----------------------------------------------------------------


def summary(found: Sequence[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """What all rows share in one line, then the header and the cells of the rest."""
    if not found:
        return "", [], []
    filled = [key for key in found[0] if any(row[key] not in (None, "") for row in found)]
    text = [{key: _cell(row[key]) for key in filled} for row in found]
    header = [key for key in filled if len(text) == 1 or len({row[key] for row in text}) > 1]
    same = "; ".join(f"{key} {text[0][key]}" for key in filled if key not in header)
    return same, header, [[row[key] for key in header] for row in text]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
