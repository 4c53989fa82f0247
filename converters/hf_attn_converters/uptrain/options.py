"""What can be chosen about an uptraining: the one table of names and defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# share of the KL; the rest is cross-entropy. None: `kl_share` says
LOSSES: dict[str, float | None] = {"kl": 1.0, "ce": 0.0, "mix": None}
TRAINED = ("attention", "all")
# bf16: float32 weights, bfloat16 arithmetic (autocast); bf16-weights: bfloat16 weights too
PRECISIONS = ("float32", "bf16", "bf16-weights")

FIXED_TOKENS = 1_000_000
SHARE = 1e-4  # of the pretraining's tokens, where those are given


@dataclass(frozen=True, kw_only=True)
class UptrainOptions:
    """One uptraining.

    Args:
        student: folder of the converted checkpoint.
        output: folder to write; must not exist, or be empty.
        text: files (plain, ``.jsonl``, ``.parquet``) or datasets, see
            :func:`..text.read_documents`.
        teacher: folder of the checkpoint that `student` was made from.
        eval_text: measured on instead of a held-out part of `text`.
        tokens: to train on; more than the text holds: it is read again. None: a hundredth of a
            percent of `pretraining_tokens` if those are given, else a million.
        pretraining_tokens: what the source was trained on.
        sequence_length: tokens of a row; rounded down to what the model has positions for.
        loss: ``kl`` (from the teacher, forward, temperature 1), ``ce`` or ``mix``.
        kl_share: of the mix.
        train: ``attention`` alone, or ``all`` weights.
        learning_rate: the peak, reached after `warmup` (a share of the steps); then linear to zero.
        weight_decay: AdamW's, on matrices only.
        clip: largest norm of the gradient.
        batch_size: rows per process at once.
        accumulate: batches per step.
        precision: see ``PRECISIONS``.
        gradient_checkpointing: compute activations twice instead of keeping them.
        evaluations: in the course of the training, a checkpoint after each; one more before it.
        eval_tokens: held out, at most a tenth of the text.
        patience: stop after so many evaluations in a row that gain less than `min_gain` (a
            share of the loss) on the best before; 0 never stops.
        seed: of whatever is drawn: the order of the text, dropout.
        attn_implementation: as transformers knows it; None: the model's own choice.
        device: ``cpu`` to leave an accelerator unused; None: the accelerator if there is one.
        report_to: ``none`` or loggers of the Trainer, such as ``tensorboard``.
        control: train the teacher by the same recipe as well, to know what it gains.
        resume: continue an interrupted run to the same `output`.

    Raises ValueError for values out of range.
    """

    student: str | Path
    output: str | Path
    text: tuple[str, ...]
    teacher: str | Path | None = None
    eval_text: str | None = None
    tokens: int | None = None
    pretraining_tokens: int | None = None
    sequence_length: int = 512
    loss: str = "kl"
    kl_share: float = 0.5
    train: str = "all"
    learning_rate: float = 5e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    precision: str = "bf16"
    gradient_checkpointing: bool = False
    evaluations: int = 10
    eval_tokens: int = 16_384
    patience: int = 3
    min_gain: float = 0.001
    seed: int = 0
    attn_implementation: str | None = None
    device: str | None = None
    report_to: str = "none"
    control: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        for name, known in (("loss", LOSSES), ("train", TRAINED), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                possible = ", ".join(known)
                raise ValueError(f"{name} is {getattr(self, name)!r}; possible: {possible}")
        if not self.text:
            raise ValueError("there is no text: give a file or a dataset")
        if self.teacher is None and (self.kl_weight > 0 or self.control):
            what = "a control run" if self.control else f"the loss {self.loss!r}"
            raise ValueError(f"{what} needs a teacher: give the source checkpoint")
        for name in ("sequence_length", "batch_size", "accumulate", "evaluations", "eval_tokens"):
            self._at_least(name, 2 if name == "sequence_length" else 1)
        for name in ("tokens", "pretraining_tokens"):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("patience", "min_gain", "weight_decay"):
            self._at_least(name, 0)
        for name in ("kl_share", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share from 0 to 1, got {getattr(self, name)}")
        if self.device not in (None, "cpu"):
            raise ValueError(f"device is {self.device!r}; possible: cpu, or none for the best")

    def _at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def kl_weight(self) -> float:
        share = LOSSES[self.loss]
        return self.kl_share if share is None else share

    @property
    def budget(self) -> int:
        """Tokens wanted."""
        if self.tokens is not None:
            return self.tokens
        if self.pretraining_tokens is not None:
            return max(1, round(SHARE * self.pretraining_tokens))
        return FIXED_TOKENS

    def recipe(self) -> dict[str, Any]:
        """What the result depends on, as JSON, without folders and places."""
        left_out = ("student", "teacher", "output", "text", "eval_text", "resume", "report_to")
        return {k: v for k, v in asdict(self).items() if k not in left_out} | {
            "tokens": self.budget
        }
