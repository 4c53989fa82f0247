"""The whole comparison: specs, generation, speed, report, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import tiny_checkpoint

from hf_attn_converters import convert
from hf_attn_patch.compare import (
    CompareOptions,
    Comparison,
    ModelSpec,
    compare,
    markdown,
    parse_spec,
    table,
    verdicts,
)
from hf_attn_patch.compare.generation import encode_prompt, first_difference, measure_generation
from hf_attn_patch.compare.models import labels, load
from hf_attn_patch.compare.report import number
from hf_attn_patch.compare.speed import measure_speed
from hf_attn_patch.compare.text import read_prompts

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
    assert all(len(row) == len(header) for row in rows)
    assert [row[0] for row in rows] == ["source@eager", "source@triton_fa2", "mha", "mqa"]
    assert rows[1][header.index("greedy same")] == "8 of 8"
    page = markdown(result, "Title")
    assert page.startswith("## Title")
    assert all(line in page for line in verdicts(result))
    assert "KV cache × 2.00" in verdicts(result)[1]
    assert "⟦" in page.split("### Greedy continuations")[1]
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_parts_can_be_left_out(folder: Path) -> None:
    options = CompareOptions(text=folder / "text.txt", max_tokens=0, new_tokens=0, rounds=0)
    result = compare(f"{folder}/source", [f"{folder}/mqa"], options)
    assert not (result.quality or result.generation or result.speed)
    assert table(result)[0] == ["model"]
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


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1, 2), (1,), 1), ((), (), None), ((), (4,), 0)],
)
def test_first_difference(a: tuple[int, ...], b: tuple[int, ...], expected: int | None) -> None:
    assert first_difference(a, b) == first_difference(b, a) == expected


class TestSpecs:
    def test_forms(self) -> None:
        assert parse_spec("a/b") == ModelSpec(path="a/b")
        assert parse_spec("a/b@sdpa") == ModelSpec(path="a/b", implementation="sdpa")
        spec = parse_spec("m@triton_swa:window=256:sinks=4")
        assert spec == ModelSpec(path="m", implementation="triton_swa", window=256, sinks=4)
        assert spec.label == "m@triton_swa:window=256:sinks=4"

    def test_a_folder_with_an_at_sign(self, tmp_path: Path) -> None:
        folder = tmp_path / "model@v2"
        folder.mkdir()
        assert parse_spec(str(folder)) == ModelSpec(path=str(folder))
        assert parse_spec(f"{folder}@sdpa") == ModelSpec(path=str(folder), implementation="sdpa")

    @pytest.mark.parametrize(
        "text",
        ["m@", "@sdpa", "m@triton_swa:window", "m@triton_swa:width=3", "m@triton_swa:window=-1",
         "m@sdpa:window=3", "m@triton_swa:sinks=3"],
    )  # fmt: skip
    def test_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"m@|@sdpa"):
            parse_spec(text)

    def test_labels_differ(self) -> None:
        specs = [ModelSpec(path=p) for p in ("a/m", "b/m", "c/m")]
        assert labels(specs) == ["m", "m #2", "m #3"]


class TestRefused:
    def compare(self, folder: Path, *candidates: str, **changes: object) -> None:
        options = {"text": folder / "text.txt", "max_tokens": 50, "new_tokens": 0, "rounds": 0}
        compare(str(folder / "source"), candidates, CompareOptions(**(options | changes)))  # type: ignore[arg-type]

    def test_no_candidate(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="candidate"):
            self.compare(folder)

    def test_absent_model(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="cannot load"):
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

    def test_unknown_dtype(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="float8"):
            self.compare(folder, str(folder / "mqa"), dtype="float8")

    def test_negative_sizes(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="max_tokens"):
            CompareOptions(text=folder / "text.txt", max_tokens=-1)


def test_prompts_one_per_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\n  two  \n")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0"), (1e-9, "<1e-6"), (2e-5, "2.0e-05"), (0.1234, "0.123"),
     (9.957, "9.957"), (138240.0, "138,240"), (float("inf"), "inf")],
)  # fmt: skip
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text
