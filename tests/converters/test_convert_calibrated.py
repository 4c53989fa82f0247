"""Calibrated conversion of every family, end to end: watched layer by layer, merged, fitted."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, Case
from tiny_checkpoints import byte_tokenizer, contents, logits_of, tiny_checkpoint
from torch import Tensor

from hf_attn_converters import convert
from hf_attn_converters.calibration import Calibration
from hf_attn_converters.calibration.fit import FitSettings, Use, fit_layer, relative_error
from hf_attn_converters.calibration.source_model import Call, SourceModel
from hf_attn_converters.calibration.tokens import RANDOM_TOKENS, SELF_GENERATED, calibration_tokens
from hf_attn_converters.heads.plan import plan_conversion
from hf_attn_converters.io.text import read_text
from hf_attn_converters.layerwise import source_model

FIT = FitSettings(steps=24, step_tokens=64, attention_lr=1e-2, other_lr=1e-3)
QUICK = Calibration(tokens=1024, sequence_length=32, fit=FIT, without_text=RANDOM_TOKENS)


def high_checkpoint(case: Case, folder: Path, **options: Any) -> Path:
    """The case's tiny model with all the KV heads that it can have."""
    return tiny_checkpoint(folder / "source", family=case.tiny, kv_heads=case.high, **options)


def distance(source: Path, output: Path) -> float:
    theirs, ours = logits_of(source), logits_of(output)
    assert ours.isfinite().all()
    return float((ours - theirs).norm() / theirs.norm())


ONE_HEAD = ("falcon_mqa", "falcon_mqa_serial", "gpt_bigcode")  # nothing to merge
each_mergeable = pytest.mark.parametrize(
    "case", [case for case in CASES if case.tiny not in ONE_HEAD], ids=lambda case: case.tiny
)


@each_mergeable
def test_layers_in_turn_are_the_model(case: Case, tmp_path: Path) -> None:
    """Running the layers one after the other on recorded calls gives what the model itself does."""
    folder = high_checkpoint(case, tmp_path)
    work = plan_conversion(folder, tmp_path / "b", num_key_value_heads=1, method="csvd")
    source = source_model(work)
    ids = torch.randint(2, 300, (128, 16), generator=torch.Generator().manual_seed(0))
    calls = source.calls(ids)
    if any(len(uses) > 1 for uses in calls):  # ALBERT: one layer, used again and again
        inputs = source.all_inputs(ids, 0)
        for call, before, after in zip(calls[0], inputs, inputs[1:], strict=False):
            torch.testing.assert_close(through(source, 0, before, call), after)
        return
    hidden = source.first_inputs(ids)
    last = len(source.layers) - 1
    for layer in range(last):
        hidden = through(source, layer, hidden, calls[layer][0])
    (wanted,) = source.all_inputs(ids, last)
    torch.testing.assert_close(hidden, wanted)


@torch.no_grad()
def through(source: SourceModel, layer: int, hidden: Tensor, call: Call) -> Tensor:
    return torch.cat([call.run(source.float_layer(layer), x) for x in hidden.split(call.rows)])


@each_mergeable
def test_fitting_beats_mean(case: Case, tmp_path: Path) -> None:
    source = high_checkpoint(case, tmp_path)
    found = {}
    for method, calibration in (("mean", None), ("csvd+fit", QUICK)):
        target = tmp_path / method
        convert(source, target, num_key_value_heads=1, method=method, calibration=calibration)
        found[method] = distance(source, target)
    assert found["csvd+fit"] < found["mean"], found


def test_order_of_the_methods(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", heads=8, kv_heads=8)
    found = {}
    enough = Calibration(
        tokens=8192, sequence_length=32, without_text=RANDOM_TOKENS,
        fit=FitSettings(steps=128, step_tokens=64, attention_lr=5e-3, other_lr=1e-3),
    )  # fmt: skip
    for method in ("first", "mean", "procrustes", "csvd", "csvd+fit"):
        calibration = enough if method not in ("first", "mean") else None
        convert(
            source, tmp_path / method, num_key_value_heads=2, method=method, calibration=calibration
        )
        found[method] = distance(source, tmp_path / method)
    assert found["csvd+fit"] < found["csvd"] < found["procrustes"] < found["first"], found
    assert found["csvd"] < found["mean"], found


def test_without_other_lr_only_attention_changes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    before = load_file(source / "model.safetensors")
    changed = {}
    for name, other in (("attention", 0.0), ("block", 1e-3)):
        fit = FitSettings(steps=8, step_tokens=64, other_lr=other)
        calibration = Calibration(
            tokens=512, sequence_length=32, fit=fit, without_text=RANDOM_TOKENS
        )
        target = tmp_path / name
        convert(source, target, num_key_value_heads=2, method="csvd+fit", calibration=calibration)
        after = load_file(target / "model.safetensors")
        assert after.keys() == before.keys()
        changed[name] = {
            key for key in before
            if before[key].shape != after[key].shape or not torch.equal(before[key], after[key])
        }  # fmt: skip
    assert all("self_attn" in key for key in changed["attention"])
    extra = changed["block"] - changed["attention"]
    assert extra and all(".layers." in key and "self_attn" not in key for key in extra)


def test_a_killed_calibration_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4, layers=3)
    options: dict[str, Any] = {
        "num_key_value_heads": 1, "method": "csvd+fit", "calibration": QUICK,
    }  # fmt: skip
    convert(source, tmp_path / "one" / "b", **options)

    def stop(done: int, total: int, what: str) -> None:
        if what == "layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "two" / "b", layer_progress=stop, **options)
    assert not (tmp_path / "two" / "b").exists()
    finished = tmp_path / "two" / "b.partial" / "layers" / "0.safetensors"
    stamp = finished.stat().st_mtime_ns
    seen: list[int] = []

    def watch(done: int, total: int, what: str) -> None:
        seen.append(finished.stat().st_mtime_ns)

    convert(source, tmp_path / "two" / "b", resume=True, layer_progress=watch, **options)
    assert set(seen) == {stamp}  # the finished layer was not written again
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_record_says_what_it_was_calibrated_on(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4, tokenizer=True)
    text = tmp_path / "words.txt"
    text.write_text("It was a bright cold day in April. " * 200)
    settings = Calibration(text=text, tokens=512, sequence_length=32, fit=FIT, seed=5)
    convert(source, tmp_path / "b", num_key_value_heads=1, method="csvd+fit", calibration=settings)
    record = json.loads((tmp_path / "b" / "conversion.json").read_text())["calibration"]
    assert record["origin"] == "text of words.txt"
    assert (record["tokens"], record["sequence_length"], record["seed"]) == (512, 32, 5)
    assert record["fit"] == {"steps": 24, "step_tokens": 64, "attention_lr": 1e-2, "other_lr": 1e-3}
    assert len(record["errors"]) == 2 and all(0 < e < 1 for e in record["errors"])
    assert str(tmp_path) not in json.dumps(record)


def tokens_of(folder: Path, **options: Any) -> tuple[Tensor, str]:
    work = plan_conversion(folder, folder.parent / "x", num_key_value_heads=1, method="csvd")
    found = calibration_tokens(Calibration(**options), source_model(work), lambda *a: None)
    return found.ids, found.origin


def test_where_tokens_come_from(tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", kv_heads=4)
    ids, origin = tokens_of(plain, tokens=96, sequence_length=16)
    assert origin == SELF_GENERATED and ids.shape == (6, 16)
    assert torch.equal(ids, tokens_of(plain, tokens=96, sequence_length=16)[0])  # seeded
    assert not torch.equal(ids, tokens_of(plain, tokens=96, sequence_length=16, seed=1)[0])
    encoder = tiny_checkpoint(tmp_path / "encoder", family="bert", kv_heads=4)
    assert tokens_of(encoder, tokens=96, sequence_length=16)[1].startswith(RANDOM_TOKENS + " (")


def test_a_share_that_the_model_writes(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "a", kv_heads=4, tokenizer=True)
    text = tmp_path / "a.txt"
    text.write_text("a" * 5000)
    options = {"text": text, "tokens": 160, "sequence_length": 16}
    ids, origin = tokens_of(folder, own_text=0.25, **options)
    plain = [len(set(row)) == 1 for row in ids.tolist()]
    assert plain == [True] * 8 + [False] * 2
    assert origin == "text of a.txt, 25% model-generated text"
    encoder = tiny_checkpoint(tmp_path / "encoder", family="bert", kv_heads=4)
    byte_tokenizer().save_pretrained(encoder)
    with pytest.raises(ValueError, match="writes no text"):
        tokens_of(encoder, own_text=0.25, **options)
    with pytest.raises(ValueError, match="share"):
        Calibration(own_text=1.0)


def test_windows_are_spread_over_the_text(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "a", kv_heads=4, tokenizer=True)
    text = tmp_path / "digits.txt"
    text.write_text("".join(f"{i % 10}" * 1000 for i in range(100)))
    ids, _ = tokens_of(folder, text=text, tokens=20 * 16, sequence_length=16)
    assert ids.shape == (20, 16)
    assert len({int(row[0]) for row in ids}) >= 8  # nearly every digit's stretch is met


def test_jsonl_and_bad_text(tmp_path: Path) -> None:
    good = tmp_path / "a.jsonl"
    good.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert read_text(good, None) == "one\n\n\n\ntwo"
    bad = tmp_path / "b.jsonl"
    bad.write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(ValueError, match=r'line 2.*"text"'):
        read_text(bad, None)
    binary = tmp_path / "c.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        read_text(binary, None)


def test_a_missing_file_is_not_looked_for_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*args: Any, **options: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for name in ("missing.txt", "missing.jsonl"):
        with pytest.raises(ValueError, match=f"there is no file .*{name}"):
            read_text(tmp_path / name)
    with pytest.raises(AssertionError, match="asked"):
        read_text("a/dataset")


def test_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, split, streaming))
        return [{"text": "one"}, {"text": "two"}, {"other": "three"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_text("some/set:test", at_most=5) == "one\n\n"
    assert asked == [("some/set", "test", True)]
    with pytest.raises(ValueError, match="no column text, only other"):
        read_text("some/set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        read_text("some/set", None)


def test_text_needs_a_tokenizer_and_enough_words(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    text = tmp_path / "t.txt"
    text.write_text("short")
    with pytest.raises(ValueError, match="no tokenizer"):
        tokens_of(folder, text=text, tokens=64, sequence_length=32)
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match="5 tokens"):
        tokens_of(folder, text=text, tokens=64, sequence_length=32)
    with pytest.raises(ValueError, match="at least one sequence"):
        Calibration(tokens=8, sequence_length=64)


def test_fit_learns_and_its_control_does_not() -> None:
    """Fitted to another layer's outputs a layer comes near; to shuffled ones it cannot."""
    torch.manual_seed(0)
    teacher, x = torch.nn.Linear(8, 8), torch.randn(32, 4, 8)
    targets = teacher(x).detach()
    errors = {}
    for name, goal in (("right", targets), ("shuffled", targets[torch.randperm(32)])):
        torch.manual_seed(1)
        student = torch.nn.Linear(8, 8)
        use = Use(x, goal, Call((), {}, 2))
        settings = FitSettings(steps=300, attention_lr=3e-2, other_lr=0.0)
        fit_layer(student, list(student.parameters()), [], [use], settings, seed=0)
        errors[name] = float(relative_error(student(x), goal))
    assert errors["right"] < 0.01 < 0.3 < errors["shuffled"], errors


def test_every_token_counts_by_its_own_size() -> None:
    targets = torch.tensor([[1000.0, 0.0], [1.0, 0.0]])
    off = targets * torch.tensor([[1.1], [1.0]])
    torch.testing.assert_close(relative_error(off, targets), torch.tensor(0.005))


def test_grouping_moves_heads_and_says_so(tmp_path: Path) -> None:
    """A shuffled expansion of a GQA model comes back without loss, but only with grouping."""
    from safetensors.torch import load_file, save_file

    small = tiny_checkpoint(tmp_path / "small", heads=8, kv_heads=2)
    source = tmp_path / "mha"
    convert(small, source, num_key_value_heads=8)
    tensors = load_file(source / "model.safetensors")
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    for name, x in tensors.items():
        if "self_attn.o_proj" in name:
            tensors[name] = x.view(len(x), 8, -1)[:, order].reshape(x.shape).contiguous()
        elif "self_attn" in name:
            tensors[name] = x.view(8, -1, x.shape[1])[order].reshape(x.shape).contiguous()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    found = {}
    for name, grouped in (("grouped", True), ("plain", False)):
        options: dict[str, Any] = {"method": "csvd", "calibration": QUICK, "group_heads": grouped}
        convert(source, tmp_path / name, num_key_value_heads=2, **options)
        found[name] = distance(small, tmp_path / name)
    assert found["grouped"] < 1e-3 < 0.1 < found["plain"], found


@pytest.mark.parametrize(
    ("family", "before", "after", "method", "message"),
    [
        pytest.param("llama", 4, 2, "mean", "calibrated method", id="mean"),
        pytest.param("falcon_mha", 4, 1, "csvd", "numbers its heads", id="alibi"),
        pytest.param("llama", 2, 4, "csvd", "whole groups", id="expansion"),
    ],
)
def test_where_grouping_is_refused(
    family: str, before: int, after: int, method: str, message: str, tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path / "a", family=family, kv_heads=before)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "b", num_key_value_heads=after, method=method, group_heads=True)


def test_default_method(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4, tokenizer=True)
    text = tmp_path / "words.txt"
    text.write_text("It was a bright cold day in April. " * 100)
    found = {}
    for name, calibration in {
        "none": None,
        "tokens": QUICK,
        "text": Calibration(text=text, tokens=128, sequence_length=32),
    }.items():
        result = convert(
            source, tmp_path / name, num_key_value_heads=1, calibration=calibration, dry_run=True
        )
        found[name] = result.plan.method
    assert found == {"none": "csvd", "tokens": "csvd", "text": "csvd+fit"}
    exact = convert(tmp_path / "a", tmp_path / "c", num_key_value_heads=1, method="mean")
    assert exact.plan.method == "mean"
