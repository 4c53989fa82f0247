"""An interrupted conversion continues where it was and gives the same bytes; runs do not mix."""

from __future__ import annotations

import errno
import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_checkpoints import contents, edit_config, tiny_checkpoint
from typer.testing import CliRunner

import hf_attn_converters
from hf_attn_converters.calibration import Calibration
from hf_attn_converters.io.checkpoint import open_checkpoint
from hf_attn_converters.io.journal import JOURNAL, read_journal
from hf_attn_patch.cli import app

convert = functools.partial(hf_attn_converters.convert, method="mean")  # needs no data

# Sends itself a signal when so many tensors are written.
SIGNALLED = """
    import os, signal, sys
    from hf_attn_converters import convert
    count = 0
    def progress(done, total, name):
        global count
        count += 1
        if count == int(sys.argv[3]):
            os.kill(os.getpid(), getattr(signal, sys.argv[4]))
    convert(sys.argv[1], sys.argv[2], num_key_value_heads=1, method="mean", progress=progress)
"""


def start(source: Path, target: Path, tensors: int, name: str) -> subprocess.Popen[str]:
    code, place = textwrap.dedent(SIGNALLED), [str(source), str(target)]
    return subprocess.Popen(
        [sys.executable, "-c", code, *place, str(tensors), name],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def kill_after(source: Path, target: Path, tensors: int) -> None:
    process = start(source, target, tensors, "SIGKILL")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors


def sharded(folder: Path) -> Path:
    return tiny_checkpoint(folder, kv_heads=4, layers=4, shard_size="20KB")


def stop_in_second_file(source: Path, target: Path, error: BaseException) -> None:
    """Convert until the second file is begun, then raise."""
    first = len(open_checkpoint(source).shards[0].tensors)
    seen = 0

    def progress(done: int, total: int, name: str) -> None:
        nonlocal seen
        seen += 1
        if seen == first + 1:
            raise error

    with pytest.raises(type(error)):
        convert(source, target, num_key_value_heads=1, progress=progress)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded(tmp_path_factory.mktemp("source") / "a")


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("undisturbed") / "b"
    convert(source, target, num_key_value_heads=1)
    return contents(target)


@pytest.mark.parametrize("tensors", [4, 17, 37], ids=lambda n: f"after-{n}-tensors")
def test_kill_and_resume_give_the_same_bytes(
    tensors: int, source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    before = contents(source)
    kill_after(source, tmp_path / "b", tensors)
    assert not (tmp_path / "b").exists()
    finished = read_journal(tmp_path / "b.partial" / JOURNAL)[1]
    stamps = {name: (tmp_path / "b.partial" / name).stat().st_mtime_ns for name in finished}
    result = CliRunner().invoke(
        app,
        ["convert", str(source), str(tmp_path / "b"), "-n", "1", "--method", "mean", "--resume"],
    )
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "b") == undisturbed
    assert {name: (tmp_path / "b" / name).stat().st_mtime_ns for name in finished} == stamps
    assert not (tmp_path / "b.partial").exists()
    assert contents(source) == before
    if tensors == 37:
        assert finished, "the last kill is to come after a finished file"


def test_several_kills(source: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """A kill in the middle of a resumed run is resumed as well."""
    kill_after(source, tmp_path / "b", 17)
    first = len(read_journal(tmp_path / "b.partial" / JOURNAL)[1])
    code = SIGNALLED.replace("progress=progress", "progress=progress, resume=True")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), source, tmp_path / "b", "12", "SIGKILL"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert len(read_journal(tmp_path / "b.partial" / JOURNAL)[1]) > first
    convert(source, tmp_path / "b", num_key_value_heads=1, resume=True)
    assert contents(tmp_path / "b") == undisturbed


def test_ctrl_c_keeps_finished_work_and_says_so(
    source: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stop_in_second_file(source, tmp_path / "b", KeyboardInterrupt())
    assert "--resume continues" in caplog.text
    assert not (tmp_path / "b").exists()
    convert(source, tmp_path / "b", num_key_value_heads=1, resume=True)
    assert contents(tmp_path / "b") == undisturbed


def test_without_resume_it_is_replaced_and_told(
    source: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stop_in_second_file(source, tmp_path / "b", KeyboardInterrupt())
    (tmp_path / "b.partial" / "stray.txt").write_text("of another time")
    convert(source, tmp_path / "b", num_key_value_heads=1)
    assert "is replaced (no --resume)" in caplog.text
    assert contents(tmp_path / "b") == undisturbed


def test_resume_with_nothing_there_begins(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    convert(source, tmp_path / "b", num_key_value_heads=1, resume=True)
    assert contents(tmp_path / "b") == undisturbed


@pytest.mark.parametrize("cut", [0, 100], ids=["flipped-byte", "shorter"])
def test_a_damaged_file_is_written_again(
    cut: int,
    source: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stop_in_second_file(source, tmp_path / "b", KeyboardInterrupt())
    name = next(iter(read_journal(tmp_path / "b.partial" / JOURNAL)[1]))
    data = bytearray((tmp_path / "b.partial" / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / "b.partial" / name).write_bytes(data[: len(data) - cut])
    convert(source, tmp_path / "b", num_key_value_heads=1, resume=True)
    assert f"{name} is damaged" in caplog.text
    assert contents(tmp_path / "b") == undisturbed


def test_other_options_cannot_resume(source: Path, tmp_path: Path) -> None:
    stop_in_second_file(source, tmp_path / "b", KeyboardInterrupt())
    before = contents(tmp_path / "b.partial")
    with pytest.raises(ValueError, match="kv_heads: 1 then, 2 now"):
        convert(source, tmp_path / "b", num_key_value_heads=2, resume=True)
    assert contents(tmp_path / "b.partial") == before


def test_another_source_cannot_resume(tmp_path: Path) -> None:
    source = sharded(tmp_path / "a")
    stop_in_second_file(source, tmp_path / "b", KeyboardInterrupt())
    file = open_checkpoint(source).shards[-1].path
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"cannot be resumed.*weights"):
        convert(source, tmp_path / "b", num_key_value_heads=1, resume=True)
    edit_config(source, rope_theta=1.0)
    with pytest.raises(ValueError, match=r"cannot be resumed.*config"):
        convert(source, tmp_path / "b", num_key_value_heads=1, resume=True)


def test_a_source_that_changes_underway(tmp_path: Path) -> None:
    """Before its turn, or after: no mixture gets the final name."""
    source = sharded(tmp_path / "a")
    shards = open_checkpoint(source).shards
    for file in (shards[0].path, shards[-1].path):

        def touch(done: int, total: int, name: str, file: Path = file) -> None:
            if done > total / 2:
                os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))

        with pytest.raises(OSError, match=f"{file.name} was changed while"):
            convert(source, tmp_path / "b", num_key_value_heads=1, progress=touch)
        assert not (tmp_path / "b").exists()


def test_two_runs_to_one_target(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """The second refuses, and the first, stopped meanwhile, ends as if alone."""
    process = start(source, tmp_path / "b", 17, "SIGSTOP")
    try:
        _wait_until_stopped(process.pid)
        for resume in (False, True):
            with pytest.raises(ValueError, match="another run is writing"):
                convert(source, tmp_path / "b", num_key_value_heads=1, resume=resume)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert contents(tmp_path / "b") == undisturbed


def _wait_until_stopped(pid: int) -> None:
    for _ in range(600):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "T":
            return
        time.sleep(0.05)
    pytest.fail("the first run did not get that far")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up(
    small_disk: Path, source: Path, undisturbed: dict[str, bytes]
) -> None:
    """There was room when asked; then somebody else takes it."""
    before, target, filler = contents(source), small_disk / "b", small_disk / "filler"

    def fill(done: int, total: int, name: str) -> None:
        if done > total / 2 and not filler.exists():
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError as error:
                    assert error.errno == errno.ENOSPC

    with pytest.raises(OSError) as caught:
        convert(source, target, num_key_value_heads=1, progress=fill)
    assert caught.value.errno == errno.ENOSPC
    assert not target.exists()
    assert contents(source) == before
    filler.unlink()
    convert(source, target, num_key_value_heads=1, resume=True)
    assert contents(target) == undisturbed


def test_a_target_that_cannot_be_written(small_disk: Path, source: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    result = CliRunner().invoke(
        app, ["convert", str(source), str(small_disk / "b"), "-n", "1", "--method", "mean"]
    )
    assert result.exit_code == 1
    assert "Read-only file system" in result.stderr
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("method", ["csvd", "csvd+fit"])
def test_an_interrupted_calibration(method: str, tmp_path: Path) -> None:
    """Layers that are computed stay, and the result is the same as if nothing had happened."""
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4, layers=3, tokenizer=True)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {i}th line of a text that says little.\n" for i in range(200)))
    options = {
        "num_key_value_heads": 1,
        "method": method,
        "calibration": Calibration(text=text, tokens=512, sequence_length=64),
    }
    convert(source, tmp_path / "undisturbed" / "b", **options)
    layers = tmp_path / "b.partial" / "layers"

    def stop(done: int, total: int, what: str) -> None:
        if (layers / "0.safetensors").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "b", layer_progress=stop, **options)
    assert (layers / "0.safetensors").exists()
    assert not (layers / "2.safetensors").exists()
    text_before = text.read_text()
    text.write_text(text_before + "More.")
    with pytest.raises(ValueError, match="calibration"):
        convert(source, tmp_path / "b", resume=True, **options)
    text.write_text(text_before)
    convert(source, tmp_path / "b", resume=True, **options)
    assert contents(tmp_path / "b") == contents(tmp_path / "undisturbed" / "b")
    card = (tmp_path / "b" / "README.md").read_text()
    assert f"{method}: heads are merged" in card
    assert "| calibration |" in card
