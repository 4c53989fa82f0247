"""Perplexity and divergence against slow, obvious computations."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import tiny_checkpoint

from hf_attn_patch.compare.divergence import measure_quality
from hf_attn_patch.compare.intervals import BLOCK, block_mean, bootstrap
from hf_attn_patch.compare.overlap import overlap, repetition, rouge_l
from hf_attn_patch.compare.text import (
    Documents,
    prompts_from,
    read_documents,
    sliding_windows,
    tokenize,
    tokenize_documents,
)
from hf_attn_patch.loading import LoadedModel, load, parse_spec

TEXT = " ".join(
    f"Sentence number {i} says what it has to say, and then it ends." for i in range(40)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def models(folder: Path) -> list[LoadedModel]:
    """A source and another model of the same shape."""
    paths = [tiny_checkpoint(folder / f"m{i}", seed=i, tokenizer=True) for i in range(2)]
    return [load(parse_spec(f"{path}@eager")) for path in paths]


@pytest.fixture(scope="module")
def tokens(models: list[LoadedModel]) -> torch.Tensor:
    return tokenize(models[0].tokenizer, TEXT, 300)


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(2, 4, 2), (5, 8, 3), (50, 8, 3), (9, 4, 1)]
)
def test_windows_score_each_token_once(length: int, window: int, stride: int) -> None:
    tokens, scored = torch.arange(length), []
    for i, piece in enumerate(sliding_windows(tokens, window=window, stride=stride)):
        assert len(piece.tokens) <= window
        assert piece.tokens.tolist() == list(range(int(piece.tokens[0]), int(piece.tokens[-1]) + 1))
        if i:
            assert len(piece.tokens) - piece.scored >= min(window - stride, scored[-1])
        scored += piece.tokens[-piece.scored :].tolist()
    assert scored == list(range(1, length))


@pytest.mark.parametrize("stride", [0, 8, 9])
def test_impossible_strides(stride: int) -> None:
    with pytest.raises(ValueError, match="stride"):
        list(sliding_windows(torch.arange(50), window=8, stride=stride))


@torch.inference_mode()
def test_one_window_is_transformers_own_loss(
    models: list[LoadedModel], tokens: torch.Tensor
) -> None:
    found = measure_quality(models, sliding_windows(tokens, window=300, stride=100))
    for quality, loaded in zip(found, models, strict=True):
        loss = loaded.model(tokens[None], labels=tokens[None]).loss.item()
        assert quality.tokens == 299
        assert quality.nll == pytest.approx(loss, rel=1e-5)
        assert quality.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


@torch.inference_mode()
def test_sliding_windows_and_divergence_token_by_token(
    models: list[LoadedModel], tokens: torch.Tensor
) -> None:
    window, stride = 64, 24
    found = measure_quality(models, sliding_windows(tokens, window=window, stride=stride))
    nll: list[list[float]] = [[], []]
    kl, same = [], []
    for t in range(
        1, len(tokens)
    ):  # token t: in the first window, or in the first that ends behind it
        steps = max(0, math.ceil((t + 1 - window) / stride))
        end = min(window + steps * stride, len(tokens))
        begin = max(0, end - window)
        rows = [
            m.model(tokens[None, begin:end]).logits[0, t - 1 - begin].double().log_softmax(0)
            for m in models
        ]
        for i in range(2):
            nll[i].append(-rows[i][tokens[t]].item())
        kl.append((rows[0].exp() * (rows[0] - rows[1])).sum().item())
        same.append(rows[0].argmax() == rows[1].argmax())
    other, divergence = found[1], torch.tensor(kl, dtype=torch.float64)
    assert found[0].nll == pytest.approx(sum(nll[0]) / len(nll[0]), rel=1e-5)
    assert other.nll == pytest.approx(sum(nll[1]) / len(nll[1]), rel=1e-5)
    assert other.ln_ratio == pytest.approx(other.nll - found[0].nll, rel=1e-4)
    assert other.kl_mean == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert other.kl_p99 == pytest.approx(divergence.quantile(0.99).item(), rel=1e-4)
    assert other.kl_median == pytest.approx(divergence.median().item(), rel=1e-4)
    assert other.top1 == pytest.approx(sum(same) / len(same))
    assert other.kl_mean > 0.01  # the two models do differ


def test_a_model_does_not_diverge_from_itself(
    models: list[LoadedModel], tokens: torch.Tensor
) -> None:
    found = measure_quality([models[0]] * 2, sliding_windows(tokens, window=64, stride=32))
    assert found[0].kl_mean is None
    assert found[1].kl_mean == found[1].kl_max == 0
    assert found[1].ln_ratio == 0
    assert found[1].top1 == 1


def test_nan_logits_are_reported(folder: Path, models: list[LoadedModel]) -> None:
    broken = load(parse_spec(f"{folder / 'm0'}@eager"))
    broken.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(RuntimeError, match="NaN"):
        measure_quality([broken], sliding_windows(torch.arange(2, 40), window=16, stride=8))


def test_block_mean_counts_correlation() -> None:
    """Values that repeat 64 times carry 64 times less information; the error must know."""
    torch.manual_seed(0)
    independent = torch.randn(64 * BLOCK, dtype=torch.float64)
    repeated = torch.randn(64, dtype=torch.float64).repeat_interleave(BLOCK)
    mean, error = block_mean(independent)
    assert mean == pytest.approx(independent.mean().item())
    assert error == pytest.approx(1 / 64, rel=0.3)  # 1 / sqrt(64 · 64)
    assert block_mean(repeated)[1] == pytest.approx(1 / 8, rel=0.3)  # 1 / sqrt(64)
    assert math.isnan(block_mean(torch.ones(1))[1])


def test_bootstrap_draws_whole_units() -> None:
    """Equal values inside a document carry its one draw: the interval must be that of documents."""
    torch.manual_seed(0)
    means = torch.randn(100, dtype=torch.float64)
    units = torch.arange(100).repeat_interleave(50)
    by_document = bootstrap(means.repeat_interleave(50), units)
    by_token = bootstrap(means.repeat_interleave(50), torch.arange(5000))
    assert by_document is not None and by_token is not None
    half = (by_document[1] - by_document[0]) / 2
    assert half == pytest.approx(1.96 * means.std().item() / 10, rel=0.15)
    assert half > 5 * (by_token[1] - by_token[0]) / 2  # the control: sqrt(50) times too narrow
    assert by_document[0] < means.mean().item() < by_document[1]
    assert bootstrap(means, torch.zeros(100)) is None


def test_positions_get_the_mean_of_their_tokens(
    models: list[LoadedModel], tokens: torch.Tensor
) -> None:
    """One window: the means over positions, weighted, are the mean over all tokens."""
    found = measure_quality(models, sliding_windows(tokens, window=300, stride=100))[1]
    bins = found.kl_by_position
    assert [(b.begin, b.end) for b in bins][:3] == [(1, 2), (2, 4), (4, 8)]
    assert bins[-1].end == 300 and sum(b.tokens for b in bins) == 299
    assert sum(b.kl * b.tokens for b in bins) / 299 == pytest.approx(found.kl_mean)


class TestDocuments:
    def test_blank_lines_part(self, tmp_path: Path) -> None:
        (tmp_path / "t.txt").write_text("one\ntwo\n\n  \nthree\n\nfour")
        found = read_documents(tmp_path / "t.txt")
        assert [found.text[i : i + 4] for i in found.starts] == ["one\n", "thre", "four"]

    def test_json_lines(self, tmp_path: Path) -> None:
        (tmp_path / "t.jsonl").write_text('{"text": "one"}\n\n"two\\nlines"\n{"text": "three"}\n')
        found = read_documents(tmp_path / "t.jsonl")
        assert found.text == "one\n\ntwo\nlines\n\nthree"
        assert [found.text[i:][:3] for i in found.starts] == ["one", "two", "thr"]

    @pytest.mark.parametrize("row", ["{", '{"content": "x"}', "[1]", '{"text": 3}'])
    def test_rows_of_another_form(self, row: str, tmp_path: Path) -> None:
        (tmp_path / "t.jsonl").write_text(f'"fine"\n{row}\n')
        with pytest.raises(ValueError, match="line 2"):
            read_documents(tmp_path / "t.jsonl")

    def test_tokens_know_their_document(self, models: list[LoadedModel], tmp_path: Path) -> None:
        tokenizer = models[0].tokenizer
        (tmp_path / "t.txt").write_text("\n\n".join(f"number {i} is here" for i in range(12)))
        documents = read_documents(tmp_path / "t.txt")
        tokens, units, name = tokenize_documents(tokenizer, documents, 400)
        assert name == "documents" and len(units) == len(tokens)
        for i in (0, 5, 11):
            assert f"number {i} is here" in tokenizer.decode(tokens[units == i])
        few = Documents(documents.text, documents.starts[:3])
        assert tokenize_documents(tokenizer, few, 200)[2] == "blocks of tokens"


class TestOverlap:
    def test_rouge_l(self) -> None:
        assert rouge_l(["a", "b", "c", "d"], ["a", "x", "c", "d"]) == pytest.approx(0.75)
        assert rouge_l(["a", "b"], ["b", "a", "c"]) == pytest.approx(0.4)
        assert rouge_l([], []) == 1 and rouge_l(["a"], []) == rouge_l([], ["a"]) == 0

    @given(
        st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7)
    )
    def test_rouge_l_is_the_longest_of_all_subsequences(self, a: list[str], b: list[str]) -> None:
        def parts(words: list[str]) -> set[tuple[str, ...]]:
            return {c for n in range(len(words) + 1) for c in itertools.combinations(words, n)}

        longest = max(len(c) for c in parts(a) & parts(b))
        expected = 2 * longest / (len(a) + len(b)) if a and b else float(a == b)
        assert rouge_l(a, b) == pytest.approx(expected)

    def test_the_same_texts_and_others(self) -> None:
        texts = ["the fox jumps over a dog", "short"]
        same, other = overlap(texts, texts), overlap(["nothing alike", "here"], texts)
        assert (same.rouge_l, same.chrf) == (100, pytest.approx(100))
        assert same.bleu == pytest.approx(100)
        assert other.rouge_l == 0
        assert other.chrf is not None and other.chrf < 30
        assert overlap(["a"], [""]).chrf is None  # there is nothing to be like

    def test_repetition(self) -> None:
        assert repetition([1, 2, 3, 4] * 3) == pytest.approx(5 / 9)
        assert repetition(range(20)) == repetition([1, 1, 1]) == 0


def test_prompts_are_spread_over_the_text() -> None:
    text = " ".join(
        f"Number {i} is a sentence of more than twelve words in all, surely." for i in range(30)
    )
    prompts = prompts_from(text, 3, words=5)
    assert prompts == [f"Number {i} is a sentence" for i in (0, 10, 20)]
    assert prompts_from("short", 3) == ["short"]
