"""hf-attn as a user meets it: exit codes, pure JSON, one line for an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_checkpoints import edit_config, tiny_checkpoint
from typer.testing import CliRunner

from hf_attn_patch import __version__, list_implementations
from hf_attn_patch.cli import app

COMMANDS = ["list", "check", "generate", "convert", "compare", "bench"]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def json_of(*arguments: object) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("all the words that are fit to be measured, " * 20)
    return tiny_checkpoint(folder / "source", kv_heads=2, tokenizer=True)


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS), ["bench", "attention"]])
def test_help(command: list[str]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["convert", "only-one"], ["list", "--nonsense"], ["generate"],
     ["convert", "a", "b", "-n", "many"], ["compare", "a", "b"]],
    ids=" ".join,
)  # fmt: skip
def test_misuse_is_exit_code_2(arguments: list[str]) -> None:
    assert invoke(*arguments).exit_code == 2


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"hf-attn-patch {__version__}\n")


def test_list() -> None:
    found = json_of("list")
    names = [impl.name for impl in list_implementations()]
    assert [entry["name"] for entry in found] == names
    assert found[0]["supports"]["backward"] is True
    shown = invoke("list").stdout
    assert all(name in shown for name in names)


class TestCheck:
    def test_model(self, source: Path) -> None:
        found = json_of("check", source, "--device", "cpu")["implementations"]
        assert found["triton_fa2"]["ok"] is True
        assert "cpu" in found["triton_fa2"]["reason"]
        assert found["triton_swa"]["ok"] is False  # no window in a Llama's config
        assert "configure_swa" in found["triton_swa"]["fix"]

    def test_one_that_would_not_run_is_exit_code_1(self, source: Path) -> None:
        result = invoke("check", source, "--attn", "triton_swa", "--device", "cpu")
        assert result.exit_code == 1
        assert "window" in result.stdout

    def test_machine(self) -> None:
        found = json_of("check", "--device", "cpu")
        assert found["model"] is None
        assert found["implementations"]["triton_fa2"]["backend"]

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [(["/no/such/model"], "/no/such/model"), (["--attn", "triton_fa"], "triton_fa2")],
        ids=["absent-model", "unknown-name"],
    )
    def test_misuse(self, arguments: list[str], says: str) -> None:
        result = invoke("check", *arguments)
        assert result.exit_code == 2
        assert says in result.stderr
        assert result.stderr.count("error:") == 1

    def test_a_model_that_cannot_take_it(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
        assert invoke("check", tmp_path).exit_code == 1


class TestGenerate:
    def test_implementations_agree(self, source: Path) -> None:
        texts = set()
        for attn in (["sdpa"], ["triton_fa2"], ["triton_swa", "--window", "99", "--sinks", "2"]):
            data = json_of(
                "generate", source, "--prompt", "the fox", "--attn", *attn, "--max-new-tokens", 6
            )
            (found,) = data["continuations"]
            assert found["prompt_tokens"] == 7
            assert 1 <= found["new_tokens"] <= 6
            assert found["prefill_tokens_s"] > 0
            texts.add(found["text"])
        assert len(texts) == 1

    def test_pages_give_the_same_text_and_are_used_again(self, source: Path) -> None:
        prompts = ["the quick brown fox jumps over the lazy", "the quick brown fox jumps high"]
        arguments = [part for prompt in prompts for part in ("--prompt", prompt)]
        texts = {}
        for cache in ("dynamic", "paged"):
            data = json_of("generate", source, *arguments, "--cache", cache, "--max-new-tokens", 6)
            texts[cache] = [found["text"] for found in data["continuations"]]
        assert texts["paged"] == texts["dynamic"]
        assert [found["reused_tokens"] for found in data["continuations"]] == [0, 16]
        assert data["cache"]["page_size"] == 16
        assert data["cache"]["hit_rate"] > 0.2
        smaller = json_of("generate", source, *arguments, "--cache", "paged-fp8")
        assert smaller["cache"]["used_bytes"] < data["cache"]["used_bytes"]

    def test_batch(self, source: Path, tmp_path: Path) -> None:
        prompts = ["the fox", "a", "the quick brown fox jumps over the lazy dog and the lazy cat"]
        file = tmp_path / "prompts.jsonl"
        file.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts) + "\n")
        arguments = [part for prompt in prompts for part in ("--prompt", prompt)]
        alone = json_of("generate", source, *arguments, "--attn", "eager", "--max-new-tokens", 6)
        options = ("--max-new-tokens", 6, "--dtype", "float32")
        data = json_of("generate", source, "--batch", file, *options)
        assert data["implementation"] == "triton_paged_flash2"
        assert [a["prompt"] for a in data["answers"]] == prompts
        assert [a["text"] for a in data["answers"]] == [c["text"] for c in alone["continuations"]]
        assert data["new_tokens_s"] > 0
        result = invoke("generate", source, "--batch", file, *options)
        assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == prompts
        assert "new tokens/s" in result.stderr

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ('{"prompt": "a"}\n{"text": "b"}\n', "line 2"),
            ("\n", "no prompts"),
            ("[1]", "line 1"),
        ],
    )
    def test_bad_batch(self, content: str, says: str, source: Path, tmp_path: Path) -> None:
        file = tmp_path / "prompts.jsonl"
        file.write_text(content)
        result = invoke("generate", source, "--batch", file)
        assert result.exit_code == 2, result.output
        assert says in result.stderr

    def test_prompt_or_batch(self, source: Path, tmp_path: Path) -> None:
        for arguments, says in (
            ([], "--prompt"),
            (["--prompt", "a", "--batch", "b.jsonl"], "--batch"),
            (["--batch", tmp_path / "none.jsonl"], "cannot be read"),
            (["--batch", "b.jsonl", "--cache", "paged"], "--cache"),
            (["--prompt", "a", "--pages", 4], "--pages"),
            (["--prompt", "a", "--cache", "paged", "--attn", "sdpa"], "PagedCache"),
            (["--prompt", "a", "--cache", "paged", "--page-size", 17], "page_size"),
        ):
            result = invoke("generate", source, *arguments)
            assert result.exit_code == 2, (arguments, result.output)
            assert says in result.stderr

    def test_text_on_stdout_rates_on_stderr(self, source: Path) -> None:
        result = invoke("generate", source, "--prompt", "a", "--prompt", "b", "--max-new-tokens", 1)
        assert result.exit_code == 0, result.output
        assert result.stderr.count("tokens/s") == 2
        assert "tokens/s" not in result.stdout

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--window", "8"], "triton_swa"),
            (["--attn", "triton_swa", "--sinks", "2"], "--window"),
            (["--attn", "triton_swa"], "configure_swa"),
            (["--attn", "triton_fa"], "triton_fa"),
            (["--dtype", "float8"], "float8"),
            (["--chat"], "chat template"),
        ],
        ids=["window-of-fa2", "sinks-alone", "swa-without-window", "typo", "dtype", "chat"],
    )
    def test_misuse(self, arguments: list[str], says: str, source: Path) -> None:
        result = invoke("generate", source, "--prompt", "a", *arguments)
        assert result.exit_code == 2, result.output
        assert says in result.stderr
        assert result.stdout == ""

    def test_swa_takes_the_model_s_own_window(self, tmp_path: Path) -> None:
        model = tiny_checkpoint(tmp_path / "m", family="mistral", tokenizer=True, sliding_window=4)
        result = invoke("generate", model, "--prompt", "a fox", "--attn", "triton_swa")
        assert result.exit_code == 0, result.output


class TestConvert:
    def test_json(self, source: Path, tmp_path: Path) -> None:
        data = json_of("convert", source, tmp_path / "b", "-n", 4)
        assert (data["kv_heads_before"], data["kv_heads_after"]) == (2, 4)
        assert data["method"] == "exact"
        assert data["dry_run"] is False
        assert (tmp_path / "b" / "config.json").exists()

    def test_dry_run_writes_nothing(self, source: Path, tmp_path: Path) -> None:
        result = invoke("convert", source, tmp_path / "b", "-n", 1, "--dry-run")
        assert result.exit_code == 0, result.output
        assert "nothing written" in result.stdout
        assert "KV bytes per token" in result.stdout
        assert not list(tmp_path.iterdir())


class TestCompare:
    quick = ("--max-tokens", 60, "--new-tokens", 3, "--rounds", 1, "--context", 20)

    def test_json_and_report(self, source: Path, tmp_path: Path) -> None:
        report = tmp_path / "report.md"
        data = json_of(
            "compare", source, f"{source}@triton_fa2", "--text", source.parent / "text.txt",
            *self.quick, "--report", report,
        )  # fmt: skip
        assert data["quality"][1]["kl_mean"] == pytest.approx(0, abs=1e-6)
        assert report.read_text().startswith("# Report")

    def test_table(self, source: Path) -> None:
        result = invoke(
            "compare", source, f"{source}@eager", "--text", source.parent / "text.txt", *self.quick
        )
        assert result.exit_code == 0, result.output
        assert "perplexity" in result.stdout
        assert "source@eager predicts the same as source" in result.stdout

    def test_report_into_an_absent_folder(self, source: Path, tmp_path: Path) -> None:
        result = invoke(
            "compare", source, source, "--text", source.parent / "text.txt",
            "--report", tmp_path / "absent" / "report.md",
        )  # fmt: skip
        assert result.exit_code == 2
        assert "does not exist" in result.stderr


class TestBench:
    rows = ({"impl": "sdpa", "p50_ms": 1.25, "window": None}, {"impl": "x", "p50_ms": 2.0})

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
        """What the benchmark was asked for; it answers with two rows."""
        asked: dict[str, object] = {}

        def run(**options: object) -> list[dict[str, object]]:
            asked.update(options)
            return [{"window": None} | row for row in self.rows]

        module = SimpleNamespace(run=run)
        monkeypatch.setitem(sys.modules, "hf_attn_patch.bench.attention", module)
        return asked

    def test_options_arrive(self, asked: dict[str, object], tmp_path: Path) -> None:
        out = tmp_path / "x.csv"
        data = json_of(
            "bench", "attention", "--rows", "prefill", "--rows", "decode", "--out", out,
            "--threads", 2, "--quick",
        )  # fmt: skip
        assert asked == {"rows": ["prefill", "decode"], "out": out, "threads": 2, "quick": True}
        assert [row["impl"] for row in data] == ["sdpa", "x"]

    def test_table(self, asked: dict[str, object]) -> None:
        result = invoke("bench", "attention")
        assert result.exit_code == 0, result.output
        assert "1.25" in result.stdout
        assert "window" not in result.stdout  # a column without a value
        assert asked["rows"] is None


class TestFailures:
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (ValueError("no"), 2),
            (OSError("no"), 1),
            (RuntimeError("no"), 1),
            (ImportError("no"), 1),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_exit_codes(self, error: Exception, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise error

        monkeypatch.setattr("hf_attn_patch.list_implementations", fail)
        result = invoke("list")
        assert result.exit_code == code
        assert result.stderr == "error: no\n"

    def test_a_bug_keeps_its_traceback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hf_attn_patch.list_implementations", lambda: None)
        result = invoke("list")
        assert result.exit_code == 1
        assert isinstance(result.exception, TypeError)

    def test_debugging(self, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
        monkeypatch.setenv("HF_ATTN_DEBUG", "1")
        result = invoke("convert", source, source, "-n", 1)
        assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "hf_attn_patch.cli", "convert"],
        [str(Path(__file__).parents[2] / "scripts" / "convert_checkpoint.py")],
    ],
    ids=["module", "script"],
)
def test_in_a_process_of_its_own(command: list[str], source: Path, tmp_path: Path) -> None:
    """Stdout is JSON and nothing else, also with everything that libraries print."""
    done = subprocess.run(
        [sys.executable, *command, str(source), str(tmp_path / "b"), "-n", "1", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kv_heads_after"] == 1
    edit_config(tmp_path / "b", model_type="unknown")
    again = subprocess.run(
        [sys.executable, *command, str(tmp_path / "b"), str(tmp_path / "c"), "-n", "4"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert again.returncode == 2
    assert again.stdout == ""
    assert "known families" in again.stderr


def test_compare_script_prints_pure_json(source: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "compare_generation.py"
    done = subprocess.run(
        [sys.executable, str(script), str(source), f"{source}@triton_fa2", "--json",
         "--text", str(source.parent / "text.txt"), "--max-tokens", "40", "--new-tokens", "2",
         "--rounds", "1", "--context", "16", "--decode-tokens", "2"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["candidates"] == ["source@triton_fa2"]
