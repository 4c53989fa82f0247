"""What a comparison is asked for, and what it found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .divergence import Quality
from .encoders import EncoderQuality
from .generation import Generation
from .records import Record
from .speed import Speed
from .tasks import TaskScore
from .weights import Weights


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    text: Path
    prompts: Path | None = None  # None: sentence beginnings of the text
    max_tokens: int = 4096  # of the text; 0 leaves perplexity and divergence out
    window: int = 512
    stride: int = 0  # tokens scored per window; 0: half of it
    new_tokens: int = 64  # per prompt; 0 leaves generation out
    chat: bool | None = None  # None: through the chat template if there is one
    context: int = 512  # prompt tokens of the speed measurement
    more_contexts: tuple[int, ...] = ()  # measured too, for the curve
    batches: tuple[int, ...] = (1,)  # sequences at once; the first is the one in the table
    decode_tokens: int = 32
    rounds: int = 3  # 0 leaves speed out
    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness, which must be installed
    task_limit: int | None = None  # examples of each task; None: all
    dtype: str = "auto"  # auto: each checkpoint's own
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (leave it out) or more")
        if self.stride == 0:
            object.__setattr__(self, "stride", self.window // 2)
        if not 1 <= self.stride < self.window:
            raise ValueError(
                f"stride must lie in 1..window-1, got stride {self.stride}, window {self.window}"
            )
        if not self.batches:
            raise ValueError("batches must name at least one number of sequences")
        for name in ("context", "more_contexts", "batches"):
            value = getattr(self, name)
            if any(n < 1 for n in (value if isinstance(value, tuple) else [value])):
                raise ValueError(f"{name} must be 1 or more, got {value}")

    @property
    def settings(self) -> list[tuple[int, int]]:
        """(context, batch) of every timing, the table's first, none twice."""
        contexts = (self.context, *self.more_contexts)
        return list(dict.fromkeys((c, b) for b in self.batches for c in contexts))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Lists run in the order source, candidates; empty for what was left out.

    `weights` has no entry for the source, `sweep` one for every model at every context and batch.
    """

    source: str
    candidates: tuple[str, ...]
    quality: list[Quality]
    generation: list[Generation]
    speed: list[Speed]
    options: CompareOptions
    provenance: dict[str, str]
    sweep: list[Speed] = field(default_factory=list)
    encoders: list[EncoderQuality] = field(default_factory=list)
    tasks: list[TaskScore] = field(default_factory=list)
    weights: list[Weights] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    specs: tuple[str, ...] = ()  # as they were given, folders by their name
    units: str = ""  # what the bootstrap draws: "documents" or "blocks of tokens"

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for json.dumps."""
        options = asdict(self.options)
        options |= {k: str(v) for k, v in options.items() if isinstance(v, Path)}
        generation = [
            asdict(g)
            | {
                "exact": g.exact,
                "median_divergence": g.median_divergence,
                "still_same": g.still_same,
                "repetition": g.repetition,
            }
            for g in self.generation
        ]
        listed = ("quality", "encoders", "speed", "sweep", "tasks", "weights", "records")
        return {
            "source": self.source,
            "candidates": list(self.candidates),
            "generation": generation,
            **{name: [asdict(one) for one in getattr(self, name)] for name in listed},
            "options": options,
            "provenance": self.provenance,
            "bootstrap_units": self.units,
        }
