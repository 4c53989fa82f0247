"""Atomic output: everything goes to `DST.partial/`, which takes its final name last of all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Marks a folder as one that this program began, and so may remove.
MARKER = ".hf-attn-partial"


def check_destination(source: Path, target: Path) -> None:
    """Raises ValueError when `target` is in use, is inside the source, or contains it."""
    src, dst = source.resolve(), target.resolve()
    if dst == src or src in dst.parents:
        raise ValueError(f"{target} lies inside the source {source}; choose a folder outside")
    if dst in src.parents:
        raise ValueError(f"{target} contains the source {source}; choose another folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder; remove it or choose another")
    partial = _partial(target)
    if partial.exists() and not (partial / MARKER).exists():
        raise ValueError(f"{partial} is needed for the work and is not ours; move it away")


def free_bytes(target: Path) -> int:
    """Free space on the disk that `target` will lie on."""
    place = target.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Gives `DST.partial/`; renames it to DST when the block ends well, removes it otherwise.

    A kill leaves `DST.partial/` behind; the next run replaces it. Nothing under DST's own name
    is ever incomplete.
    """
    partial = _partial(target)
    if partial.exists():
        assert (partial / MARKER).exists(), "check_destination comes first"
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    (partial / MARKER).touch()
    try:
        yield partial
        (partial / MARKER).unlink()
        _sync_folder(partial)
        if target.exists():
            target.rmdir()  # empty, or this raises and nothing is lost
        partial.rename(target)
        _sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
