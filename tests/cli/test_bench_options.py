"""What benchmarks can be asked stands in one place: both command lines and `run` agree on it."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_attn_patch.bench import options, script
from hf_attn_patch.cli import app

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.mark.parametrize("benchmark", options.BENCHMARKS)
def test_options_are_those_of_run(benchmark: str) -> None:
    """By name and default; None leaves the choice to `run`."""
    run = importlib.import_module(f"hf_attn_patch.bench.{benchmark}").run
    taken = inspect.signature(run).parameters
    offered = {option.name: option for option in options.options_of(benchmark)}
    hidden = {"say", "sizes"}  # told what happens; mla's, for tests
    if benchmark == "short":
        hidden.add("impls")
    assert set(offered) == set(taken) - hidden
    for name, option in offered.items():
        default = taken[name].default
        assert option.required == (default is inspect.Parameter.empty)
        assert option.required or option.default == default, name
        assert option.help.endswith(".")
    assert (SCRIPTS / f"bench_{benchmark}.py").exists()


class Asked:
    """Stands where a benchmark's `run` was."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, benchmark: str) -> None:
        self.given: dict[str, Any] = {}
        monkeypatch.setattr(f"hf_attn_patch.bench.{benchmark}.run", self.run)

    def run(self, say: Any = None, **given: Any) -> list[dict[str, Any]]:
        self.given = given
        say("measuring")
        one = {"impl": "one", "model": "m", "p50_ms": 2.5, "lengths": [1, 2], "none": None}
        return [one, {**one, "impl": "two", "p50_ms": 5.0, "lengths": [1]}]


def test_both_command_lines_ask_for_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Asked(monkeypatch, "model")
    # what the processor at hand makes of bfloat16 is not this test's question
    monkeypatch.setattr("hf_attn_converters.precision.slow_note", lambda *_: None)
    words = [
        "--shape",
        "tiny",
        "--dtype",
        "bfloat16",
        "--budget",
        "7.5",
        "--quick",
        "--out",
        "x.csv",
    ]
    lists = ["--contexts", "8", "16", "--impls", "sdpa"]
    assert script.main("model", [*words, *lists, "--json"]) == 0
    by_script, printed = asked.given, capsys.readouterr()
    assert [row["impl"] for row in json.loads(printed.out)] == ["one", "two"]
    assert printed.err == "measuring\n"
    lists = ["--contexts", "8", "--contexts", "16", "--impls", "sdpa"]
    done = CliRunner().invoke(app, ["bench", "model", *words, *lists, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)[1]["p50_ms"] == 5.0 and "measuring" in done.stderr
    assert asked.given == by_script
    assert by_script["contexts"] == [8, 16] and by_script["budget_s"] == 7.5
    assert by_script["out"] == Path("x.csv") and by_script["checkpoint"] is None
    assert by_script["quick"] is True and by_script["phases"] is None


def test_what_rows_share_stands_above_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Asked(monkeypatch, "growth")
    assert script.main("growth", []) == 0
    same, header, *rows = capsys.readouterr().out.splitlines()
    assert same == "model m" and header.split() == ["impl", "p50_ms", "lengths"]
    assert rows == ["one   2.5     1, 2", "two   5       1"]
    done = CliRunner().invoke(app, ["bench", "growth"])
    assert "model m" in done.stdout and "1, 2" in done.stdout and "none" not in done.stdout
    assert options.summary([]) == ("", [], [])


def test_a_missing_checkpoint_and_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main("short", [])
    assert stop.value.code == 2 and "checkpoint" in capsys.readouterr().err

    def fails(**given: Any) -> None:
        raise RuntimeError("the converter failed")

    monkeypatch.setattr("hf_attn_patch.bench.convert.run", fails)
    assert script.main("convert", []) == 1
    assert "error: the converter failed" in capsys.readouterr().err


def test_scripts_need_no_typer(fresh_python: Any) -> None:
    """A GPU machine has torch, triton and transformers only."""
    fresh_python(
        "import sys; sys.modules['typer'] = sys.modules['rich'] = None\n"
        "from hf_attn_patch.bench import script\n"
        "assert script.main('convert', ['--gigabytes', '0']) == 2"
    )
