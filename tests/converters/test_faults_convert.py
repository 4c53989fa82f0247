"""Every call that a conversion makes of the system fails once, and is the last before a kill once.

Nothing half-written has the final name, the source keeps its bytes, and the next run ends with the
bytes of one that nothing disturbed. (Kills between tensors, damaged and foreign leftovers and a
mounted disk that fills up: test_convert_resume.py.)
"""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from forked import NOBODY, Ended, forked, started
from tiny_checkpoints import contents, tiny_checkpoint

import hf_attn_converters
from hf_attn_converters.io import atomic_output
from hf_attn_converters.io.atomic_output import MARKER, Partial
from hf_attn_converters.io.journal import JOURNAL, Journal

convert = partial(hf_attn_converters.convert, num_key_value_heads=1, method="mean")  # needs no data


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "a"
    return tiny_checkpoint(folder, kv_heads=4, layers=2, shard_size="20KB")


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("undisturbed") / "b"
    convert(source, target)
    return contents(target)


# --- calls of the system --------------------------------------------------------------------------


@dataclass
class Counted:
    """Calls through the doors so far, and what happens at one of them."""

    fault: Callable[[], None]
    at: int  # -1: never
    calls: int = 0

    def call(self) -> None:
        self.calls += 1
        if self.calls - 1 == self.at:
            self.fault()


@dataclass(frozen=True)
class Door:
    """A function of the system, by the name that Python code calls it by."""

    id: str
    owner: Any
    name: str
    code: int  # errno of the failure
    partly: bool = False  # a write: some of the bytes arrive

    @contextmanager
    def watched(self, counted: Counted) -> Iterator[None]:
        real = getattr(self.owner, self.name)

        def watching(*args: Any, **kwargs: Any) -> Any:
            try:
                counted.call()
            except OSError:
                if self.partly:
                    real(args[0], args[1][: len(args[1]) // 2])
                raise
            return real(*args, **kwargs)

        setattr(self.owner, self.name, watching)
        try:
            yield
        finally:
            setattr(self.owner, self.name, real)


class Reading(io.FileIO):
    """An unbuffered file whose reads are counted: shards are read through these."""

    counted: Counted | None = None

    def readinto(self, buffer: Any) -> int | None:
        if Reading.counted is not None:
            Reading.counted.call()
        return super().readinto(buffer)


class Reads(Door):
    """Reads of weights: the files are opened by Path.open, whose result cannot be patched."""

    @contextmanager
    def watched(self, counted: Counted) -> Iterator[None]:
        real = Path.open

        def opening(path: Path, mode: str = "r", buffering: int = -1, *rest: Any, **kw: Any) -> Any:
            if mode == "rb" and buffering == 0:
                return Reading(path, mode)
            return real(path, mode, buffering, *rest, **kw)

        Reading.counted, Path.open = counted, opening  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            Reading.counted, Path.open = None, real  # type: ignore[method-assign]


DOORS = [
    Door("fsync", os, "fsync", errno.EIO),
    Door("write", os, "write", errno.ENOSPC, partly=True),
    Door("replace", os, "replace", errno.EIO),
    Door("rename", Path, "rename", errno.EIO),
    Door("unlink", Path, "unlink", errno.EIO),
    Reads("read", None, "", errno.EIO),
]


def check(source: Path, target: Path, undisturbed: dict[str, bytes]) -> bool:
    """After a fault: complete under the final name or not there at all; the next run mends it.

    Returns whether it was complete already.
    """
    if target.exists():  # the fault came after the last rename: nothing but our two marks is left
        found = contents(target)
        assert {k: v for k, v in found.items() if k not in (MARKER, JOURNAL)} == undisturbed
        return True
    convert(source, target, resume=True)
    assert contents(target) == undisturbed
    assert sorted(path.name for path in target.parent.iterdir()) == [target.name]
    return False


def count(door: Door, source: Path, target: Path) -> int:
    counted = Counted(lambda: None, at=-1)
    with door.watched(counted):
        convert(source, target)
    return counted.calls


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.id)
def test_every_call_fails_once(
    door: Door, source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    before = contents(source)

    def fail() -> None:
        raise OSError(door.code, os.strerror(door.code))

    calls = count(door, source, tmp_path / "counted" / "b")
    assert calls > 0
    complete = 0
    for number in range(calls):
        target = tmp_path / str(number) / "b"
        with (
            door.watched(Counted(fail, at=number)),
            pytest.raises(OSError, match=os.strerror(door.code)),
        ):
            convert(source, target)
        complete += check(source, target, undisturbed)
        shutil.rmtree(target.parent)
    assert contents(source) == before
    assert complete <= 4, "only what follows the last rename may fail after it"
    print(f"{calls} calls of {door.id} failed")


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.id)
def test_killed_at_every_call(
    door: Door, source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL instead of the call: what the buffers held is lost as in a crash of the program."""
    before = contents(source)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    calls = count(door, source, tmp_path / "counted" / "b")
    for number in range(calls):
        target = tmp_path / str(number) / "b"

        def converting(number: int = number, target: Path = target) -> None:
            with door.watched(Counted(die, at=number)):
                convert(source, target)

        assert forked(converting).signal == signal.SIGKILL
        check(source, target, undisturbed)
        shutil.rmtree(target.parent)
    assert contents(source) == before
    print(f"killed at {calls} calls of {door.id}")


def test_negative_control_a_writer_that_is_not_atomic(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing under the final name is what the checks above must notice."""

    @contextmanager
    def in_place(target: Path, head: Any, *, resume: bool) -> Iterator[Partial]:
        target.mkdir(parents=True)
        yield Partial(target, Journal(target / JOURNAL, head, {}))

    # the package's name `convert` is the function
    monkeypatch.setattr(sys.modules["hf_attn_converters.convert"], "atomic_folder", in_place)

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    door = DOORS[0]
    calls = count(door, source, tmp_path / "counted" / "b")
    noticed = 0
    for number in range(calls):
        target = tmp_path / str(number) / "b"
        with door.watched(Counted(fail, at=number)), pytest.raises(OSError):
            convert(source, target)
        try:
            check(source, target, undisturbed)
        except AssertionError:
            noticed += 1
    assert noticed > calls // 2


# --- disks and rights, as the system itself refuses -----------------------------------------------


def test_a_disk_that_is_full(source: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """The system cuts a write short and refuses the next one, whoever asks."""
    before = contents(source)
    largest = max(map(len, undisturbed.values()))
    for room in (largest // 50, largest // 3, largest - 1):
        target = tmp_path / str(room) / "b"

        def converting(room: int = room, target: Path = target) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            convert(source, target)

        ended = forked(converting)
        assert ended.error == "OSError" and "File too large" in ended.said, ended
        assert not target.exists()
        check(source, target, undisturbed)
    assert contents(source) == before


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own belong to one."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def copied(source: Path, folder: Path) -> Path:
    """A copy that every user may read."""
    shutil.copytree(source, folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


def without_rights(source: Path, target: Path) -> Ended:
    return forked(lambda: convert(source, target), powerless=True)


def owned(*paths: Path) -> None:
    if os.geteuid() == 0:
        for path in paths:
            os.chown(path, NOBODY, NOBODY)


def test_a_target_that_may_not_be_written(
    source: Path, undisturbed: dict[str, bytes], open_to_all: Path
) -> None:
    copied(source, open_to_all / "a")
    place = open_to_all / "place"
    place.mkdir()
    owned(place)
    place.chmod(0o555)
    ended = without_rights(open_to_all / "a", place / "b")
    assert ended.error == "PermissionError" and str(place) in ended.said, ended
    assert list(place.iterdir()) == []
    place.chmod(0o755)  # the same, where it may: it was the right that was missing
    assert without_rights(open_to_all / "a", place / "b").error == ""
    assert contents(place / "b") == undisturbed


@pytest.mark.parametrize("which", ["shard", "config.json", "tokenizer"])
def test_a_source_that_may_not_be_read(
    which: str, source: Path, undisturbed: dict[str, bytes], open_to_all: Path
) -> None:
    copy, place = copied(source, open_to_all / "a"), open_to_all / "place"
    (copy / "tokenizer.json").write_text("{}")
    place.mkdir()
    owned(place)
    shards = sorted(copy.glob("*.safetensors"))
    secret = {"shard": shards[-1], "config.json": copy / "config.json"}.get(
        which, copy / "tokenizer.json"
    )
    owned(secret)
    before = contents(copy)
    secret.chmod(0)
    ended = without_rights(copy, place / "b")
    assert ended.error == "PermissionError" and secret.name in ended.said, ended
    assert list(place.iterdir()) == []
    secret.chmod(0o444)
    assert without_rights(copy, place / "b").error == ""
    assert contents(copy) == before


# --- several at once ------------------------------------------------------------------------------


def test_many_runs_to_one_target(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Started together, again and again: one result, whole, and whoever came second was told."""
    rounds, runners = 8, 4
    for number in range(rounds):
        target = tmp_path / str(number) / "b"
        gate, opener = os.pipe()

        def converting(resume: bool, gate: int = gate, target: Path = target) -> None:
            os.read(gate, 1)  # until all are there
            convert(source, target, resume=resume)

        ends = [started(partial(converting, bool(number % 2))) for number in range(runners)]
        os.write(opener, b"." * runners)
        errors = sorted(end().error for end in ends)
        os.close(gate)
        os.close(opener)
        # the OSError: somebody finished between the first look at the target and the last
        assert errors[0] == "" and set(errors[1:]) <= {"ValueError", "OSError"}, errors
        assert contents(target) == undisturbed


def test_a_target_that_is_finished_before_the_lock_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real = tmp_path / "b", atomic_output.locked

    @contextmanager
    def late(path: Path) -> Iterator[None]:
        with real(path):
            target.mkdir()
            (target / "config.json").write_text("theirs")
            yield

    monkeypatch.setattr(atomic_output, "locked", late)
    with (
        pytest.raises(ValueError, match="another run meanwhile"),
        atomic_output.atomic_folder(target, {}, resume=False),
    ):
        raise AssertionError("nothing may be written")
    assert (target / "config.json").read_text() == "theirs"
    assert not atomic_output.partial_folder(target).exists()
