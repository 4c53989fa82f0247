"""What happens in the course of a training: progress, a stop on a plateau, whole checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..io.atomic_output import sync_folder

COMPLETE = "complete"  # in a checkpoint: all that belongs to it was written


class Steps(TrainerCallback):
    """Tells `progress(done, total, what)` of each step, and `say(line)` of each evaluation."""

    def __init__(
        self, progress: Callable[[int, int, str], None], say: Callable[[str], None], what: str
    ) -> None:
        self.progress, self.say, self.what = progress, say, what

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress(state.global_step, state.max_steps, self.what)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        metrics: dict[str, float] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        found = metrics or {}
        parts = [f"{n} {found['eval_' + n]:.4g}" for n in ("kl", "ppl") if f"eval_{n}" in found]
        self.say(f"{self.what}, step {state.global_step}: held-out {', '.join(parts)}")


class Plateau(TrainerCallback):
    """Stops after `patience` evaluations in a row that gain less than the share `min_gain`.

    It looks at the logged losses only, which a checkpoint keeps: resuming changes nothing.
    """

    def __init__(self, patience: int, min_gain: float) -> None:
        self.patience, self.min_gain = patience, min_gain

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if self.patience and waited(losses, self.min_gain) >= self.patience:
            control.should_training_stop = True


def waited(losses: Sequence[float], min_gain: float) -> int:
    """Evaluations since the last that was better than the best before it by `min_gain` of it."""
    best, count = float("inf"), 0
    for loss in losses:
        good = loss < best * (1 - min_gain) if best < float("inf") else True
        best, count = (loss, 0) if good else (best, count + 1)
    return count


class Whole(TrainerCallback):
    """Marks a checkpoint that was written to its end, and saves one after each evaluation only."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A checkpoint without an evaluation before it could hold NaN.
        control.should_save = control.should_evaluate

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.should_save:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            sync_folder(folder)
            (folder / COMPLETE).touch()


def last_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint that is whole."""
    found = [path.parent for path in work.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def clear_torn(work: Path) -> None:
    """Remove checkpoints that a kill left unfinished."""
    for path in work.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
