"""scripts/bench_generate.py on a tiny shape: rows with tokens that are eager's, and misuse."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_generate.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    done = run(
        "--shape", "tiny", "--impls", "triton_paged_flash2", "eager", "--requests", 5, "--longest",
        48, "--new-tokens", 6, "--page-size", 16, "--rounds", 1, "--threads", 1, "--out", out,
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["impl"] for row in rows] == ["triton_paged_flash2", "eager"]
    assert all(row["same_tokens"] == 1 and row["tokens_s"] > 0 for row in rows)
    assert all(row["peak_rss_bytes"] > row["generate_bytes"] > 0 for row in rows)
    with out.open() as file:
        assert [row["impl"] for row in csv.DictReader(file)] == [row["impl"] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--shape"),
        (("folder", "--shape", "tiny"), "not both"),
        (("--shape", "tiny", "--requests", 0), "1 or more"),
    ],
)
def test_misuse(arguments: tuple[object, ...], says: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
