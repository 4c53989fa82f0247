"""Encoders: masked tokens, embeddings and their neighbourhoods, against slow computations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import tiny_checkpoint
from transformers import AutoTokenizer

from hf_attn_converters import convert
from hf_attn_patch.compare import CompareOptions, Comparison, compare, markdown, verdicts
from hf_attn_patch.compare.encoders import (
    MASKED,
    masked_rows,
    neighbour_agreement,
    spearman,
    spread_sentences,
)
from hf_attn_patch.loading import MASKED as MASKED_LM
from hf_attn_patch.loading import load, parse_spec

TEXT = " ".join(f"The fox number {i} jumps over {i % 7} lazy dogs." for i in range(60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    source = tiny_checkpoint(folder / "bert", family="bert", tokenizer=True)
    with_mask(source)
    convert(source, folder / "merged", num_key_value_heads=1, method="mean")
    (folder / "text.txt").write_text(TEXT)
    return folder


def with_mask(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def result(folder: Path) -> Comparison:
    options = CompareOptions(
        text=folder / "text.txt", max_tokens=600, rounds=1, context=20, batches=(2,)
    )
    return compare(f"{folder}/bert", [f"{folder}/bert", f"{folder}/merged"], options)


def test_an_encoder_is_identical_to_itself_and_not_to_a_merged_one(result: Comparison) -> None:
    itself, merged = verdicts(result)
    assert itself.grade.words == "is identical to"
    assert merged.grade.words != "is identical to"
    same, other = result.encoders[1:]
    assert (same.kl_mean, same.loss_difference, same.top1, same.cosine) == (0, 0, 1, 1)
    assert same.spearman == pytest.approx(1) and same.neighbours == 1
    assert other.kl_mean is not None and other.kl_mean > 0
    assert other.cosine is not None and other.cosine < 1
    assert not (result.quality or result.generation)


def test_an_encoder_has_one_pass_and_no_cache(result: Comparison) -> None:
    for speed in result.speed:
        assert (speed.decode_tokens_s, speed.kv_bytes, speed.new_tokens) == (None, None, 0)
        assert speed.prefill_tokens_s > 0
    page = markdown(result)
    assert "embedding cosine" in page and "KV B/token" not in page and "decode" not in page


@torch.inference_mode()
def test_the_loss_is_transformers_own(folder: Path, result: Comparison) -> None:
    loaded = load(parse_spec(f"{folder}/bert"), kind=MASKED_LM)
    rows = masked_rows(loaded.tokenizer, TEXT, 600)
    assert rows.masked.float().mean().item() == pytest.approx(MASKED, abs=0.04)
    assert (rows.ids[rows.masked] == loaded.tokenizer.mask_token_id).all()
    labels = torch.full_like(rows.ids, -100)
    labels[rows.masked] = rows.truth
    expected = loaded.model(input_ids=rows.ids, labels=labels).loss.item()
    assert result.encoders[0].loss == pytest.approx(expected, rel=1e-5)
    assert result.encoders[0].masked_tokens == len(rows.truth)


def test_spearman_by_ranks() -> None:
    a = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0])
    assert spearman(a, a**3) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    b = torch.tensor([2.0, 7.0, 1.0, 8.0, 2.0])
    x, y = torch.tensor([3, 1.5, 4, 1.5, 5]), torch.tensor([2.5, 4, 1, 5, 2.5])
    assert spearman(a, b) == pytest.approx(torch.corrcoef(torch.stack([x, y]))[0, 1].item())


def test_neighbours_of_rows_in_another_order() -> None:
    torch.manual_seed(0)
    a = torch.randn(40, 8)
    similar = a @ a.T
    assert neighbour_agreement(similar, similar) == 1
    other = torch.randn(40, 8)
    assert neighbour_agreement(similar, other @ other.T) < 0.5  # the control: 10 of 39 by chance


def test_texts_that_are_too_short(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sentences"):
        spread_sentences("One sentence of five words.")
    tokenizer = load(parse_spec(f"{folder}/bert"), kind=MASKED_LM).tokenizer
    with pytest.raises(ValueError, match="a row of masked ones"):
        masked_rows(tokenizer, "too short", 600)
