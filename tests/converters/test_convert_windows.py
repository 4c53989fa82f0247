"""Text as the model meets it at inference: windows begin with BOS, own text needs a head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import byte_tokenizer, load, tiny_checkpoint
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from hf_attn_converters import convert, verify_output
from hf_attn_converters.calibration import Calibration
from hf_attn_converters.calibration.tokens import RANDOM_TOKENS, SELF_GENERATED, calibration_tokens
from hf_attn_converters.heads.plan import plan_conversion
from hf_attn_converters.io.special_tokens import TextEnds, text_ends
from hf_attn_converters.layerwise import source_model
from hf_attn_converters.uptrain.data import Packer, Piece
from hf_attn_converters.uptrain.models import load_model
from hf_attn_patch.cli import app
from hf_attn_patch.compare.text import sliding_windows
from hf_attn_patch.loading import load as load_compared
from hf_attn_patch.loading import parse_spec

BOS, EOS = 0, 1


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer, which puts around a text what `template` says."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("$A", TextEnds()),
        ("<s> $A", TextEnds((BOS,))),
        ("<s> $A </s>", TextEnds((BOS,), (EOS,))),
        ("<s> </s> $A", TextEnds((BOS, EOS))),
    ],
)
def test_text_ends(template: str, expected: TextEnds) -> None:
    assert text_ends(tokenizer_with(template)) == expected


def tokens_of(folder: Path, **options: Any) -> Any:
    work = plan_conversion(folder, folder.parent / "x", num_key_value_heads=1, method="csvd")
    settings = Calibration(tokens=160, sequence_length=16, **options)
    return calibration_tokens(settings, source_model(work), lambda *a: None)


@pytest.mark.parametrize("words", [100, 5000], ids=["short", "long"])
@pytest.mark.parametrize(
    ("template", "begin", "end"),
    [("$A", [], []), ("<s> $A", [BOS], []), ("<s> $A </s>", [BOS], [EOS])],
)
def test_every_window_begins_as_a_text_does(
    template: str, begin: list[int], end: list[int], words: int, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    tokenizer_with(template).save_pretrained(folder)
    text = tmp_path / "a.txt"
    text.write_text("a" * words)
    letter = byte_tokenizer()("a")["input_ids"]
    found = tokens_of(folder, text=text)
    inner = 16 - len(begin) - len(end)
    rows = min(10, words // inner)
    assert found.ids.tolist() == [begin + letter * inner + end] * rows
    assert (found.begin, found.end) == ("<s>" * len(begin), "</s>" * len(end))


def test_random_tokens_begin_so_too(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "a", family="bert", kv_heads=4)
    tokenizer_with("<s> $A </s>").save_pretrained(folder)
    found = tokens_of(folder)
    assert found.ids.shape == (10, 16)
    assert (found.ids[:, 0] == BOS).all() and (found.ids[:, -1] == EOS).all()
    assert found.origin.startswith(RANDOM_TOKENS)


def test_own_text_begins_with_all_that_a_text_begins_with(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    tokenizer_with("<s> </s> $A").save_pretrained(folder)
    found = tokens_of(folder)
    assert found.origin == SELF_GENERATED and found.begin == "<s> </s>"
    assert found.ids.shape == (10, 16) and found.ids[:, :2].tolist() == [[BOS, EOS]] * 10


def sink_checkpoint(folder: Path) -> Path:
    """A tiny llama whose attention rests on BOS.

    Hidden state 0 is large for BOS and 0 for all else; k_proj turns it into a key that every
    query likes, because a bias that q_proj lacks is hidden state 1, the same for all tokens.
    """
    tiny_checkpoint(folder, heads=4, kv_heads=4, layers=2, tie=False, head_dim=8)
    tokenizer_with("<s> $A").save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 0] = 0.0
    embedding[:, 1] = 0.1
    embedding[BOS] *= 0.1
    embedding[BOS, 0] = 1.0
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"{prefix}{part}.weight"][:2] = 0.0  # nothing writes there
        for head in range(4):
            # the slowest rotary pair, dimensions 3 and 7, hardly turns
            tensors[f"{prefix}self_attn.k_proj.weight"][8 * head + 3, 0] = 1.5 + head / 4
            tensors[f"{prefix}self_attn.q_proj.weight"][8 * head + 3, 1] = 2.0
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def bos_share(folder: Path, ids: torch.Tensor) -> float:
    """Of the attention of all heads and layers, how much goes to the first token."""
    maps = load(folder, attn_implementation="eager")(ids, output_attentions=True).attentions
    return torch.stack([weights[:, :, 8:, 0].mean() for weights in maps]).mean().item()


@torch.inference_mode()
def test_calibrated_with_bos_loses_less(tmp_path: Path) -> None:
    """The same text and weights; the control's tokenizer puts no BOS in front."""
    source = sink_checkpoint(tmp_path / "source")
    draw = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (40_000,), generator=draw).tolist()
    (tmp_path / "words.txt").write_text("".join(map(chr, letters)))
    fresh = torch.randint(97, 123, (400,), generator=draw).tolist()
    ids = torch.tensor([[BOS, *byte_tokenizer()("".join(map(chr, fresh)))["input_ids"]]])
    assert bos_share(source, ids[:, :64]) > 0.15
    theirs = load(source)(ids).logits.double().log_softmax(-1)

    settings = Calibration(text=tmp_path / "words.txt", tokens=8192, sequence_length=64)
    kl = {}
    for name, template in (("with", "<s> $A"), ("without", "$A")):
        tokenizer_with(template).save_pretrained(source)
        output = tmp_path / name
        convert(source, output, num_key_value_heads=2, method="csvd", calibration=settings)
        ours = load(output)(ids).logits.double().log_softmax(-1)
        kl[name] = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
        record = json.loads((output / "conversion.json").read_text())["calibration"]
        card = (output / "README.md").read_text()
        if name == "with":
            assert record["windows_begin_with"] == "<s>" and "windows begin with `<s>`" in card
        else:
            assert record["windows_begin_with"] == ""
            assert "windows begin with no special token" in card
    assert kl["with"] < 0.5 * kl["without"], kl


def headless(folder: Path, kind: Any, *, tie: bool) -> Path:
    """A llama saved as a class without a language model's head."""
    whole = tiny_checkpoint(folder / "whole", kv_heads=4, tie=tie, tokenizer=True)
    path = folder / "source"
    kind.from_pretrained(whole).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_model_without_a_head_writes_no_text(kind: Any, tmp_path: Path) -> None:
    source = headless(tmp_path, kind, tie=False)
    found = tokens_of(source)
    assert found.origin.startswith(RANDOM_TOKENS)
    assert "no language model's head (lm_head.weight)" in found.origin
    text = tmp_path / "a.txt"
    text.write_text("a" * 5000)
    with pytest.raises(ValueError, match=r"own_text is 0.5.*no language model's head"):
        tokens_of(source, text=text, own_text=0.5)
    options = ("-n", "2", "--method", "csvd", "--calibration-tokens", "1024")
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "b"), *options])
    assert result.exit_code == 0, result.stderr
    assert "random tokens (the source writes no text" in result.stdout
    record = json.loads((tmp_path / "b" / "conversion.json").read_text())["calibration"]
    assert SELF_GENERATED not in record["origin"]


def test_tied_embeddings_are_a_head(tmp_path: Path) -> None:
    source = headless(tmp_path, LlamaModel, tie=True)
    found = tokens_of(source)
    assert found.origin == SELF_GENERATED
    assert torch.equal(found.ids, tokens_of(tmp_path / "whole").ids)


def without_head(folder: Path) -> Path:
    """A LlamaForCausalLM whose checkpoint lacks the head that its config names."""
    source = tiny_checkpoint(folder / "source", kv_heads=2, tie=False)
    path = source / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    return source


def test_verify_compares_hidden_states_where_the_head_is_missing(tmp_path: Path) -> None:
    """Random heads differ from one loading to the next: an exact conversion seemed wrong."""
    source = without_head(tmp_path)
    result = CliRunner().invoke(
        app, ["convert", str(source), str(tmp_path / "b"), "-n", "4", "--verify"]
    )
    assert result.exit_code == 0, result.stderr
    assert "all tensors load but lm_head.weight, which the source lacks too" in result.stdout
    found = json.loads((tmp_path / "b" / "conversion.json").read_text())["verification"]
    assert found["source_lacks"] == ["lm_head.weight"]
    assert found["kl"] is None and found["top1"] is None
    assert found["cosine"] == pytest.approx(1, abs=1e-6)


def test_verify_still_finds_what_is_wrong_then(tmp_path: Path) -> None:
    source = without_head(tmp_path)
    convert(source, tmp_path / "b", num_key_value_heads=4)
    work = plan_conversion(source, tmp_path / "c", num_key_value_heads=4, method="mean")
    path = tmp_path / "b" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"] *= -1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="1 - cosine"):
        verify_output(work, tmp_path / "b")


def test_verify_with_a_tensor_of_the_trunk_missing(tmp_path: Path) -> None:
    """Drawn at random in both models: they must get the same numbers to be compared."""
    source = tiny_checkpoint(tmp_path / "source", kv_heads=2)
    path = source / "model.safetensors"
    tensors = load_file(path)
    lacking = "model.layers.0.mlp.up_proj.weight"
    del tensors[lacking]
    save_file(tensors, path, metadata={"format": "pt"})
    done = convert(source, tmp_path / "b", num_key_value_heads=4, verify=True).verification
    assert done is not None and done.source_lacks == (lacking,)
    assert done.cosine == pytest.approx(1, abs=1e-6)


def test_a_random_head_is_neither_compared_nor_trained(tmp_path: Path) -> None:
    source = without_head(tmp_path)
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        load_compared(parse_spec(str(source)))
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        load_model(source, "auto", None)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_windows_of_a_comparison_begin_with_bos(before: int) -> None:
    """Each begins with the special tokens; what is scored is the same as without."""
    tokens = torch.arange(100, 150)
    pieces = list(sliding_windows(tokens, window=12, stride=5, before=before))
    scored: list[int] = []
    for piece in pieces:
        assert len(piece.tokens) <= 12
        assert piece.tokens[:before].tolist() == list(range(100, 100 + before))
        body = piece.tokens[before:].tolist()
        assert body == list(range(body[0], body[-1] + 1))
        assert piece.scored <= len(piece.tokens) - max(1, before)
        scored += piece.tokens[-piece.scored :].tolist()
    assert scored == list(range(100 + max(1, before), 150))
    plain = sliding_windows(tokens, window=12, stride=5)
    if before < 2:
        assert [p.scored for p in plain] == [p.scored for p in pieces]
    with pytest.raises(ValueError, match="stride"):
        next(sliding_windows(tokens, window=12, stride=12 - max(0, before - 1), before=before))


def test_rows_of_training_begin_with_bos(tmp_path: Path) -> None:
    packer = Packer(tokenizer_with("<s> $A"), 8)
    letter = byte_tokenizer()("a")["input_ids"][0]
    with (tmp_path / "rows").open("wb") as file:
        packer.write(Piece("a" * 10, begins=True, ends=False), file, 10)
        packer.write(Piece("a" * 12, begins=False, ends=False), file, 10)
    rows = torch.frombuffer(bytearray((tmp_path / "rows").read_bytes()), dtype=torch.int32)
    first = [~BOS, *[letter] * 7]
    # 3 letters are left of the first piece, then comes the second
    assert rows.view(-1, 8).tolist() == [first, [~BOS, *[letter] * 3, ~BOS, *[letter] * 3], first]
