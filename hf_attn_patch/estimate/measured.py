"""A measured run of `hf-attn compare --json` beside the estimate for the same batch and context."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .devices import Device
from .roofline import estimate
from .shape import Shape


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Tokens per second, estimated and measured."""

    label: str
    batch: int
    context: int
    prefill_estimated: float
    prefill_measured: float
    decode_estimated: float
    decode_measured: float


def beside(shape: Shape, device: Device, path: Path) -> list[Beside]:
    """One for each timing of this model in the run, whatever its attention implementation.

    Raises ValueError for a file that is no such run, or that has no timing of the model.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["sweep"]
        mine = [row for row in rows if _is(shape, row["label"]) and row["decode_tokens_s"]]
        found = [_row(shape, device, row) for row in mine]
    except FileNotFoundError:
        raise ValueError(f"--measured {path}: the file does not exist") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--measured {path} is no output of `hf-attn compare --json`: {error!r}"
        ) from None
    if not found:
        labels = ", ".join(sorted({row["label"] for row in rows})) or "none at all"
        raise ValueError(f"--measured {path} has no timing of {shape.name}; it has {labels}")
    return found


def _is(shape: Shape, label: str) -> bool:
    """Labels are a folder's name, then "@implementation" or " #2"."""
    rest = label.removeprefix(shape.name)
    return label.startswith(shape.name) and rest[:1] in ("", "@", " ")


def _row(shape: Shape, device: Device, row: dict[str, Any]) -> Beside:
    batch, context = row["batch"], row["context"]
    # the cache grows while it is timed: half of the new tokens lie before the middle one
    middle = estimate(shape, device, batch=batch, context=context + row["new_tokens"] // 2)
    start = estimate(shape, device, batch=batch, context=context)
    return Beside(
        label=row["label"],
        batch=batch,
        context=context,
        prefill_estimated=start.prefill.tokens_s,
        prefill_measured=row["prefill_tokens_s"],
        decode_estimated=middle.decode.tokens_s,
        decode_measured=row["decode_tokens_s"],
    )
