"""Code that lies in a checkpoint is not run, also where somebody answers yes to whatever asks."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoints import edit_config, tiny_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_attn_patch.cli import app

ROOT = Path(__file__).resolve().parents[2]
LOADERS = ("from_pretrained", "from_config")
CODE = """
import pathlib
pathlib.Path({place!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "foreign"
class Model(LlamaForCausalLM):
    config_class = Config
class Words(PreTrainedTokenizerFast):
    pass
def generate(model, **kwargs):
    pass
"""


def in_config(folder: Path, code: str) -> None:
    (folder / "foreign.py").write_text(code)
    auto_map = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
    edit_config(folder, model_type="foreign", auto_map=auto_map)


def in_tokenizer(folder: Path, code: str) -> None:
    (folder / "foreign.py").write_text(code)
    path = folder / "tokenizer_config.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known |= {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": [None, "foreign.Words"]}}
    path.write_text(json.dumps(known))


def in_generation(folder: Path, code: str) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)


PLACES: dict[str, tuple[Callable[[Path, str], None], Callable[..., object]]] = {
    "config": (in_config, AutoConfig.from_pretrained),
    "tokenizer": (in_tokenizer, AutoTokenizer.from_pretrained),
    "generation": (in_generation, AutoModelForCausalLM.from_pretrained),
}
COMMANDS = [
    "check {model}",
    "estimate {model} --device h200",
    "generate {model} --prompt the --max-new-tokens 1",
    "generate {model} --batch {batch} --max-new-tokens 1",
    "compare {model} {model} --text {text} --max-tokens 300 --rounds 0",
    "convert {model} {out} -n 1 --method csvd --calibration-text {text} "
    "--calibration-tokens 512 --verify",
    "uptrain {model} --teacher {model} --output {out} --text {text} --tokens 64 "
    "--sequence-length 32 --batch-size 2 --device cpu",
    "bench short {model} --prompts 8 --new-tokens 2 --rounds 1",
]


@pytest.fixture
def foreign(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """(a checkpoint with code in one place, the file that the code writes)"""
    model = tiny_checkpoint(tmp_path / "model", heads=4, kv_heads=2, tokenizer=True)
    put, _ = PLACES[request.param]
    put(model, CODE.format(place=str(tmp_path / "ran")))
    return model, tmp_path / "ran"


@pytest.mark.parametrize("foreign", PLACES, indirect=True)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda line: " ".join(line.split()[::2])[:16])
def test_yes_is_no_answer(command: str, foreign: tuple[Path, Path], tmp_path: Path) -> None:
    model, place = foreign
    (tmp_path / "text.txt").write_text("words that somebody spoke before an audience. " * 300)
    (tmp_path / "batch.jsonl").write_text('{"prompt": "the fox"}\n')
    line = command.format(
        model=model,
        out=tmp_path / "out",
        text=tmp_path / "text.txt",
        batch=tmp_path / "batch.jsonl",
    )
    result = CliRunner().invoke(app, line.split(), input="y\n" * 50)
    assert not place.exists()
    assert "[y/N]" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    if result.exit_code:
        [said] = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
        assert result.stderr.rstrip().endswith(said), "one line, and nothing behind it"


@pytest.mark.parametrize("foreign,place", [(p, p) for p in PLACES], indirect=["foreign"])
def test_negative_control_trusted_code_runs(foreign: tuple[Path, Path], place: str) -> None:
    model, ran = foreign
    PLACES[place][1](model, trust_remote_code=True)
    assert ran.exists()


def untrusting(source: str) -> list[int]:
    """Lines that load something and do not say whether its code is trusted; a loader that is named
    and not called hides that, so it counts."""
    tree = ast.parse(source)
    called = {id(n.func): n for n in ast.walk(tree) if isinstance(n, ast.Call)}
    named = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in LOADERS]
    return [
        n.lineno
        for n in named
        if id(n) not in called
        or not any(k.arg == "trust_remote_code" for k in called[id(n)].keywords)
    ]


def test_whatever_loads_says_whether_it_trusts() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("hf_attn_patch", "converters", "kernels", "scripts")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in untrusting(path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source,lines",
    [
        ("A.from_pretrained(x)", [1]),
        ("load = A.from_pretrained", [1]),
        ("A.from_pretrained(x, trust_remote_code=False)", []),
        ("A.from_config(c)\nA.from_config(c, trust_remote_code=ours)", [1]),
    ],
)
def test_the_rule_can_be_broken(source: str, lines: list[int]) -> None:
    assert untrusting(source) == lines
