"""What can be chosen about an uptraining: the one table of names, defaults and help.

`hf-attn uptrain` and `scripts/uptrain.py` offer these fields; a test holds them together.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# share of the KL; the rest is cross-entropy. None: `kl_share` says
LOSSES: dict[str, float | None] = {"kl": 1.0, "ce": 0.0, "mix": None}
TRAINED = ("attention", "all")
# bf16: float32 weights, bfloat16 arithmetic (autocast); bf16-weights: bfloat16 weights too;
# auto: bf16 where the device multiplies it fast, else float32
AUTO = "auto"
PRECISIONS = (AUTO, "float32", "bf16", "bf16-weights")

SHARE = 1e-4  # of the pretraining's tokens, where those are given
# Without them: a share of what is usual for so many weights (Hoffmann et al., arXiv:2203.15556).
USUAL_SHARE, USUAL_PER_WEIGHT = 1e-3, 20


@dataclass(frozen=True, kw_only=True)
class UptrainOptions:
    """One uptraining; each field's ``metadata["help"]`` says what it is.

    `text` names what :func:`..io.text.read_documents` reads.

    Raises ValueError for values out of range.
    """

    student: str | Path = field(metadata={"help": "Folder of the converted checkpoint."})
    output: str | Path = field(metadata={"help": "Folder to write; must not exist, or be empty."})
    text: tuple[str, ...] = field(
        metadata={"help": "Text, JSONL, Parquet or a dataset NAME:SPLIT; may be several."}
    )
    teacher: str | Path | None = field(
        default=None, metadata={"help": "Folder of the source that the student was converted from."}
    )
    eval_text: str | None = field(
        default=None, metadata={"help": "Measure on this, not on a held-out part of the text."}
    )
    tokens: int | None = field(
        default=None, metadata={"help": "To train on; if not given, a share of the pretraining's."}
    )
    pretraining_tokens: int | None = field(
        default=None,
        metadata={
            "help": "What the source was trained on; if not given, what is usual for its size."
        },
    )
    sequence_length: int = field(
        default=512, metadata={"help": "Tokens of a row; at most what the model has positions for."}
    )
    loss: str = field(
        default="kl", metadata={"help": "kl (from the teacher, forward, temperature 1), ce or mix."}
    )
    kl_share: float = field(default=0.5, metadata={"help": "Of the KL, in a mix."})
    train: str = field(default="all", metadata={"help": "attention, or all weights."})
    learning_rate: float = field(
        default=5e-4, metadata={"help": "The peak, after the warm-up; then linear to zero."}
    )
    warmup: float = field(default=0.05, metadata={"help": "Share of the steps."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's, on matrices only."})
    clip: float = field(default=1.0, metadata={"help": "Largest norm of the gradient."})
    batch_size: int = field(default=8, metadata={"help": "Rows at once, of each process."})
    accumulate: int = field(default=1, metadata={"help": "Batches per step."})
    precision: str = field(
        default=AUTO,
        metadata={
            "help": "bf16 (arithmetic), bf16-weights or float32; auto: bf16 where that is fast."
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations twice to save memory."}
    )
    evaluations: int = field(
        default=10,
        metadata={
            "help": "In the course of the training, a checkpoint after each; one more before it."
        },
    )
    eval_tokens: int = field(
        default=16_384, metadata={"help": "Held out; at most a tenth of the text."}
    )
    patience: int = field(
        default=3,
        metadata={"help": "Evaluations in a row without gain before it stops; 0 never stops."},
    )
    min_gain: float = field(
        default=0.001, metadata={"help": "What counts as a gain: a share of the best loss so far."}
    )
    seed: int = field(
        default=0, metadata={"help": "Of whatever is drawn: the order of the text, dropout."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "As transformers knows it: triton_fa2, sdpa, eager and others."},
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, to leave an accelerator unused."}
    )
    report_to: str = field(
        default="none",
        metadata={"help": "Loggers of transformers' Trainer, such as tensorboard; commas between."},
    )
    control: bool = field(
        default=False,
        metadata={"help": "Train the source likewise, to say how much was recovered."},
    )
    resume: bool = field(
        default=False, metadata={"help": "Continue an interrupted run to the same output."}
    )

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

    def budget(self, weights: int) -> int:
        """Tokens to train a model of so many `weights` on."""
        if self.tokens is not None:
            return self.tokens
        share, pretraining = SHARE, self.pretraining_tokens
        if pretraining is None:
            share, pretraining = USUAL_SHARE, USUAL_PER_WEIGHT * weights
        return max(1, round(share * pretraining))

    def recipe(self) -> dict[str, Any]:
        """What the result depends on, as JSON, without folders and places."""
        left_out = ("student", "teacher", "output", "text", "eval_text", "resume", "report_to")
        return {k: v for k, v in asdict(self).items() if k not in left_out}
