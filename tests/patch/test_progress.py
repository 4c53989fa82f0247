"""Lines in the place of a bar: one as a part begins, others while it lasts, none held back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from measure.cores import usable_cores
from tiny_checkpoints import tiny_checkpoint
from typer.testing import CliRunner

from hf_attn_patch.cli import app
from hf_attn_patch.progress import Lines

EVERY = 0.05


def wait_for(lines: list[str], count: int) -> None:
    end = time.monotonic() + 20
    while len(lines) < count and time.monotonic() < end:
        time.sleep(0.005)


class TestLines:
    def test_a_silent_part_is_still_heard_of(self) -> None:
        said: list[str] = []
        with Lines(said.append, every=EVERY) as lines:
            wait_for(said, 1)
            lines.update("loading", 1, 1200)
            begun = said.index("loading ...")
            lines.update("copying", 5_000_000, 12_000_000, in_bytes=True)
            wait_for(said, begun + 3)
        assert said[0].startswith("working: ") and said[0].endswith(" s so far")
        assert said[begun + 1] == "copying ..."
        assert said[begun + 2] == "copying: 5 of 12 MB, 0 s so far"

    def test_not_a_line_for_every_step(self) -> None:
        said: list[str] = []
        with Lines(said.append) as lines:
            for step in range(1000):
                lines.update("layers", step, 1000)
                lines.update("bytes", step, 1000)
        assert said == ["layers ...", "bytes ..."]

    def test_the_newest_amount(self) -> None:
        said: list[str] = []
        with Lines(said.append, every=EVERY) as lines:
            lines.update("layers", 0, 1000)
            lines.update("layers", 999, 1000)
            wait_for(said, 2)
        assert said[1] == "layers: 999 of 1,000, 0 s so far"

    def test_it_ends_with_its_block_also_in_an_error(self) -> None:
        said: list[str] = []
        with pytest.raises(KeyError), Lines(said.append, every=EVERY):
            raise KeyError
        count = len(said)
        time.sleep(3 * EVERY)
        assert len(said) == count


SLOW_WORK = """
import sys, time
from hf_attn_patch import progress
progress.EVERY = .1
progress.Lines.__init__.__defaults__ = (.1,)
from hf_attn_patch.cli.common import progress_bar
with progress_bar() as update:
    update("a part", 1, 3)
    sys.stdin.read(1)
"""


def test_a_pipe_gets_lines_while_the_work_goes_on() -> None:
    """Read before the process ends: nothing waits in a buffer."""
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_WORK],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "a part ...\n"
        assert process.stderr.readline().startswith("a part: 1 of 3, ")
        assert process.poll() is None
        process.communicate("x", timeout=60)
    assert process.returncode == 0


class TestCommands:
    """What runs for long says what it is at, where there is no terminal to draw on."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        (tmp_path / "text.txt").write_text("all the words that are fit to be measured, " * 200)
        return tiny_checkpoint(tmp_path / "source", kv_heads=2, tokenizer=True)

    @staticmethod
    def lines_of(*arguments: object) -> list[str]:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        return list(result.stderr.splitlines())

    def test_convert(self, source: Path, tmp_path: Path) -> None:
        lines = self.lines_of(
            "convert", source, tmp_path / "x", "-n", 1, "--method", "csvd",
            "--calibration-text", source.parent / "text.txt", "--calibration-tokens", 512,
        )  # fmt: skip
        assert lines == ["calibrating ...", "converting ..."]

    def test_compare(self, source: Path) -> None:
        lines = self.lines_of(
            "compare", source, source, "--text", source.parent / "text.txt", "--window", 32,
            "--max-tokens", 64, "--new-tokens", 2, "--context", 8, "--decode-tokens", 2,
            "--rounds", 1,
        )  # fmt: skip
        assert lines == ["loading ...", "quality ...", "generation ...", "speed ..."]

    def test_uptrain(self, source: Path, tmp_path: Path) -> None:
        lines = self.lines_of(
            "uptrain", source, "--teacher", source, "--text", source.parent / "text.txt",
            "--output", tmp_path / "y", "--tokens", 256, "--sequence-length", 32,
            "--batch-size", 2, "--evaluations", 1, "--device", "cpu",
        )  # fmt: skip
        assert lines[0].startswith("precision ") and "this processor" in lines[0]
        assert lines[1].startswith("student: 256 tokens in 4 steps of 64")
        assert "training student ..." in lines
        assert lines[-1].startswith("student, step 4: held-out kl ")

    def test_bench(self, source: Path) -> None:
        lines = self.lines_of(
            "bench", "short", source, "--prompts", 16, "--new-tokens", 2, "--rounds", 1
        )
        assert lines == ["source: 16 and 2 tokens"]


class TestCores:
    """Threads are as many as the process may run, whatever the load of the moment."""

    @pytest.fixture(autouse=True)
    def eight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
        monkeypatch.setattr(os, "getloadavg", lambda: (7.9, 7.9, 7.9), raising=False)

    def test_affinity(self, tmp_path: Path) -> None:
        assert usable_cores({}, tmp_path)[0] == 8

    @pytest.mark.parametrize("asked,found", [("3", 3), ("3,1", 3), ("0", 8), ("many", 8), ("", 8)])
    def test_what_was_asked_for_counts(self, asked: str, found: int, tmp_path: Path) -> None:
        assert usable_cores({"OMP_NUM_THREADS": asked}, tmp_path)[0] == found

    @pytest.mark.parametrize(
        "limit,found",
        [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)],
    )
    def test_the_share_of_a_container(self, limit: str, found: int, tmp_path: Path) -> None:
        (tmp_path / "cpu.max").write_text(limit + "\n")
        assert usable_cores({}, tmp_path)[0] == found

    @pytest.mark.parametrize("quota,found", [("-1", 8), ("250000", 3)])
    def test_version_1_of_control_groups(self, quota: str, found: int, tmp_path: Path) -> None:
        (tmp_path / "cpu").mkdir()
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
        assert usable_cores({}, tmp_path)[0] == found

    def test_where_there_is_no_affinity(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(os, "sched_getaffinity")
        monkeypatch.setattr(os, "process_cpu_count", lambda: 5, raising=False)
        assert usable_cores({}, tmp_path)[0] == 5
