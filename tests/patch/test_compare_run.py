"""The whole comparison: specs, generation, speed, report, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import tiny_checkpoint

from hf_attn_converters import convert
from hf_attn_patch.compare import (
    CompareOptions,
    Comparison,
    compare,
    markdown,
    parse_spec,
    table,
    verdicts,
)
from hf_attn_patch.compare.generation import encode_prompt, measure_generation
from hf_attn_patch.compare.memory import PeakMemory
from hf_attn_patch.compare.speed import measure_speed
from hf_attn_patch.loading import load

WORDS = "the quick brown fox jumps over the lazy dog while nobody looks at all. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source (4 query, 2 KV heads), mha (the same expanded), mqa (one head), text.txt"""
    folder = tmp_path_factory.mktemp("compare")
    source = tiny_checkpoint(folder / "source", kv_heads=2, tokenizer=True)
    convert(source, folder / "mha", num_key_value_heads=4)
    convert(source, folder / "mqa", num_key_value_heads=1, method="mean")
    (folder / "text.txt").write_text(WORDS * 20)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> Comparison:
    options = CompareOptions(
        text=folder / "text.txt",
        max_tokens=200,
        window=64,
        stride=32,
        new_tokens=8,
        context=40,
        decode_tokens=5,
        rounds=1,
    )
    candidates = [f"{folder}/source@triton_fa2", f"{folder}/mha", f"{folder}/mqa"]
    return compare(f"{folder}/source@eager", candidates, options)


def test_the_same_weights_compare_as_the_same(result: Comparison) -> None:
    for i in (1, 2):  # another implementation, and the exact expansion
        quality = result.quality[i]
        assert quality.kl_mean == pytest.approx(0, abs=1e-6)
        assert quality.perplexity == pytest.approx(result.quality[0].perplexity, rel=1e-4)
        assert result.generation[i].exact == 1
        assert result.generation[i].tokens == result.generation[0].tokens


def test_control_another_model_compares_as_another(result: Comparison) -> None:
    assert result.quality[3].kl_mean is not None
    assert result.quality[3].kl_mean > 1e-3
    assert result.generation[3].exact < 1


def test_kv_bytes_are_those_of_the_cache(result: Comparison) -> None:
    per_head = 2 * 2 * 8 * 4  # layers, K and V, head_dim, bytes
    found = [speed.kv_bytes_per_token for speed in result.speed]
    assert found == [2 * per_head, 2 * per_head, 4 * per_head, per_head]
    assert result.speed[0].kv_bytes == 44 * 2 * per_head  # 40 prompt tokens, 4 of the 5 new ones


def test_speed_is_positive_and_ordered(result: Comparison) -> None:
    for speed in result.speed:
        low, high = speed.prefill_spread
        assert 0 < low <= speed.prefill_tokens_s <= high
        assert speed.decode_tokens_s > 0
        assert speed.weight_bytes > 0


def test_json_has_everything(result: Comparison) -> None:
    data = json.loads(json.dumps(result.to_json()))
    assert data["source"] == "source@eager"
    assert data["candidates"] == ["source@triton_fa2", "mha", "mqa"]
    assert [q["label"] for q in data["quality"]] == [data["source"], *data["candidates"]]
    assert data["generation"][1]["exact"] == 1
    assert data["provenance"]["torch"] == torch.__version__
    assert data["options"]["window"] == 64


def test_report(result: Comparison) -> None:
    header, rows = table(result)
    assert header == ["", "source@eager", "source@triton_fa2", "mha", "mqa"]
    assert all(len(row) == len(header) for row in rows)
    cells = {row[0]: row[1:] for row in rows}
    assert cells["greedy same"][:2] == ["", "8 of 8"]
    assert cells["chrF"][1] == cells["BLEU"][1] == cells["ROUGE-L"][1] == "100.0"
    assert "× 2.00" in cells["KV B/token"][2]
    assert re.fullmatch(r"[\d,.]+ ± [\d,.]+ \(× [\d.]+, [\d.]+ to [\d.]+\)", cells["perplexity"][3])
    page = markdown(result, "Title")
    assert page.startswith("## Title")
    lines = [str(verdict) for verdict in verdicts(result)]
    assert all(line in page.replace("\\", "") for line in lines)
    assert "KV cache × 2.00" in lines[1]
    assert "⟦" in page.split("### Greedy continuations")[1]
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert len(widths) == 1


class TestVerdicts:
    def options(self, folder: Path) -> CompareOptions:
        return CompareOptions(
            text=folder / "text.txt", max_tokens=200, window=64, stride=32, new_tokens=6, rounds=0
        )

    def test_a_model_with_itself(self, folder: Path) -> None:
        result = compare(f"{folder}/source", [f"{folder}/source"], self.options(folder))
        [verdict] = verdicts(result)
        assert verdict.grade.words == "is identical to"
        assert str(verdict) == (
            "source #2 is identical to source: the same weights; every measured difference is zero"
        )
        q = result.quality[1]
        assert (q.kl_mean, q.kl_p99, q.kl_max, q.ln_ratio, q.top1) == (0, 0, 0, 0, 1)
        assert q.kl_ci == q.ln_ratio_ci == (0, 0) and q.top1_ci == (1, 1)
        assert all(part.kl == 0 for part in q.kl_by_position)
        assert set(result.generation[1].still_same) == {1.0}

    @pytest.mark.parametrize(
        "name", ["model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight"]
    )
    def test_one_wrong_weight_is_caught(self, name: str, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder / "source", tmp_path / "wrong")
        file = tmp_path / "wrong" / "model.safetensors"
        tensors = load_file(file)
        tensors[name][0, 0] += 0.25
        save_file(tensors, file, metadata={"format": "pt"})
        result = compare(f"{folder}/source", [str(tmp_path / "wrong")], self.options(folder))
        [verdict] = verdicts(result)
        assert verdict.grade.words != "is identical to"
        assert f"tensors differ ({name})" in str(verdict)
        assert result.weights[0].different == 1

    def test_grades_follow_the_divergence(self, folder: Path) -> None:
        result = compare(f"{folder}/source", [f"{folder}/mqa"], self.options(folder))
        words = []
        for kl in (1e-9, 0.001, 0.02, 0.2, 0.7, 3.0):
            quality = [result.quality[0], dataclasses.replace(result.quality[1], kl_mean=kl)]
            words.append(verdicts(dataclasses.replace(result, quality=quality))[0].grade.words)
        assert len(set(words)) == len(words)
        assert words[0] == "predicts the same as" and words[-1] == "is not usable in place of"


def test_contexts_and_batches(folder: Path) -> None:
    options = CompareOptions(
        text=folder / "text.txt", max_tokens=0, new_tokens=0, rounds=1, context=16,
        more_contexts=(32, 16), batches=(2, 1), decode_tokens=3,
    )  # fmt: skip
    result = compare(f"{folder}/source", [f"{folder}/mqa"], options)
    assert [(s.context, s.batch) for s in result.sweep[::2]] == [(16, 2), (32, 2), (16, 1), (32, 1)]
    assert result.speed == result.sweep[:2]
    for speed in result.sweep:  # bytes per token do not depend on the batch
        assert speed.kv_bytes_per_token == 2 * 2 * 8 * 4 * (2 if speed.label == "source" else 1)
    if Path("/proc/self/clear_refs").exists():
        assert all(s.peak_bytes is not None for s in result.sweep)


def test_peak_memory_sees_what_is_taken() -> None:
    with PeakMemory(torch.device("cpu")) as nothing:
        pass
    with PeakMemory(torch.device("cpu")) as much:
        torch.ones(20_000_000)  # 80 MB
    if much.peak_bytes is None:
        pytest.skip("only Linux tells a process's peak")
    assert nothing.peak_bytes is not None
    assert nothing.peak_bytes < 8e6 and 76e6 < much.peak_bytes < 120e6


def test_parts_can_be_left_out(folder: Path) -> None:
    options = CompareOptions(text=folder / "text.txt", max_tokens=0, new_tokens=0, rounds=0)
    result = compare(f"{folder}/source", [f"{folder}/mqa"], options)
    assert not (result.quality or result.generation or result.speed)
    assert table(result) == (["", "source", "mqa"], [])
    assert markdown(result)


def test_a_lean_window_holds_less(folder: Path) -> None:
    specs = [f"{folder}/source@triton_swa:window={w}" for w in (400, 8)]
    models = [load(parse_spec(spec)) for spec in specs]
    wide, lean = measure_speed(models, torch.arange(2, 290), context=288, new_tokens=3, rounds=1)
    assert wide.kv_bytes is not None and lean.kv_bytes is not None
    assert lean.kv_bytes < wide.kv_bytes / 3


def test_generation_is_generate(folder: Path) -> None:
    loaded = load(parse_spec(f"{folder}/source@eager"))
    found = measure_generation([loaded], ["the fox", "a dog"], new_tokens=6, chat=False)[0]
    for prompt, tokens in zip(found.prompts, found.tokens, strict=True):
        ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = loaded.model.generate(ids, max_new_tokens=6, do_sample=False)
        assert tokens == tuple(expected[0, ids.shape[1] :].tolist())
    assert found.diverged_at == (None, None)


def test_chat_template(folder: Path) -> None:
    tokenizer = load(parse_spec(str(folder / "source"))).tokenizer
    with pytest.raises(ValueError, match="chat template"):
        encode_prompt(tokenizer, "hello", chat=True)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    plain, chat = (encode_prompt(tokenizer, "hello", c)["input_ids"] for c in (False, None))
    assert tokenizer.decode(chat[0]) == "<hello>"
    assert tokenizer.decode(plain[0]) == "hello"


class TestRefused:
    def compare(self, folder: Path, *candidates: str, **changes: object) -> None:
        options = {"text": folder / "text.txt", "max_tokens": 50, "new_tokens": 0, "rounds": 0}
        compare(str(folder / "source"), candidates, CompareOptions(**(options | changes)))  # type: ignore[arg-type]

    def test_no_candidate(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="candidate"):
            self.compare(folder)

    def test_absent_model(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="cannot read"):
            self.compare(folder, str(folder / "ghost"))

    def test_unknown_implementation(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="triton_fa9"):
            self.compare(folder, f"{folder}/source@triton_fa9")

    def test_other_tokenizer(self, folder: Path, tmp_path: Path) -> None:
        other = tiny_checkpoint(tmp_path / "other", tokenizer=True)
        file = other / "tokenizer.json"
        data = json.loads(file.read_text())
        vocab = data["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        file.write_text(json.dumps(data))
        with pytest.raises(ValueError, match="tokenize differently"):
            self.compare(folder, str(other))

    def test_other_vocabulary(self, folder: Path, tmp_path: Path) -> None:
        other = load(parse_spec(str(folder / "source")))
        other.model.resize_token_embeddings(310)
        other.model.save_pretrained(tmp_path / "wide")
        with pytest.raises(ValueError, match="vocabulary"):
            self.compare(folder, str(tmp_path / "wide"))

    @pytest.mark.parametrize(
        "content", [None, b"", b"\xff\xfe\x00"], ids=["absent", "empty", "binary"]
    )
    def test_bad_text(self, content: bytes | None, folder: Path, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / "t.txt").write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.txt"):
            self.compare(folder, str(folder / "mqa"), text=tmp_path / "t.txt")

    def test_text_shorter_than_a_window(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "t.txt").write_text("too short")
        with pytest.raises(ValueError, match="less than one window of 50"):
            self.compare(folder, str(folder / "mqa"), text=tmp_path / "t.txt")

    def test_no_prompts(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "p.txt").write_text(" \n\n")
        with pytest.raises(ValueError, match=r"p\.txt is empty"):
            self.compare(folder, str(folder / "mqa"), prompts=tmp_path / "p.txt")

    def test_a_stride_as_long_as_the_window(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="got stride 64, window 64"):
            self.compare(folder, str(folder / "mqa"), window=64, stride=64)

    def test_more_positions_than_there_are(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="positions, not the"):
            self.compare(folder, str(folder / "mqa"), rounds=1, context=10**6)

    def test_an_encoder_and_a_decoder(self, folder: Path, tmp_path: Path) -> None:
        other = tiny_checkpoint(tmp_path / "bert", family="bert", tokenizer=True)
        with pytest.raises(ValueError, match="nothing to compare"):
            self.compare(folder, str(other))

    def test_an_encoder_decoder(self, folder: Path, tmp_path: Path) -> None:
        other = tiny_checkpoint(tmp_path / "t5", family="t5", tokenizer=True)
        with pytest.raises(ValueError, match="encoder-decoder"):
            self.compare(folder, str(other))

    def test_tasks_without_the_harness(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match="lm-evaluation-harness"):
            self.compare(folder, str(folder / "mqa"), tasks=("arc_easy",))

    def test_unknown_dtype(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="float8"):
            self.compare(folder, str(folder / "mqa"), dtype="float8")

    def test_negative_sizes(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="max_tokens"):
            CompareOptions(text=folder / "text.txt", max_tokens=-1)
