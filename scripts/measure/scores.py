"""What one conversion scored on one text, and the CSV row that keeps it."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

Progress = Callable[[int, int], None]  # (done, of how many)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """None: not a measure of this kind of model.

    Perplexities are of the next token, or of a masked one given all others; `kl` is KL(source ||
    converted) in nats per token, `top1` the share of tokens where both prefer the same one,
    `cosine` the mean between their embeddings of a sentence, `accuracy` the share of masked tokens
    that a model finds.
    """

    tokens: int
    source_ppl: float | None = None
    ppl: float | None = None
    kl: float | None = None
    top1: float | None = None
    cosine: float | None = None
    accuracy_source: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One conversion on one evaluation text. `seconds` are the conversion's."""

    subject: str
    kv_before: int
    kv_after: int
    method: str
    calibration: str  # what the tokens were; empty for methods that need none
    calibration_tokens: int | None
    sequence_length: int | None
    steps: int | None  # of the fit, per layer
    attention_lr: float | None
    other_lr: float | None
    text: str
    scores: Scores
    seconds: float

    def cells(self) -> dict[str, str]:
        """The row as CSV text, without the environment's columns."""
        merged = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scores"}
        merged |= asdict(self.scores)
        if self.scores.ppl is not None and self.scores.source_ppl is not None:
            merged["ratio"] = self.scores.ppl / self.scores.source_ppl
        return {name: _text(merged.get(name)) for name in COLUMNS if name not in ENVIRONMENT}


ENVIRONMENT = ("device", "threads", "torch", "transformers", "commit", "date")
# fmt: off
COLUMNS = (
    "subject", "kv_before", "kv_after", "method", "calibration", "calibration_tokens",
    "sequence_length", "steps", "attention_lr", "other_lr", "text", "tokens", "source_ppl", "ppl",
    "ratio", "kl", "top1", "cosine", "accuracy_source", "accuracy", "seconds", *ENVIRONMENT,
)
# fmt: on


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def append(path: Path, rows: Iterable[Measured]) -> None:
    """Append rows to a CSV, which gets its header first when it is new.

    Raises ValueError when the file has other columns.
    """
    from hf_attn_patch.bench.results import environment

    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="") as file:
            if tuple(next(csv.reader(file), ())) != COLUMNS:
                raise ValueError(f"{path} has other columns: name another file")
    stamp = {name: str(getattr(environment(), name)) for name in ENVIRONMENT}
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(row.cells() | stamp for row in rows)
