"""Short prompts beside sdpa: rows, their ratios, and the commands of `hf-attn bench`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import tiny_checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

from hf_attn_patch.bench import short
from hf_attn_patch.cli import app
from hf_attn_patch.registration import functions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("short") / "model", kv_heads=2)


def bench(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_rows(checkpoint: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "rows.csv", torch.get_num_threads()
    found = short.run(checkpoint, prompts=[5, 9], new_tokens=4, rounds=2, out=out)
    assert [(row["impl"], row["prompt_tokens"]) for row in found] == [
        (impl, length) for length in (5, 9) for impl in short.IMPLEMENTATIONS
    ]
    assert all(row["same_tokens"] == 1 and 0 < row["p20_ms"] <= row["p80_ms"] for row in found)
    assert all(row["of_sdpa_time"] == 1 for row in found if row["impl"] == short.BASE)
    with out.open() as file:
        reader = csv.DictReader(file)
        assert len([*reader]) == 6 and reader.fieldnames == short.COLUMNS
    assert torch.get_num_threads() == before


def test_the_ratio_is_of_the_same_round(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down from round to round does not look like a slow implementation."""
    warm_up = (7, 7)
    clock = iter([tick for ms in (*warm_up, 1, 2, 20, 10, 100, 200) for tick in (0.0, ms / 1e3)])
    monkeypatch.setattr(short.time, "perf_counter", lambda: next(clock))
    found = short.run(checkpoint, prompts=[3], new_tokens=1, rounds=3, impls=["triton_fa2"])
    assert [row["of_sdpa_time"] for row in found] == [1, 2]


def test_other_tokens_are_seen(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = functions.fa2_forward

    def broken(*arguments: Any, **given: Any) -> Any:
        out, weights = right(*arguments, **given)
        return out.roll(1, dims=-1), weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "triton_fa2", broken)
    found = short.run(checkpoint, prompts=[5], new_tokens=8, rounds=1, impls=["triton_fa2"])
    assert [row["same_tokens"] for row in found] == [1, 0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("short", "folder", "--dtype", "int8"), "float32, bfloat16"),
        (("short", "folder", "--prompts", 0), "1 or more"),
        (("growth", "--curves", "sideways"), "possible: prefill"),
        (("generate",), "--shape"),
        (("generate", "--shape", "huge"), "possible: llama3-8b"),
        (("generate", "--shape", "tiny", "--longest", 1), "at least the shortest"),
        (("convert", "--gigabytes", 0), "1 shard"),
        (("convert", "--gigabytes", 10**9), "bytes of disk"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_misuse_of_a_command(arguments: tuple[object, ...], says: str) -> None:
    done = bench(*arguments)
    assert done.exit_code == 2 and says in done.stderr, done.output


def test_short_command(checkpoint: Path) -> None:
    options = ("--prompts", 5, "--new-tokens", 3, "--rounds", 1)
    done = bench("short", checkpoint, *options, "--json")
    assert done.exit_code == 0, done.output
    assert [row["impl"] for row in json.loads(done.stdout)] == [*short.IMPLEMENTATIONS]
    done = bench("short", checkpoint, *options)
    assert done.exit_code == 0 and "of_sdpa_time" in done.stdout
    assert "prompt_tokens 5; new_tokens 3" in done.stdout  # what all rows share, above them


def test_growth_command(tmp_path: Path) -> None:
    out = tmp_path / "growth.csv"
    done = bench(
        "growth", "--curves", "decode", "--longest", 1024, "--rounds", 1, "--out", out, "--json"
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)[0]["lengths"] == [1024] and out.exists()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("generate", {"shape": "tiny", "impls": ["sdpa"], "requests": 3, "page_size": 16}),
        ("convert", {"gigabytes": 0.5, "shards": 2, "rounds": 1}),
    ],
    ids=["generate", "convert"],
)
def test_options_arrive(
    command: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def run(*arguments: object, **given: Any) -> list[dict[str, Any]]:
        asked.update(given)
        return [{"impl": "one", "p50_ms": 2.5}, {"impl": "two", "p50_ms": 5.0}]

    monkeypatch.setattr(f"hf_attn_patch.bench.{command}.run", run)
    flat = [
        part
        for name, value in options.items()
        for one in (value if isinstance(value, list) else [value])
        for part in (f"--{name.replace('_', '-')}", one)
    ]
    done = bench(command, *flat)
    assert done.exit_code == 0, done.output
    assert "2.5" in done.stdout and "two" in done.stdout
    assert options.items() <= asked.items()


def test_convert_measures_itself_beside_cp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a source of one small layer."""
    from hf_attn_patch.bench import convert

    for name, value in {
        "HIDDEN": 64, "INTERMEDIATE": 128, "HEADS": 4, "HEAD_DIM": 16, "VOCAB": 300,
        "KV_BEFORE": 4, "KV_AFTER": 2,
    }.items():  # fmt: skip
        monkeypatch.setattr(convert, name, value)
    monkeypatch.setattr(convert, "CONVERT", convert.CONVERT.replace("heads=8", "heads=2"))
    out = tmp_path / "rows.csv"
    rows = convert.run(gigabytes=1e-3, shards=2, rounds=1, folder=tmp_path, out=out)
    assert [row["impl"] for row in rows] == ["hf_attn_converters", "cp"]
    assert rows[1]["of_cp"] == 1 and rows[0]["peak_anon_bytes"] > 0
    assert 0 < rows[0]["written_bytes"] < rows[0]["source_bytes"] == rows[1]["written_bytes"]
    assert len(out.read_text().splitlines()) == 3 and not [*tmp_path.glob("tmp*")]
