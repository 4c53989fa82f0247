"""Damaged configs: every command that plans from one says what is wrong, without a traceback.

HF_ATTN_FUZZ_CONFIGS sets how many; CI runs the default.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import tiny_checkpoint, tiny_config
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from hf_attn_converters.io.reading import check_counts, load_config, reading
from hf_attn_patch.cli import app

CASES = int(os.environ.get("HF_ATTN_FUZZ_CONFIGS", "150"))
CHUNK = 15  # configs of a test
SECONDS = 60  # for one command
FAMILIES = ("llama", "qwen2", "gemma2", "gemma3", "mixtral", "falcon", "gpt2", "phi3", "bert")
BAD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 7, 2**31, 2**63, 10**30, 1e300, -0.5, float("nan")),
    *("", "x", "full_attention", "\u0000", [], [None], ["x"] * 3, [1, 2], {}, {"x": 1}, {"a": []}),
)
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64,
}  # fmt: skip
OTHERS = ("gemma4_text", "cohere2", "olmo3", "deepseek_v3", "glm4", "gpt_neox", "lfm2", "qwen3_moe")


def spots(config: Any, depth: int = 0) -> Iterator[tuple[dict[str, Any], str]]:
    """Every key of a config and of what lies in it."""
    for key, value in config.items():
        yield config, key
        if isinstance(value, dict) and depth < 3:
            yield from spots(value, depth + 1)


def damaged(config: dict[str, Any], draw: random.Random) -> tuple[dict[str, Any], list[str]]:
    """A copy with one to three values changed, and what was done to it."""
    config, done = copy.deepcopy(config), []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(spots(config))
        if not places:
            break
        inside, key = draw.choice(places)
        if draw.random() < 0.15:
            del inside[key]
            done.append(f"del {key}")
        else:
            inside[key] = draw.choice(BAD)
            done.append(f"{key} = {inside[key]!r}")
    return config, done


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    def late(*args: Any) -> None:
        raise AssertionError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and stderr; whatever is no orderly end fails."""
    with alarm(SECONDS):
        result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return {name: tiny_checkpoint(folder / name, family=name) for name in FAMILIES}


@pytest.fixture(scope="module")
def configs(checkpoints: dict[str, Path]) -> list[dict[str, Any]]:
    read = [json.loads((p / "config.json").read_text()) for p in checkpoints.values()]
    others = [CONFIG_MAPPING[name](**SMALL).to_dict() for name in OTHERS]
    return [*read, *others]


@pytest.mark.parametrize("seed", range(-(-CASES // CHUNK)))
def test_damaged_configs(
    seed: int, checkpoints: dict[str, Path], configs: list[dict[str, Any]], tmp_path: Path
) -> None:
    draw = random.Random(seed)
    for number in range(CHUNK):
        command = ("check", "estimate", "convert")[number % 3]
        folder = tmp_path / str(number)
        folder.mkdir()
        if command == "convert":
            whole = draw.choice(list(checkpoints.values()))
            (folder / "model.safetensors").symlink_to(whole / "model.safetensors")
            config = json.loads((whole / "config.json").read_text())
            more: tuple[object, ...] = (tmp_path / "out", "-n", 1, "--method", "mean", "--dry-run")
        else:
            config, more = draw.choice(configs), ()
        config, done = damaged(config, draw)
        (folder / "config.json").write_text(json.dumps(config))
        try:
            code, err = run(command, folder, *more)
        except BaseException as error:
            raise AssertionError(f"{command} {config.get('model_type')}: {done}") from error
        assert code in (0, 1, 2), (command, done, code)
        if code == 2:
            assert err.startswith(("error: ", "Usage: ")) and len(err) > 10, (command, done, err)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "wide"}, ["hidden_size", "expected int, got str"]),
        ({"layer_types": ["a", "b"]}, ["layer_types", "must be in"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "at most 2,000"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "no positive number"]),
        ({"hidden_act": "xx"}, ["xx"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["factor"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_it_is_said_which_field(
    changes: dict[str, Any], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("qwen2").to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, err = run("estimate", tmp_path)
    assert code == 2, err
    assert err.startswith("error: ") and str(tmp_path) in err and err.count("\n") == 1, err
    for word in words:
        assert word in err, err
    monkeypatch.setenv("HF_ATTN_DEBUG", "1")
    with pytest.raises(ValueError, match="cannot read"):  # the traceback is kept
        run("estimate", tmp_path)


def test_what_is_not_the_checkpoints_fault_passes() -> None:
    for error in (MemoryError(), OSError("disk"), ImportError("timm"), ValueError("own words")):
        with pytest.raises(type(error)) as caught, reading("x"):
            raise error
        assert caught.value is error
    with pytest.raises(ValueError, match=r"cannot read x: full, no such key"), reading("x"):
        raise KeyError("full")
    with pytest.raises(ValueError, match=r"cannot read x: depth, .*no attribute"), reading("x"):
        _ = Path().depth  # type: ignore[attr-defined]


def test_counts_of_real_models_pass() -> None:
    for model_type in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception:  # needs another package, or a value that has no default
            continue
        check_counts(json.loads(config.to_json_string(use_diff=False)), model_type)


def test_a_broken_chat_template(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "a", tokenizer=True)
    (folder / "chat_template.jinja").write_text("{% for x in %}")
    code, err = run("generate", folder, "--prompt", "Hello", "--attn", "eager")
    assert code == 2 and f"cannot read {folder}: chat template, line 1" in err


def test_broken_weights_and_tokenizer(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "a", tokenizer=True)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    code, err = run("generate", folder, "--prompt", "Hello", "--attn", "eager")
    assert code == 2 and f"cannot read {folder}: " in err
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    code, err = run("generate", folder, "--prompt", "Hello", "--attn", "eager")
    assert code == 2 and f"cannot read {folder}: SafetensorError" in err


@pytest.mark.parametrize("command", ["compare", "uptrain"])
def test_commands_that_load_two(command: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "a", tokenizer=True)
    broken = tiny_checkpoint(tmp_path / "b", tokenizer=True)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    text = tmp_path / "t.txt"
    text.write_text("word " * 2000)
    arguments: dict[str, tuple[object, ...]] = {
        "compare": (folder, broken, "--text", text),
        "uptrain": (broken, "--output", tmp_path / "out", "--teacher", folder, "--text", text),
    }
    code, err = run(command, *arguments[command])
    assert code == 2 and f"cannot read {broken}: hidden_size, expected int" in err, err


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        load_config(tmp_path / "none")
