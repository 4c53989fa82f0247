"""The one place where what a checkpoint's own files raise becomes a sentence about them.

transformers and its helpers raise whatever fits them: a strict dataclass's error, KeyError,
TypeError, jinja2's and safetensors' own. None of these says which folder is at fault.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# Counts of what a model is built from, one after the other: far above any model, and far below
# what would take minutes or all memory. The first that fits a key holds.
COUNTS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"n_positions|n_ctx|n_special|num_labels"), 1 << 31),
    (re.compile(r".*layers?|.*depths?|num_blocks|n_stages|num_stages"), 2_000),
    (re.compile(r".*(experts?|heads?|groups?)"), 100_000),
    (re.compile(r"(num|n)_.*"), 1_000_000),
)
MOST_FACTS = 1_000_000  # values in a config.json


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Within it, what the files of a checkpoint cause is a ValueError "cannot read SOURCE: ...".

    ValueError, OSError and ImportError pass: they carry their own words. So does running out of
    memory, which is no fault of the files.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"cannot read {source}: {reason(error)}") from error


def load_config(source: str | Path, *, trust_remote_code: bool = False) -> Any:
    """A checkpoint's config as transformers reads it.

    Raises ValueError for one that cannot be found or read, or whose counts no model has.
    """
    from transformers import AutoConfig

    check_config_file(source)
    with reading(source):
        try:
            return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        except OSError as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"cannot read {source}: {first}") from error


def check_config_file(source: str | Path) -> None:
    """`check_counts` of a folder's config.json, or of the file itself; other sources pass."""
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file() or path.suffix != ".json":
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {source}: config.json, {folded(error)}") from None
    check_counts(config, source)


def check_counts(config: Any, source: str | Path) -> None:
    """Raises ValueError for a count at any depth that would keep a machine busy without end."""
    waiting, seen = [config], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > MOST_FACTS:
            raise ValueError(f"cannot read {source}: config.json holds over {MOST_FACTS:,} values")
        if isinstance(value, list):
            waiting += value
        if not isinstance(value, dict):
            continue
        waiting += value.values()
        for key, count in value.items():
            most = next((most for name, most in COUNTS if name.fullmatch(key)), None)
            given = count if isinstance(count, list) else [count]
            if most is not None and any(_is_number(n) and n > most for n in given):
                raise ValueError(
                    f"cannot read {source}: {key}, {count} is more than any model has "
                    f"(at most {most:,})"
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def reason(error: BaseException) -> str:
    """ "field, reason" of an error, as well as it can be told."""
    words = folded(error.__cause__ if _is_strict(error) and error.__cause__ else error)
    if isinstance(error, KeyError):
        return f"{error.args[0] if error.args else '?'}, no such key"
    if isinstance(error, AttributeError) and error.name:
        return f"{error.name}, {words}"
    if line := getattr(error, "lineno", None):  # jinja2
        return f"chat template, line {line}, {words}"
    if _is_strict(error):
        field = re.search(r"[Ff]ield '([^']+)'|`([^`]+)`", str(error))
        name = "config.json" if field is None else field[1] or field[2]
        return f"{name}, {words.removeprefix(f'Field {name!r} ')}"
    return f"{type(error).__name__}, {words}" if words else type(error).__name__


def _is_strict(error: BaseException) -> bool:
    """Whether a config's own check of its fields or of all together raised it."""
    return any(kind.__name__ == "StrictDataclassError" for kind in type(error).__mro__)


def folded(error: BaseException) -> str:
    """An error's words in one line."""
    return " ".join(str(error).split())[:500]
