"""Tasks of lm-evaluation-harness, where it is installed: this file only hands the models over."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..loading import LoadedModel


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    label: str
    task: str
    metric: str  # "acc", "acc_norm", "exact_match", ...
    value: float
    error: float | None  # standard error, where the harness gives one


def check_tasks(names: Sequence[str]) -> None:
    """Raises ValueError when tasks are asked for and the harness is not installed."""
    if names and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"the tasks {', '.join(names)} need lm-evaluation-harness, which is not installed: "
            "pip install lm-eval, or leave --task out"
        )


def measure_tasks(
    models: Sequence[LoadedModel],
    names: Sequence[str],
    *,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda models: None,
) -> list[TaskScore]:
    """Every numeric metric of every task for every model, on `limit` examples of each (None: all).

    A name is a task that the harness knows, or the path of a task's YAML file, whose data may be
    local. Raises what the harness raises for unknown tasks.
    """
    if not names:
        return []
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # the harness takes a file for one only by its absolute path
    tasks = [str(Path(name).absolute()) if name.endswith(".yaml") else name for name in names]
    found = []
    for loaded in models:
        wrapped = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer)
        done: Any = simple_evaluate(model=wrapped, tasks=tasks, limit=limit, bootstrap_iters=1000)
        found += [
            score for task, row in done["results"].items() for score in _scores(loaded, task, row)
        ]
        progress(1)
    return found


def _scores(loaded: LoadedModel, task: str, row: dict[str, Any]) -> list[TaskScore]:
    """The harness names a metric "acc,none" and its error "acc_stderr,none"."""
    scores = []
    for key, value in row.items():
        metric, comma, _ = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(key.replace(",", "_stderr,", 1))
        scores.append(
            TaskScore(
                label=loaded.label,
                task=task,
                metric=metric,
                value=float(value),
                error=error if isinstance(error, float) else None,
            )
        )
    return scores
