"""Bad input: one clear line, the right exit code, nothing written, the source untouched."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import contents, edit_config, tiny_checkpoint
from typer.testing import CliRunner

from hf_attn_converters.io.checkpoint import INDEX
from hf_attn_patch.cli import app

K0 = "model.layers.0.self_attn.k_proj.weight"


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Make a single-file checkpoint one with an index, and change that."""
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    weight_map = dict.fromkeys(load_file(folder / "one.safetensors"), "one.safetensors")
    change(weight_map)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[K0][3, 3] = float("nan")


class Runs:
    """Unpickling this would call os.system."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 3",)


def in_pickle(save: Callable[[Path, dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Put the weights into pytorch_model.bin, as `save` says."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        save(folder / "pytorch_model.bin", tensors)

    return spoil


def truncated_pickle(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:-5000])


def only_gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@dataclass(frozen=True)
class Bad:
    id: str
    spoil: Callable[[Path], object]
    says: str  # what the line must name
    heads: int = 1


CASES = [
    Bad("heads-do-not-divide", lambda f: None, "possible: 1, 2, 4", heads=3),
    Bad("zero-heads", lambda f: None, "possible: 1, 2, 4", heads=0),
    Bad("more-heads-than-queries", lambda f: None, "possible: 1, 2, 4", heads=8),
    Bad("nothing-to-do", lambda f: None, "already has 4", heads=4),
    Bad("unknown-family", lambda f: edit_config(f, model_type="bloom"), "llama"),
    Bad("no-family", lambda f: edit_config(f, model_type=None), "llama"),
    Bad("quantized", lambda f: edit_config(
        f, quantization_config={"quant_method": "gptq"}), "gptq"),
    Bad("adapter", lambda f: (f / "adapter_config.json").write_text("{}"), "merge"),
    Bad("pickle-with-code", in_pickle(
        lambda p, t: torch.save({**t, "x": Runs()}, p)), "system, which is code"),
    Bad("bare-pickle-with-code", in_pickle(
        lambda p, t: p.write_bytes(pickle.dumps(Runs()))), "refused"),
    Bad("pickle-truncated", in_pickle(truncated_pickle), "damaged or truncated"),
    Bad("pickle-empty", in_pickle(lambda p, t: p.write_bytes(b"")), "damaged or truncated"),
    Bad("pickle-of-a-list", in_pickle(lambda p, t: torch.save([t], p)), "holds a list"),
    Bad("pickle-of-training", in_pickle(
        lambda p, t: torch.save({"model": t, "step": 3}, p)), "training"),
    Bad("pickle-sparse", in_pickle(
        lambda p, t: torch.save({**t, K0: t[K0].to_sparse()}, p)), "sparse"),
    Bad("other-pickle", in_pickle(
        lambda p, t: torch.save(t, p.with_name("weights.pt"))), "neither pytorch_model.bin"),
    Bad("gguf", only_gguf, "name the file"),
    Bad("awq", lambda f: edit_config(f, quantization_config={"quant_method": "awq"}), "dequant"),
    Bad("no-weights", lambda f: (f / "model.safetensors").unlink(), "neither"),
    Bad("no-config", lambda f: (f / "config.json").unlink(), "config.json"),
    Bad("config-no-json", lambda f: (f / "config.json").write_text("{"), "config.json"),
    Bad("config-a-list", lambda f: (f / "config.json").write_text("[]"), "config.json"),
    Bad("config-heads-text", lambda f: edit_config(f, num_attention_heads="4"), "'4'"),
    Bad("config-layers-zero", lambda f: edit_config(f, num_hidden_layers=0), "num_hidden_layers"),
    Bad("config-lies-on-heads", lambda f: edit_config(f, num_key_value_heads=2), "[32, 32]"),
    Bad("too-few-layers", lambda f: edit_config(f, num_hidden_layers=3), "layer 2"),
    Bad("too-many-layers", lambda f: edit_config(f, num_hidden_layers=1), "layers"),
    Bad("truncated", truncate, "truncated"),
    Bad("empty", lambda f: (f / "model.safetensors").write_bytes(b""), "truncated"),
    Bad("html-page", lambda f: (f / "model.safetensors").write_text("<html>" * 99), "safetensors"),
    Bad("nan", lambda f: edit_tensors(f, set_nan), K0),
    Bad("lora", lambda f: edit_tensors(
        f, lambda t: t.update({K0.replace("weight", "lora_A.weight"): torch.ones(2)})), "adapter"),
    Bad("packed-weights", lambda f: edit_tensors(
        f, lambda t: t.update({K0.replace("weight", "qweight"): torch.ones(2)})), "dequantize"),
    Bad("int8", lambda f: edit_tensors(f, lambda t: t.update({K0: t[K0].to(torch.int8)})), "I8"),
    Bad("k-missing", lambda f: edit_tensors(f, lambda t: t.pop(K0)), "layer 0"),
    Bad("index-names-absent-file", lambda f: edit_index(
        f, lambda m: m.update(x="two.safetensors")), "two.safetensors"),
    Bad("index-leaves-folder", lambda f: edit_index(
        f, lambda m: m.update(x="../one.safetensors")), "leads out"),
    Bad("index-absolute", lambda f: edit_index(
        f, lambda m: m.update(x="/etc/x.safetensors")), "leads out"),
    Bad("index-names-pickle", lambda f: edit_index(f, lambda m: m.update(x="x.bin")), "x.bin"),
    Bad("index-names-absent-tensor", lambda f: edit_index(
        f, lambda m: m.update(ghost="one.safetensors")), "ghost"),
    Bad("index-forgets-tensor", lambda f: edit_index(f, lambda m: m.pop(K0)), K0),
    Bad("index-empty", lambda f: edit_index(f, lambda m: m.clear()), "weight_map"),
]  # fmt: skip


@pytest.mark.parametrize("dry_run", [False, True], ids=["", "dry-run"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_misuse_is_one_line_and_exit_code_2(case: Bad, dry_run: bool, tmp_path: Path) -> None:
    if dry_run and case.id == "nan":
        pytest.skip("a dry run reads no weights")
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    case.spoil(source)
    before = contents(source)
    arguments = ["convert", str(source), str(tmp_path / "b"), "-n", str(case.heads)]
    arguments += ["--method", "mean"]
    result = CliRunner().invoke(app, arguments + ["--dry-run"] * dry_run)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert case.says in lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert contents(source) == before


@dataclass(frozen=True)
class BadPath:
    id: str
    source: str
    target: str
    says: str


PATHS = [
    BadPath("source-absent", "nowhere", "b", "no folder"),
    BadPath("source-a-file", "a/config.json", "b", "no folder"),
    BadPath("target-inside-source", "a", "a/b", "inside"),
    BadPath("target-is-source", "a", "a", "inside"),
    BadPath("target-around-source", "deep/a", "deep", "contains"),
    BadPath("target-inside-through-link", "a", "link/b", "inside"),
    BadPath("target-not-empty", "a", "full", "not an empty folder"),
    BadPath("target-a-file", "a", "full/file", "not an empty folder"),
]


@pytest.mark.parametrize("case", PATHS, ids=lambda case: case.id)
def test_bad_paths(case: BadPath, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a", kv_heads=4)
    tiny_checkpoint(tmp_path / "deep" / "a", kv_heads=4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    before = contents(tmp_path)
    result = CliRunner().invoke(
        app,
        [
            "convert",
            str(tmp_path / case.source),
            str(tmp_path / case.target),
            "-n",
            "1",
            "--method",
            "mean",
        ],
    )
    assert result.exit_code == 2, result.output
    assert case.says in result.stderr
    assert contents(tmp_path) == before


def test_unknown_method_lists_the_known(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    arguments = ["convert", str(source), str(tmp_path / "b"), "-n", "1", "--method", "median"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "known:" in result.stderr
    assert "mean" in result.stderr


def test_a_full_disk_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    monkeypatch.setattr("hf_attn_converters.conversion.free_bytes", lambda target: 1000)
    result = CliRunner().invoke(
        app, ["convert", str(source), str(tmp_path / "b"), "-n", "1", "--method", "mean"]
    )
    assert result.exit_code == 1
    assert "1,000 are free" in result.stderr


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    """In a hub cache each file is a link out of its folder: that is no escape."""
    source = tiny_checkpoint(tmp_path / "blobs", kv_heads=4, shard_size="10KB")
    (tmp_path / "snapshot").mkdir()
    for file in source.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    result = CliRunner().invoke(
        app,
        ["convert", str(tmp_path / "snapshot"), str(tmp_path / "b"), "-n", "1", "--method", "mean"],
    )
    assert result.exit_code == 0, result.output
    assert not any(p.is_symlink() for p in (tmp_path / "b").iterdir())
