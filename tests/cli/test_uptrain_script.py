"""scripts/uptrain.py: the same names, defaults and help as `hf-attn uptrain`, and option files."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import uptrain as script

from hf_attn_converters.uptrain import Estimate, UptrainOptions, UptrainResult
from hf_attn_patch.cli.uptrain import (
    OURS,
    announcement,
    evaluations_table,
    summary,
    uptrain_command,
)

FIELDS = {f.name: f for f in fields(UptrainOptions)}
TYPES = get_type_hints(UptrainOptions)
LEAST = ["--student", "s", "--output", "o", "--teacher", "t", "--text", "a.txt"]


def plain(kind: Any) -> Any:
    """The type that a word is read as: of ``str | Path | None`` a str, of ``list[str]`` a str."""
    inner = {plain(part) for part in get_args(kind) if part not in (type(None), ...)}
    if inner:
        [kind] = inner
    return str if kind is Path else kind


def declared() -> Mapping[str, tuple[Any, Any, str]]:
    """(type, default, help) of every field; attention is ours where a command is typed."""
    return {
        name: (
            plain(TYPES[name]),
            OURS if name == "attn_implementation" else f.default,
            f.metadata["help"],
        )
        for name, f in FIELDS.items()
    }


def of_the_command() -> Mapping[str, tuple[Any, Any, str]]:
    found = {}
    for name, parameter in inspect.signature(uptrain_command, eval_str=True).parameters.items():
        if name == "json":
            continue
        assert get_origin(parameter.annotation) is Annotated
        kind, option = get_args(parameter.annotation)
        default = MISSING if parameter.default is parameter.empty else parameter.default
        found[name] = plain(kind), default, option.help
    return found


def of_the_script() -> Mapping[str, tuple[Any, Any, str]]:
    found = {}
    for action in script.parser()._actions:
        if action.dest in ("help", "json"):
            continue
        kind = bool if action.const is True else plain(action.type)
        found[action.dest] = kind, MISSING if action.required else action.default, action.help or ""
    return found


@pytest.mark.parametrize("offered", [of_the_command, of_the_script], ids=["typer", "transformers"])
def test_both_offer_the_options_as_they_are_declared(offered: Any) -> None:
    assert dict(offered()) == dict(declared())
    assert all(line and "%" not in line for _, _, line in declared().values())


def test_control_a_drift_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FIELDS["clip"], "default", 2.0)
    assert of_the_command() != declared()


def test_what_is_not_given_is_the_default() -> None:
    options, as_json = script.parse(LEAST)
    expected = UptrainOptions(
        student="s", output="o", teacher="t", text=("a.txt",), attn_implementation=OURS
    )
    assert replace(options, student="s", output="o", teacher="t") == expected
    assert not as_json


RECIPE = {
    "student": "s", "output": "o", "teacher": "t", "text": ["a b.txt", "news:train"],
    "learning_rate": "1e-4", "tokens": 500, "control": True, "eval_text": None, "clip": 0.5,
}  # fmt: skip
YAML = """
student: s
output: o
teacher: t
text:
- a b.txt
- news:train
learning_rate: 1e-4  # which YAML takes for text
tokens: 500
control: true
eval_text:
clip: 0.5
"""


@pytest.mark.parametrize(
    ("name", "content"), [("r.json", json.dumps(RECIPE)), ("r.yaml", YAML), ("r.yml", YAML)]
)
def test_a_file_of_options(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    words = [str(tmp_path / name), "--tokens", "700", "--resume", "--text", "c.txt", "--json"]
    options, as_json = script.parse(words)
    assert as_json and options.resume and options.control
    assert (options.learning_rate, options.tokens, options.clip) == (1e-4, 700, 0.5)
    assert options.text == ("a b.txt", "news:train", "c.txt") and options.eval_text is None


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("{", "cannot be read"), ("[1]", "holds no options, but list")],
)
def test_files_that_hold_none(content: str | None, message: str, tmp_path: Path, capsys: Any):
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    assert script.main([str(tmp_path / "r.json")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--student", "s", "--output", "o"], "required: --text"),
        ([*LEAST, "--tokns", "3"], "unrecognized arguments: --tokns"),
        ([*LEAST, "--tokens", "many"], "invalid int value: 'many'"),
    ],
)
def test_words_that_are_no_options(words: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(words)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_values_out_of_range(capsys: Any) -> None:
    assert script.main([*LEAST, "--loss", "mse"]) == 2
    assert "possible: kl, ce, mix" in capsys.readouterr().err


# --- what both print ------------------------------------------------------------------------------


def test_what_is_ahead_is_said() -> None:
    ahead = Estimate(
        what="student",
        tokens=2_700_000,
        steps=659,
        tokens_per_step=4096,
        passes=2.5,
        seconds=4000.4,
    )
    line = announcement(ahead)
    assert line.startswith("student: 2,700,000 tokens in 659 steps of 4,096, the text 2.5 times")
    assert "about 1:06:40 (h:mm:ss)" in line
    assert "about" not in announcement(replace(ahead, seconds=None))


def test_what_was_recovered_is_said() -> None:
    steps = [
        {"tokens": 0, "loss": 0.4, "kl": 0.4, "ppl": 55.0},
        {"tokens": 8000, "loss": 0.1, "kl": 0.1, "ppl": 40.25},
    ]
    record = {"steps": steps, "stopped_early": True, "tokens": 8000, "recovered_percent": 87.25}
    result = UptrainResult(output=Path("out"), record=record, seconds=3.0)
    assert summary(result) == (
        "wrote out in 3.0 s; stopped on a plateau after 8,000 tokens; recovered 87.2% of what the "
        "conversion lost"
    )
    header, rows = evaluations_table(result)
    assert header == ["tokens", "kl", "ppl"] and rows[1] == ["8,000", "0.1", "40.25"]
    less = replace(result, record=record | {"stopped_early": False, "recovered_percent": None})
    assert summary(less) == "wrote out in 3.0 s"
    lost = replace(result, record=less.record | {"steps": steps[::-1]})
    assert summary(lost).endswith(
        "worse than before (held-out loss 0.4 against 0.1): give it more tokens, or a lower "
        "--learning-rate"
    )
