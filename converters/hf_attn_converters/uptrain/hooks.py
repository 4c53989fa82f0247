"""What a caller is told in the course of an uptraining."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """The loss is NaN or infinite; what was saved before is whole."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is ahead, known before the first step."""

    what: str  # student or control
    tokens: int
    steps: int
    tokens_per_step: int
    passes: float  # over the text
    seconds: float | None  # from one step that was timed; None where models are sharded


def _nothing(done: int, total: int, what: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Called in every process: the steps done, a line for each evaluation, what is ahead."""

    progress: Callable[[int, int, str], None] = _nothing
    say: Callable[[str], None] = logger.info
    announce: Callable[[Estimate], None] = logger.info
