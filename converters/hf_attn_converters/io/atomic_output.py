"""Atomic output: everything goes to `DST.partial/`, which takes its final name last of all."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .journal import JOURNAL, Journal, differences, is_intact, read_journal

# Marks a folder as one that this program began, and so may remove; locked while a run writes.
MARKER = ".hf-attn-partial"
LAYERS = "layers"  # below DST.partial/: tensors computed ahead of time, one file per layer
SOURCE = "source"  # below DST.partial/: the source dequantized

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Partial:
    """The unfinished output that one run has locked."""

    folder: Path
    journal: Journal

    @property
    def layers(self) -> Path:
        return self.folder / LAYERS

    def worth_keeping(self) -> bool:
        """Whether a resumed run would save work."""
        computed = self.layers.is_dir() and any(self.layers.glob("*.safetensors"))
        return bool(self.journal.finished) or computed


def check_destination(source: Path, target: Path) -> None:
    """Raises ValueError when `target` is in use, is inside the source, or contains it."""
    src, dst = source.resolve(), target.resolve()
    if dst == src or src in dst.parents:
        raise ValueError(f"{target} lies inside the source {source}; choose a folder outside")
    if dst in src.parents:
        raise ValueError(f"{target} contains the source {source}; choose another folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder; remove it or choose another")
    partial = partial_folder(target)
    if partial.exists() and not (partial / MARKER).exists():
        raise ValueError(f"{partial} is needed for the work and is not ours; move it away")


def free_bytes(target: Path) -> int:
    """Free space on the disk that `target` will lie on."""
    place = target.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def partial_folder(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


@contextmanager
def atomic_folder(target: Path, head: Mapping[str, Any], *, resume: bool) -> Iterator[Partial]:
    """Gives `DST.partial/`, locked; renames it to DST when the block ends well.

    `head` says in JSON what is being made. With `resume`, the files that an interrupted run of
    the same `head` finished are checked and stay; all else is cleared away. After an error the
    folder stays if it holds finished work, unless the input was bad (ValueError), and is removed
    otherwise; a kill leaves it as it is.
    Nothing under DST's own name is ever incomplete.

    Raises ValueError when another run writes there, or when what there is to resume differs.
    """
    folder = partial_folder(target)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / MARKER):
        _still_free(target, folder)
        partial = Partial(folder, _begin(folder, head, resume=resume))
        try:
            yield partial
            _finish(partial, target)
        except BaseException as error:
            # Bad input stays bad: what was made of it can only be made anew.
            if not folder.exists():
                logger.warning("%s is complete; only this was not done: %s", target, error)
            elif partial.worth_keeping() and not isinstance(error, ValueError):
                logger.warning("%s keeps the finished work; --resume continues there", folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _still_free(target: Path, folder: Path) -> None:
    """Raises ValueError if another run finished between the first look at it and the lock."""
    if not (target.exists() and any(target.iterdir())):
        return
    if [path.name for path in folder.iterdir()] == [MARKER]:  # nothing of an interrupted run
        shutil.rmtree(folder)
    raise ValueError(
        f"{target} was written by another run meanwhile; choose another target, or remove it first"
    )


def _begin(folder: Path, head: Mapping[str, Any], *, resume: bool) -> Journal:
    """Take over what can be resumed, clear away the rest."""
    old, finished = read_journal(folder / JOURNAL)
    if resume and old and (changed := differences(old, head, _short)):
        raise ValueError(
            f"{folder} cannot be resumed, it was begun differently ({'; '.join(changed)}); "
            "leave out --resume to begin anew"
        )
    if not (resume and old):
        if old:
            logger.warning("%s: an unfinished conversion is replaced (no --resume)", folder)
        finished = {}
    for file in list(finished.values()):
        if not is_intact(folder, file):
            logger.warning("%s is damaged and is written again", folder / file.name)
            del finished[file.name]
    kept = {MARKER, JOURNAL, *finished} | ({LAYERS, SOURCE} if resume and old else set())
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return Journal(folder / JOURNAL, head, finished)


def _finish(partial: Partial, target: Path) -> None:
    folder = partial.folder
    for work in (partial.layers, folder / SOURCE):
        shutil.rmtree(work, ignore_errors=True)
    sync_folder(folder)
    if target.exists():
        target.rmdir()  # empty, or this raises and nothing is lost
    folder.rename(target)
    # Only now: without its locked marker, DST.partial/ would be anyone's to clear.
    (target / JOURNAL).unlink()
    (target / MARKER).unlink()
    sync_folder(target)
    sync_folder(target.parent)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file; the system gives it back even after a kill."""
    busy = ValueError(
        f"another run is writing to {path.parent}; wait until it ends, or choose another target"
    )
    try:
        file = path.open("a")
    except FileNotFoundError:  # since the folder was made, that run has renamed it
        raise busy from None
    with file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                current = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except (BlockingIOError, FileNotFoundError):
                current = False
            except OSError as error:
                # Some network file systems have no locks: convert there as without them.
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                current = True
            if not current:  # held by another run, or that run has just renamed the folder
                raise busy
        yield


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A new file, on the disk when this returns. Undecodable bytes come back as they were."""
    with path.open("x", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copy one file's bytes (a link's target, not the link), on the disk when this returns."""
    target.parent.mkdir(exist_ok=True)
    with source.open("rb") as old, target.open("xb") as new:
        shutil.copyfileobj(old, new, 1 << 20)
        new.flush()
        os.fsync(new.fileno())


def sync_folder(folder: Path) -> None:
    """Put the folder's list of files on the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
