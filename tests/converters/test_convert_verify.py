"""--verify finds what is wrong before the output gets its name; the card says how it was made."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import contents, edit_config, tiny_checkpoint
from transformers import BertConfig, BertForMaskedLM, BertModel
from typer.testing import CliRunner

import hf_attn_converters
from hf_attn_converters import plan_conversion, verify_output
from hf_attn_converters import verify as verify_module
from hf_attn_converters import writer as writer_module
from hf_attn_converters.card import card_text, read_card
from hf_attn_converters.heads.layer import convert_layer
from hf_attn_converters.heads.plan import Work
from hf_attn_patch.cli import app

convert = functools.partial(hf_attn_converters.convert, method="mean")  # needs no data

K0 = "model.layers.0.self_attn.k_proj.weight"


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["convert", "--method", "mean", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_an_exact_conversion(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=2, tokenizer=True)
    code, out, err = run(source, tmp_path / "b", "-n", 4, "--verify", "--json")
    assert code == 0, err
    found = json.loads(out)["verification"]
    assert found["kl"] < 1e-9
    assert found["top1"] == 1
    assert found["round_trip"] == "bit-equal"
    assert found["tokens"] == 256
    assert found["text"] == "built-in"
    assert json.loads((tmp_path / "b" / "conversion.json").read_text())["verification"] == found
    assert "top1 1" in (tmp_path / "b" / "README.md").read_text()


def test_a_merge_is_measured(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4, tokenizer=True)
    (tmp_path / "own.txt").write_text("Call me Ishmael.")
    options = ("--verify", "--verify-text", tmp_path / "own.txt")
    code, out, err = run(source, tmp_path / "b", "-n", 1, *options)
    assert code == 0, err
    assert "16 tokens (own.txt)" in out
    found = json.loads((tmp_path / "b" / "conversion.json").read_text())["verification"]
    assert found["kl"] > 1e-3
    assert found["round_trip"] == "none: heads were merged"


def test_kl_and_top1_are_what_they_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch's own KL, on the logits of both models."""
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    seen: list[torch.Tensor] = []
    original = verify_module._run

    def watched(*args: object, **kwargs: object) -> tuple[torch.Tensor, bool, object]:
        found = original(*args, **kwargs)
        seen.append(found[0])
        return found

    monkeypatch.setattr(verify_module, "_run", watched)
    result = convert(source, tmp_path / "b", num_key_value_heads=1, verify=True).verification
    p, q = (x.double().log_softmax(-1) for x in seen)
    assert result.text == "random tokens"
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert result.kl == pytest.approx(expected.item(), rel=1e-9)
    assert result.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean()


def test_wrong_heads_never_get_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: K heads in another order, everything else right."""
    source = tiny_checkpoint(tmp_path / "a", kv_heads=2, shard_size="10KB")

    def rolled(work: Work, layer: int) -> dict[str, torch.Tensor]:
        done = convert_layer(work, layer)
        return {n: t.roll(8, 0) if "k_proj" in n else t for n, t in done.items()}

    monkeypatch.setattr(writer_module, "convert_layer", rolled)
    code, _, err = run(source, tmp_path / "b", "-n", 4, "--verify")
    assert code == 1
    assert "does not come back" in err
    assert not (tmp_path / "b").exists()
    monkeypatch.setattr(verify_module, "_round_trip", lambda work, folder: "not asked")
    code, _, err = run(source, tmp_path / "b", "-n", 4, "--verify")
    assert code == 1
    assert "an exact conversion differs from its source" in err


def drop_norm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "model.norm.weight"}, folder / "x")
    (folder / "x").replace(folder / "model.safetensors")


def add_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.ghost.weight": torch.ones(2)}, folder / "x")
    (folder / "x").replace(folder / "model.safetensors")


def set_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "x")
    (folder / "x").replace(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "says", "accelerate"),
    [
        (drop_norm, "missing keys: model.norm.weight", True),
        (drop_norm, "missing keys: model.norm.weight", False),
        (add_tensor, "unexpected keys: model.ghost.weight", True),
        (lambda f: edit_config(f, intermediate_size=40), "mismatched keys", True),
        (lambda f: edit_config(f, num_hidden_layers=3), "missing keys", True),
        (set_nan, "not finite", True),
    ],
    ids=["missing", "no-accelerate", "unexpected", "mismatched", "layers", "nan"],
)
def test_faults_are_found(
    spoil: Callable[[Path], object],
    says: str,
    accelerate: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    work = plan_conversion(source, tmp_path / "b", num_key_value_heads=1, method="mean")
    convert(source, tmp_path / "b", num_key_value_heads=1)
    if not accelerate:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert verify_output(work, tmp_path / "b").kl is not None
    spoil(tmp_path / "b")
    with pytest.raises(RuntimeError, match=says):
        verify_output(work, tmp_path / "b")


def bert(folder: Path, kind: type[BertModel] = BertModel) -> Path:
    torch.manual_seed(0)
    settings = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    kind(settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM], ids=lambda k: k.__name__)
@pytest.mark.parametrize("heads", [2, 4], ids=["merge", "and-back"])
def test_an_encoder(kind: type[BertModel], heads: int, tmp_path: Path) -> None:
    """Its output has a class of its own; without a head, hidden states are compared."""
    source = bert(tmp_path / "a", kind)
    result = convert(source, tmp_path / "b", num_key_value_heads=2, verify=True)
    if heads == 4:
        result = convert(tmp_path / "b", tmp_path / "c", num_key_value_heads=4, verify=True)
        assert result.verification.round_trip == "bit-equal"
    found = result.verification
    assert found.tokens == 64
    assert (found.cosine is None) == (kind is BertForMaskedLM)
    assert (found.kl is None) == (kind is BertModel)
    near = 1 - found.cosine if found.kl is None else found.kl
    assert (near <= 1e-6) == (heads == 4)


@pytest.mark.parametrize("changed", [False, True], ids=["ours", "changed"])
def test_code_that_is_not_ours_is_not_run(changed: bool, tmp_path: Path) -> None:
    """In a process where hf_attn_patch has registered nothing."""
    source = bert(tmp_path / "a")
    convert(source, tmp_path / "b", num_key_value_heads=2)
    file, trap = tmp_path / "b" / "modeling_bert_gqa.py", tmp_path / "ran"
    if changed:
        file.write_text(file.read_text() + f"\nopen({str(trap)!r}, 'w').close()\n")
    done = subprocess.run(
        [sys.executable, "-c", EXPAND, tmp_path / "b", tmp_path / "c"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == changed, done.stderr
    assert ("RuntimeError: verification failed" in done.stderr) == changed
    assert not trap.exists()


EXPAND = """
import sys
from hf_attn_converters import convert
convert(sys.argv[1], sys.argv[2], num_key_value_heads=4, verify=True)
assert "hf_attn_patch" not in sys.modules
"""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--verify", "--verify-text", "nowhere.txt"), "cannot be read"),
        (("--verify", "--verify-text", "empty.txt"), "is empty"),
        (("--verify-text", "empty.txt"), "goes with --verify"),
        (("--tensor-parallel-size", "2"), "cannot be split over 2 devices"),
        (("--calibration-text", "empty.txt"), "needs no calibration"),
    ],
)
def test_misuse(
    arguments: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    (tmp_path / "empty.txt").write_text("\n")
    code, _, err = run(source, tmp_path / "b", "-n", 1, *arguments)
    assert code == 2
    assert says in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty.txt"]


# --- the card -------------------------------------------------------------------------------------

CARD = "---\nlicense: apache-2.0\n---\n# Ours\r\n\nA model | of \\1 sorts.\n"


def test_the_source_s_card_stays_and_gets_a_section(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    (source / "README.md").write_bytes(CARD.encode() + b"\xff\xfe\n")
    before = contents(source)
    convert(source, tmp_path / "b", num_key_value_heads=2)
    card = (tmp_path / "b" / "README.md").read_bytes()
    assert card.startswith(CARD.encode() + b"\xff\xfe\n\n")
    assert "| KV heads | 4 → 2 |".encode() in card
    assert contents(source) == before


def test_a_second_conversion_replaces_the_section(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    (source / "README.md").write_text(CARD)
    convert(source, tmp_path / "b", num_key_value_heads=2)
    convert(tmp_path / "b", tmp_path / "c", num_key_value_heads=1)
    card = read_card(tmp_path / "c")
    assert card.count("How this checkpoint was made") == 1
    assert "| KV heads | 2 → 1 |" in card
    assert "| before that, from `a` | 4 → 2 KV heads (mean) |" in card
    record = json.loads((tmp_path / "c" / "conversion.json").read_text())
    assert record["earlier"] == [
        {"source": "a", "kv_heads_before": 4, "kv_heads_after": 2, "method": "mean"}
    ]
    assert card_text(card, record) == card  # said once more, it says the same


def test_a_stranger_s_record_is_no_obstacle(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    for text in ("[1]", "{", '{"earlier": 3}', '{"earlier": [{"source": 1}]}', "\xff"):
        (source / "conversion.json").write_bytes(text.encode("latin-1"))
        target = tmp_path / f"b{len(list(tmp_path.iterdir()))}"
        convert(source, target, num_key_value_heads=2)
        assert json.loads((target / "conversion.json").read_text())["earlier"] == []


def test_the_hash_in_the_card_is_of_the_headers(tmp_path: Path) -> None:
    """Other values, same hash; another shape, another hash: the card says which it is."""
    hashes = []
    for seed, kv_heads in ((0, 4), (1, 4), (0, 2)):
        source = tiny_checkpoint(tmp_path / f"{seed}{kv_heads}", kv_heads=kv_heads, seed=seed)
        convert(source, tmp_path / f"{seed}{kv_heads}-to-1", num_key_value_heads=1)
        card = tmp_path / f"{seed}{kv_heads}-to-1" / "conversion.json"
        hashes.append(json.loads(card.read_text())["source_headers_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]
