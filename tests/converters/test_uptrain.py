"""Uptraining as a whole: it learns, resumes after a kill to the same bits, stops at NaN."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import (
    VOCAB,
    assert_same_weights,
    contents,
    edit_config,
    tiny_checkpoint,
    weights_of,
)
from transformers import BloomConfig, BloomForCausalLM

import hf_attn_patch  # noqa: F401  registers triton_fa2
from hf_attn_converters import convert
from hf_attn_converters.uptrain import Diverged, Estimate, Hooks, UptrainOptions, uptrain
from hf_attn_converters.uptrain import run as runs
from hf_attn_converters.uptrain.trainer import Uptrainer

STEP = 4 * 32  # tokens


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> UptrainOptions:
    """A source, its conversion to one KV head, a text: eight steps with four evaluations."""
    folder = tmp_path_factory.mktemp("uptrain")
    source = tiny_checkpoint(folder / "source", kv_heads=4, tokenizer=True, dtype=torch.bfloat16)
    convert(source, folder / "student", num_key_value_heads=1, method="mean")
    text = folder / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}, and so on.\n" for n in range(400)))
    return UptrainOptions(
        student=folder / "student",
        teacher=source,
        text=(str(text),),
        output=folder / "out",
        tokens=8 * STEP,
        sequence_length=32,
        batch_size=4,
        evaluations=4,
        eval_tokens=256,
        patience=0,
        learning_rate=1e-2,
        precision="float32",
        attn_implementation="triton_fa2",
        device="cpu",
    )


@pytest.fixture(scope="module")
def straight(given: UptrainOptions) -> Path:
    """The result of the run without an interruption."""
    return uptrain(given).output


def test_it_learns_and_says_so(given: UptrainOptions, straight: Path) -> None:
    record = json.loads((straight / "uptrain.json").read_text())
    steps = record["steps"]
    assert [s["tokens"] for s in steps] == [0, 2 * STEP, 4 * STEP, 6 * STEP, 8 * STEP]
    assert steps[-1]["kl"] < 0.7 * steps[0]["kl"]
    assert record["recipe"]["loss"] == "kl" and record["text"] == ["text.txt"]
    assert not record["stopped_early"] and record["tokens"] == 8 * STEP
    assert str(given.student) not in json.dumps(record)  # names, no paths
    mine, before = weights_of(straight), weights_of(Path(given.student))
    assert mine.keys() == before.keys()
    assert {x.dtype for x in mine.values()} == {torch.bfloat16}
    assert any(not torch.equal(mine[n], before[n]) for n in mine)
    names = {path.name for path in straight.iterdir()}
    assert {"tokenizer.json", "conversion.json", "README.md", "config.json"} <= names
    assert "## Uptraining" in (straight / "README.md").read_text()
    config = json.loads((straight / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["num_key_value_heads"] == 1
    assert not straight.with_name(straight.name + ".partial").exists()


def test_the_recorded_loss_is_that_of_the_result(given: UptrainOptions, straight: Path) -> None:
    """The last KL, computed again from the folder: only bfloat16 storage lies between."""
    again = replace(given, student=straight, output=straight.with_name("again"), learning_rate=1e-9)
    first = json.loads((straight / "uptrain.json").read_text())["steps"]
    second = uptrain(replace(again, tokens=STEP, evaluations=1)).record["steps"]
    assert second[0]["source_ppl"] == pytest.approx(first[0]["source_ppl"], rel=1e-6)
    assert second[0]["kl"] == pytest.approx(first[-1]["kl"], rel=0.02)


KILLED = """
import os, signal
import hf_attn_patch
from hf_attn_converters.uptrain import Hooks, UptrainOptions, uptrain

def progress(done, total, what):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)

uptrain(UptrainOptions(**eval(os.environ["OPTIONS"])), Hooks(progress=progress))
"""


def test_a_killed_run_resumes_to_the_same_bits(
    given: UptrainOptions, straight: Path, tmp_path: Path, fresh_python: Callable[..., Any]
) -> None:
    """Killed in step 5, after the checkpoint of step 4; a torn later checkpoint is left over."""
    options = replace(given, output=tmp_path / "out")
    plain = {f.name: getattr(options, f.name) for f in fields(options)}
    plain |= {name: str(plain[name]) for name in ("student", "teacher", "output")}
    done = fresh_python(KILLED, env={"OPTIONS": repr(plain), "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    work = tmp_path / "out.partial"
    assert not (tmp_path / "out").exists() and (work / "student" / "checkpoint-4").exists()
    (work / "student" / "checkpoint-6").mkdir()
    (work / "student" / "checkpoint-6" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"begun differently \(recipe\.learning_rate"):
        uptrain(replace(options, resume=True, learning_rate=1e-3))
    seen: list[int] = []
    result = uptrain(
        replace(options, resume=True), Hooks(progress=lambda step, total, what: seen.append(step))
    )
    assert seen == [5, 6, 7, 8]
    assert_same_weights(result.output, straight)
    first = json.loads((straight / "uptrain.json").read_text())
    assert result.record["steps"] == first["steps"]
    assert result.record["train_loss"] == first["train_loss"]


def test_another_seed_gives_other_weights(given: UptrainOptions, straight: Path, tmp_path: Path):
    """What the test above compares does depend on the run."""
    result = uptrain(replace(given, output=tmp_path / "out", seed=1, tokens=2 * STEP))
    with pytest.raises(AssertionError):
        assert_same_weights(result.output, straight)


def test_only_the_attention(given: UptrainOptions, tmp_path: Path) -> None:
    """In bfloat16, activations computed twice, mixed losses, TensorBoard, two batches a step."""
    pytest.importorskip("tensorboard")
    told: list[Estimate] = []
    result = uptrain(
        replace(
            given,
            output=tmp_path / "out",
            train="attention",
            loss="mix",
            precision="bf16",
            gradient_checkpointing=True,
            accumulate=2,
            batch_size=2,
            report_to="tensorboard",
        ),
        Hooks(announce=told.append),
    )
    mine, before = weights_of(result.output), weights_of(Path(given.student))
    changed = {n for n in mine if not torch.equal(mine[n], before[n])}
    assert changed and all("self_attn" in name for name in changed)
    assert result.record["steps"][-1]["loss"] < result.record["steps"][0]["loss"]
    assert list((result.output / "runs").rglob("events.*"))
    [estimate] = told
    assert estimate.tokens == 8 * STEP and estimate.steps == 8 and estimate.seconds > 0


def test_the_control_says_what_was_recovered(given: UptrainOptions, tmp_path: Path) -> None:
    """Without a teacher in the loss; killed by hand between control and student, then resumed."""
    options = replace(given, output=tmp_path / "out", loss="ce", control=True)
    told: list[str] = []

    def progress(done: int, total: int, what: str) -> None:
        told.append(what)
        if what == "student" and len(told) < 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        uptrain(options, Hooks(progress=progress))
    record = uptrain(replace(options, resume=True), Hooks(progress=progress)).record
    assert told == ["control"] * 8 + ["student"] * 9
    before, after = (record["steps"][i]["ce"] for i in (0, -1))
    control = record["control"][-1]["ce"]
    assert control < record["control"][0]["ce"]
    expected = 100 * (before - after) / (before - control)
    assert record["recovered_percent"] == pytest.approx(expected)


def test_a_plateau_ends_it(given: UptrainOptions, tmp_path: Path) -> None:
    options = replace(given, output=tmp_path / "out", learning_rate=1e-9, patience=2)
    record = uptrain(options).record
    assert record["stopped_early"] and record["steps"][-1]["step"] == 4


def test_nan_keeps_the_last_good_checkpoint(
    given: UptrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Uptrainer.compute_loss

    def broken(self: Uptrainer, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 5 else loss

    monkeypatch.setattr(Uptrainer, "compute_loss", broken)
    options = replace(given, output=tmp_path / "out")
    with pytest.raises(Diverged, match=r"training loss is nan at step 6 of 8"):
        uptrain(options)
    assert not options.output.exists()
    saved = tmp_path / "out.partial" / "student" / "checkpoint-4"
    assert all(x.isfinite().all() for x in weights_of(saved).values())
    monkeypatch.undo()
    assert uptrain(replace(options, resume=True)).record["tokens"] == 8 * STEP


def test_nan_weights_are_not_saved(
    given: UptrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss whose gradient is NaN: the evaluation before the checkpoint finds out."""
    step = Uptrainer.training_step

    def broken(self: Uptrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 3:
            next(model.parameters()).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(Uptrainer, "training_step", broken)
    with pytest.raises(Diverged, match="held-out text is nan"):
        uptrain(replace(given, output=tmp_path / "out"))
    assert {p.name for p in (tmp_path / "out.partial" / "student").glob("check*")} == {
        "checkpoint-2"
    }


# --- bad input ------------------------------------------------------------------------------------


def refused(options: UptrainOptions, match: str) -> None:
    """Refused with these words, and nothing written."""
    before = contents(Path(options.output).parent)
    with pytest.raises(ValueError, match=match):
        uptrain(options)
    assert contents(Path(options.output).parent) == before


def test_bad_input(given: UptrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(given, output=tmp_path / "out")
    wide = tiny_checkpoint(tmp_path / "wide", tokenizer=True)
    edit_config(wide, vocab_size=301)
    refused(replace(given, teacher=wide), "has 300 tokens in its vocabulary, its teacher wide 301")
    other = tiny_checkpoint(tmp_path / "other", tokenizer=True)
    words = json.loads((other / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    vocab["T"], vocab["U"] = vocab["U"], vocab["T"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    refused(replace(given, teacher=other), "tokenize differently")
    mute = tiny_checkpoint(tmp_path / "mute")
    refused(replace(given, student=mute), "holds no tokenizer")
    short = tmp_path / "short.txt"
    short.write_text("short")
    refused(replace(given, text=(str(short),)), "one row takes 32")
    refused(replace(given, text=(str(tmp_path / "absent.txt"),)), "there is no file .*absent")
    refused(replace(given, output=Path(given.student) / "out"), "lies inside the source")
    bloom = tmp_path / "bloom"
    sizes = BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2)
    BloomForCausalLM(sizes).save_pretrained(bloom)
    refused(replace(given, student=bloom), "takes no position_ids")
    monkeypatch.setattr(runs, "free_bytes", lambda device: (10_000, "a small device"))
    monkeypatch.delattr("hf_attn_converters.uptrain.training.load_model")  # nothing is loaded
    refused(given, r"teacher \(.*\) and student .* more than the 0\.00 GB .* on a small device")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "mse"}, "loss is 'mse'; possible: kl, ce, mix"),
        ({"teacher": None}, "the loss 'kl' needs a teacher"),
        ({"text": ()}, "there is no text"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"warmup": 1.5}, "warmup is a share from 0 to 1, got 1.5"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"device": "tpu"}, "device is 'tpu'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_options(given: UptrainOptions, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(given, **change)


def test_the_budget() -> None:
    """0.1% of 20 tokens per weight, 0.01% of what was really trained on, or as asked."""
    few = UptrainOptions(student="s", output="o", text=("t",), loss="ce")
    assert few.budget(135_000_000) == 2_700_000
    assert replace(few, pretraining_tokens=2 * 10**12).budget(1) == 2 * 10**8
    assert replace(few, pretraining_tokens=10, tokens=7).budget(1) == 7
    assert few.budget(1) == 1


def test_the_budget_is_that_of_the_student(given: UptrainOptions, tmp_path: Path) -> None:
    weights = sum(x.numel() for x in weights_of(Path(given.student)).values())
    options = replace(given, tokens=None, output=tmp_path / "out")
    assert runs.checked(options).tokens == round(0.02 * weights) > 100


# --- the command ----------------------------------------------------------------------------------


def test_the_command(given: UptrainOptions, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from hf_attn_patch.cli import app

    words = ["uptrain", str(given.student), "--teacher", str(given.teacher), "--device", "cpu"]
    words += ["--text", given.text[0], "--output", str(tmp_path / "out"), "--batch-size", "4"]
    words += ["--sequence-length", "32", "--tokens", str(4 * STEP), "--evaluations", "2"]
    done = CliRunner().invoke(app, [*words, "--eval-tokens", "128"])
    assert done.exit_code == 0, done.output
    assert "512 tokens in 4 steps of 128; about 0:00:" in done.output
    assert "student, step 2: held-out kl" in done.output
    assert f"wrote {tmp_path / 'out'} in" in done.output
    refused = CliRunner().invoke(app, [*words, "--loss", "mse"])
    assert refused.exit_code == 2 and "possible: kl, ce, mix" in refused.output


def test_nan_is_exit_code_1(
    given: UptrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from hf_attn_patch.cli import app

    broken = tiny_checkpoint(tmp_path / "nan", tokenizer=True)
    weights = weights_of(broken)
    weights["model.norm.weight"].fill_(float("nan"))
    from safetensors.torch import save_file

    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    words = ["uptrain", str(broken), "--teacher", str(given.teacher), "--text", given.text[0]]
    words += ["--sequence-length", "32", "--output", str(tmp_path / "out"), "--tokens", "128"]
    done = CliRunner().invoke(app, [*words, "--device", "cpu"])
    assert done.exit_code == 1 and "is nan at step 1" in done.output
