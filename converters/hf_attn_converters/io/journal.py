"""The journal of an unfinished output: what is written already, and for which conversion.

JSON lines in `DST.partial/`. The first says what is being made and from what; each further one
names a finished file with its size and sha256, and is written after that file is on the disk.
A resumed conversion continues from it only when the first line says exactly the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

JOURNAL = ".hf-attn-journal"
_READ = 8 << 20


@dataclass(frozen=True)
class Finished:
    """A file of the output that is complete and on the disk."""

    name: str
    size: int
    sha256: str


_TYPES = {"name": str, "size": int, "sha256": str}


class Journal:
    """Appends finished files; each line is on the disk before `add` returns."""

    def __init__(self, path: Path, head: Mapping[str, Any], finished: dict[str, Finished]) -> None:
        self.path = path
        self.finished = finished
        lines = [json.dumps(head), *(json.dumps(asdict(f)) for f in finished.values())]
        # Written anew, then put in the old one's place: a line that a kill tore must not stay.
        fresh = path.with_name(path.name + ".new")
        _write_synced(fresh, "w", lines)
        os.replace(fresh, path)

    def add(self, file: Finished) -> None:
        _write_synced(self.path, "a", [json.dumps(asdict(file))])
        self.finished[file.name] = file


def read_journal(path: Path) -> tuple[dict[str, Any], dict[str, Finished]]:
    """The first line and the finished files by name; both empty when there is no journal.

    Reading stops at the first line that is torn or damaged: what follows counts as unfinished.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
    except FileNotFoundError:
        return {}, {}
    head = _object(lines[0]) if lines else None
    if head is None:
        return {}, {}
    finished: dict[str, Finished] = {}
    for line in lines[1:]:
        entry = _object(line)
        if entry is None or {k: type(v) for k, v in entry.items()} != _TYPES:
            break
        file = Finished(**entry)
        finished[file.name] = file
    return head, finished


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], show: Callable[[Any], str] = repr
) -> list[str]:
    """What two first lines disagree on, one phrase per key."""
    return [
        f"{key}: {show(old.get(key))} then, {show(new.get(key))} now"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def is_intact(folder: Path, file: Finished) -> bool:
    """Whether a finished file still has the size and the bytes that the journal says."""
    path = folder / file.name
    try:
        return path.stat().st_size == file.size and sha256_of(path) == file.sha256
    except FileNotFoundError:
        return False


def sha256_of(path: Path) -> str:
    """A file's sha256, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(_READ)
        while got := file.readinto(buffer):
            digest.update(memoryview(buffer)[:got])
    return digest.hexdigest()


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _write_synced(path: Path, mode: str, lines: list[str]) -> None:
    with path.open(mode, encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
