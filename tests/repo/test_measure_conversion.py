"""The quality table: no text serves twice, measures measure, and methods rank as they must."""

from __future__ import annotations

import csv
import itertools
import json
import re
import textwrap
from dataclasses import replace
from pathlib import Path

import fetch_checkpoint
import pytest
import torch
from experiments import measure_conversion
from measure import reactions, texts
from measure.encoders import embedding_scores, masked_rows, masked_scores
from measure.language import spread_windows
from measure.scores import COLUMNS, Measured, Scores, append
from measure.subjects import SUBJECTS

from hf_attn_converters import convert

ROOT = Path(__file__).resolve().parents[2]
SPEECH = ROOT / "examples" / "text" / "state_of_the_union.txt"
FIXTURE = ROOT / "tests" / "fixtures" / "tiny-llama-mha"

# --- texts ----------------------------------------------------------------------------------------


def test_a_held_out_part_is_a_tenth_and_lies_apart():
    lines = [f"line-{i}-of-a-text\n" for i in range(20_000)]
    kept, held_out = (part.splitlines(keepends=True) for part in texts.split("".join(lines)))
    assert sorted(kept + held_out) == sorted(lines)
    assert 0.09 < len(held_out) / len(lines) < 0.11
    numbers = [int(line.split("-")[1]) for line in held_out]
    pieces = 1 + sum(b - a > 1 for a, b in itertools.pairwise(numbers))
    assert pieces == 40  # from all over the text


def test_a_text_without_lines_is_not_lost():
    assert texts.split("no end of line") == ("no end of line", "")


def test_sentences_are_whole_and_different():
    long = "This one has exactly nine words, like the next."
    found = texts.sentences(
        f"Too short. {long}\n{long} Is this sentence, over\ntwo lines, found too?"
    )
    assert found == [long, "Is this sentence, over two lines, found too?"]
    with pytest.raises(ValueError, match="2 sentences, 3 are needed"):
        texts.spread(found, 3, "sentences")
    assert texts.spread(list("abcdef"), 3, "letters") == ["a", "c", "e"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", None], ids=["empty", "no-utf8", "absent"])
def test_unreadable_text(tmp_path, content):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="text"):
        texts.read_plain(path)


def test_packed_text_is_read(tmp_path):
    import lzma

    (tmp_path / "a.xz").write_bytes(lzma.compress("wörter".encode()))
    assert texts.read_plain(tmp_path / "a.xz") == "wörter"


# --- reactions ------------------------------------------------------------------------------------


def test_reactions_are_well_formed_and_held_out_by_carrier():
    kept, held_out = reactions.composed(2000, seed=0)
    assert len(kept) == 2000 and len(held_out) == 200 and not set(kept) & set(held_out)
    for line in kept + held_out:
        before, after = line.split(">>")
        for molecule in [*before.split("."), after]:
            assert molecule.count("(") == molecule.count(")") and "*" not in molecule
            bare = re.sub(r"\[[^\]]+\]", "", molecule)
            for digit in set(re.findall(r"\d", bare)):
                assert bare.count(digit) % 2 == 0, molecule  # every ring is closed


def test_a_groups_rings_do_not_close_the_carriers():
    assert reactions.put("c1ccc(*)cc1", "C(=O)NCc1ccccc1") == "c1ccc(C(=O)NCc2ccccc2)cc1"
    assert reactions.put("CC*", "N1CCOCC1") == "CCN1CCOCC1"


def test_reactions_are_masked_token_by_token():
    line = "Brc1ccccc1.[Na+]>>C%12" * 40
    tokens = re.findall(reactions.SMILES_TOKEN, line)
    assert tokens[:2] == ["Br", "c"] and {"[Na+]", ">>", "%12"} < set(tokens)
    seen = reactions.as_trained([line], seed=0)
    share = seen.count("[MASK]") / len(tokens)
    assert seen.startswith("[CLS]") and seen.endswith("[SEP]") and 0.1 < share < 0.2


# --- measures -------------------------------------------------------------------------------------

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *["the", "fox", "a", "dog", "sees", "and", "runs", "home"],
]


@pytest.fixture
def encoder(tmp_path):
    """Makes a tiny encoder of a kind, with a tokenizer."""

    def make(kind: str) -> Path:
        import transformers
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        folder = tmp_path / kind
        torch.manual_seed(0)
        sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 32}
        config = getattr(transformers, f"{kind}Config")(
            num_hidden_layers=2, num_attention_heads=4, initializer_range=0.5, **sizes
        )
        getattr(transformers, f"{kind}ForMaskedLM")(config).save_pretrained(folder)
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names = {f"{n}_token": f"[{n.upper()}]" for n in ("unk", "cls", "sep", "pad", "mask")}
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(
            folder
        )
        return folder

    return make


def ignore(done: int, total: int) -> None:
    assert 0 < done <= total


def test_each_token_is_masked_in_turn(encoder):
    from transformers import AutoTokenizer

    rows, places, truth = masked_rows(AutoTokenizer.from_pretrained(encoder("Bert")), "the fox")
    assert rows.tolist() == [[2, 4, 6, 3], [2, 5, 4, 3]]
    assert places.tolist() == [1, 2] and truth.tolist() == [5, 6]


def test_a_masked_model_is_like_itself_and_unlike_a_merged_one(encoder, tmp_path):
    source = encoder("Albert")
    convert(source, tmp_path / "out", num_key_value_heads=1, method="first")
    text = "the fox sees a dog\nthe dog runs home and sees the fox"
    same, other = masked_scores(source, [source, tmp_path / "out"], text, 2, ignore)
    assert same.tokens == 13 and same.kl == pytest.approx(0, abs=1e-6) and same.top1 == 1
    assert same.ppl == same.source_ppl == other.source_ppl
    assert same.accuracy == same.accuracy_source and other.kl > 0.01


def test_embeddings_are_like_themselves_and_unlike_merged_ones(encoder, tmp_path):
    source = encoder("Bert")
    convert(source, tmp_path / "out", num_key_value_heads=1, method="first")
    # of several lengths, so that some are padded
    text = "the fox sees a dog and runs home and home.\na dog sees the fox and a dog runs."
    same, other = embedding_scores(source, [source, tmp_path / "out"], text, 2, ignore)
    assert same.cosine == pytest.approx(1, abs=1e-6) and other.cosine < 0.999
    assert same.tokens == 2 + 2 + 11 + 10  # the ends of two sentences, and a full stop each


def test_windows_are_spread_and_never_overlap():
    class Letters:
        def __call__(self, text, **kwargs):
            return {"input_ids": [ord(letter) for letter in text]}

    text = "\n".join(chr(200 + i) * 40 for i in range(12))
    windows = spread_windows(Letters(), text, size=96, length=32)
    firsts = [int(window.tokens[0]) - 200 for window in windows]
    assert firsts == [1, 4, 8] and all(window.scored == 31 for window in windows)
    with pytest.raises(ValueError, match="too short for 16 windows"):
        spread_windows(Letters(), text, size=512, length=32)


# --- rows -----------------------------------------------------------------------------------------

ROW = Measured(
    subject="s", kv_before=4, kv_after=1, method="mean", calibration="", calibration_tokens=None,
    sequence_length=None, steps=None, attention_lr=None, other_lr=None, text="t", seconds=1.5,
    scores=Scores(tokens=9, source_ppl=2.0, ppl=5.0, kl=0.25),
)  # fmt: skip


def test_rows_are_appended_under_one_header(tmp_path):
    path = tmp_path / "results" / "x.csv"
    append(path, [ROW])
    append(path, [replace(ROW, kv_after=2)])
    rows = list(csv.DictReader(path.open()))
    assert [row["kv_after"] for row in rows] == ["1", "2"] and tuple(rows[0]) == COLUMNS
    assert rows[0]["ratio"] == "2.5" and rows[0]["cosine"] == "" and rows[0]["torch"]
    path.write_text("other,columns\n")
    with pytest.raises(ValueError, match="other columns"):
        append(path, [ROW])


# --- the fixture ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[tuple[str, str], dict[str, str]]:
    """The fixture from 8 KV heads to 2: (text, method) -> row."""
    folder = tmp_path_factory.mktemp("measured")
    out, text = folder / "rows.csv", folder / SPEECH.name
    text.write_text(textwrap.fill(SPEECH.read_text(), 100))  # lines, where parts can be held out
    small = ["--tokens", "8192", "--steps", "32", "--eval-size", "1024", "--kv", "2"]
    methods = ["--methods", "mean,csvd,csvd+fit"]
    arguments = ["fixture", "--text", str(text), "--out", str(out), "--json", *small, *methods]
    assert measure_conversion.main(arguments) == 0
    return {(row["text"], row["method"]): row for row in csv.DictReader(out.open())}


@pytest.mark.parametrize("text", [f"{SPEECH.name} held out", "python docs"])
def test_methods_rank_as_they_must(measured, text):
    kl = {method: float(measured[text, method]["kl"]) for method in ("mean", "csvd", "csvd+fit")}
    assert kl["csvd+fit"] < 0.9 * kl["csvd"] and kl["csvd"] < 0.7 * kl["mean"], kl


def test_rows_say_how_they_came_about(measured):
    mean, fit = (measured["python docs", method] for method in ("mean", "csvd+fit"))
    assert (mean["calibration"], mean["calibration_tokens"], mean["steps"]) == ("", "", "")
    assert (fit["calibration"], fit["calibration_tokens"]) == (SPEECH.name, "8192")
    assert (fit["kv_before"], fit["kv_after"], fit["steps"]) == ("8", "2", "32")
    assert mean["source_ppl"] == fit["source_ppl"] and mean["tokens"] == str(4 * 255)


def test_the_fixture_is_small_and_knows_its_text(measured):
    assert sum(path.stat().st_size for path in FIXTURE.iterdir()) <= 8e6
    about = json.loads((FIXTURE / "training.json").read_text())
    # far below the 2048 of one that knows nothing
    assert float(measured[f"{SPEECH.name} held out", "mean"]["source_ppl"]) < 100
    assert about["last_loss"] < 4


# --- misuse, and the packages ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--methods", "median"], "unknown merge method 'median'"),
        (["--kv", "two"], "--kv takes numbers"),
        (["--kv", "3"], "3"),
        (["--eval", "file"], "NAME=FILE"),
        (["--text", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--checkpoint", "nowhere"], "train_fixture.py"),
    ],
)
def test_misuse(capsys, arguments, complaint):
    assert measure_conversion.main(["fixture", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error and "Traceback" not in error


def test_every_subject_can_be_chosen_and_every_package_is_pinned():
    assert tuple(SUBJECTS) == measure_conversion.SUBJECTS
    for package in fetch_checkpoint.PACKAGES.values():
        assert len(fetch_checkpoint.pinned_hash(package)) == 64
    pins = [line for line in fetch_checkpoint.PINNED.read_text().splitlines() if "==" in line]
    assert len(pins) == len(fetch_checkpoint.PACKAGES)
