"""What a folder says about how it was made: `conversion.json` and `uptrain.json`, if there."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RecoveryPoint:
    tokens: int  # of uptraining so far
    kl: float | None
    perplexity: float | None


@dataclass(frozen=True, kw_only=True)
class Record:
    """Empty where the folder has no record, or one of another form."""

    label: str
    method: str | None = None
    kv_heads: tuple[int, int] | None = None  # before, after
    layer_errors: tuple[float, ...] = ()  # of the fit, relative to what each layer adds
    recovery: tuple[RecoveryPoint, ...] = ()
    recovered_percent: float | None = None  # of what the conversion lost, against a control run


def read_record(label: str, folder: str) -> Record:
    """The record of a checkpoint's folder. Nothing here fails: a record is no model's duty."""
    made = _json(Path(folder) / "conversion.json")
    trained = _json(Path(folder) / "uptrain.json")
    calibration = made.get("calibration")
    errors = calibration.get("errors") if isinstance(calibration, dict) else None
    heads = (made.get("kv_heads_before"), made.get("kv_heads_after"))
    method = made.get("method")
    steps = trained.get("steps")
    return Record(
        label=label,
        method=method if isinstance(method, str) else None,
        kv_heads=heads if isinstance(heads[0], int) and isinstance(heads[1], int) else None,  # type: ignore[arg-type]
        layer_errors=_numbers(errors),
        recovery=tuple(_points(steps if isinstance(steps, list) else [])),
        recovered_percent=_number(trained.get("recovered_percent")),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _numbers(values: object) -> tuple[float, ...]:
    found = [_number(v) for v in values] if isinstance(values, list) else []
    return tuple(v for v in found if v is not None) if None not in found else ()


def _points(steps: list[Any]) -> list[RecoveryPoint]:
    return [
        RecoveryPoint(
            tokens=step["tokens"], kl=_number(step.get("kl")), perplexity=_number(step.get("ppl"))
        )
        for step in steps
        if isinstance(step, dict) and isinstance(step.get("tokens"), int)
    ]


def _number(value: object) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable and math.isfinite(value) else None  # type: ignore[arg-type]
