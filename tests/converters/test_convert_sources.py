"""pytorch_model.bin as the source gives the same output as safetensors."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import assert_same_weights, contents, edit_config, tiny_checkpoint

import hf_attn_converters
from hf_attn_converters.io.checkpoint import INDEX, open_checkpoint

convert = functools.partial(hf_attn_converters.convert, method="mean")  # needs no data

Tensors = dict[str, torch.Tensor]
Q0 = "model.layers.0.self_attn.q_proj.weight"


def to_bin(folder: Path, save: Callable[[Tensors, Path], object] = torch.save) -> Path:
    """Turn each safetensors file, and the index, into the older form."""
    for file in sorted(folder.glob("*.safetensors")):
        name = file.with_suffix(".bin").name.replace("model", "pytorch_model", 1)
        save(load_file(file), folder / name)
        file.unlink()
    if (folder / INDEX).exists():
        text = (folder / INDEX).read_text().replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(
            text.replace("model-", "pytorch_model-")
        )
        (folder / INDEX).unlink()
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shard_size", ["1GB", "10KB"], ids=["one-file", "shards"])
def test_bin(shard_size: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4, dtype=dtype, shard_size=shard_size)
    convert(source, tmp_path / "from-safetensors", num_key_value_heads=1)
    to_bin(source)
    before = contents(source)
    convert(source, tmp_path / "from-bin", num_key_value_heads=1)
    assert contents(source) == before
    names = {p.name for p in (tmp_path / "from-safetensors").iterdir()}
    assert {p.name for p in (tmp_path / "from-bin").iterdir()} == names
    for name in names - {"conversion.json", "README.md"}:
        assert (tmp_path / "from-bin" / name).read_bytes() == (
            tmp_path / "from-safetensors" / name
        ).read_bytes()


def old_form(tensors: Tensors, path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def shared(tensors: Tensors, path: Path) -> None:
    """The tied head is there, in the same memory."""
    torch.save({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, path)


def views(tensors: Tensors, path: Path) -> None:
    """Transposed, and slices of something larger."""
    turned = {name: t.T.contiguous().T if t.ndim == 2 else t for name, t in tensors.items()}
    turned[Q0] = torch.cat([turned[Q0], turned[Q0]])[: len(turned[Q0])]
    assert not turned["model.embed_tokens.weight"].is_contiguous()
    torch.save(turned, path)


def parameters(tensors: Tensors, path: Path) -> None:
    torch.save({name: torch.nn.Parameter(t) for name, t in tensors.items()}, path)


@pytest.mark.parametrize("save", [old_form, shared, views, parameters], ids=lambda f: f.__name__)
def test_bin_in_other_forms(save: Callable[[Tensors, Path], object], tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    convert(source, tmp_path / "from-safetensors", num_key_value_heads=1)
    convert(to_bin(source, save), tmp_path / "from-bin", num_key_value_heads=1)
    assert_same_weights(tmp_path / "from-bin", tmp_path / "from-safetensors")


def test_safetensors_come_before_bin(tmp_path: Path) -> None:
    """As in transformers, should a folder hold both."""
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    (source / "pytorch_model.bin").write_bytes(b"never read")
    convert(source, tmp_path / "b", num_key_value_heads=1)
    assert not (tmp_path / "b" / "pytorch_model.bin").exists()


@pytest.mark.parametrize(
    ("entry", "says"),
    [("../pytorch_model.bin", "leads out"), ("two.bin", "absent"), ("x.safetensors", "no .bin")],
)
def test_bin_index(entry: str, says: str, tmp_path: Path) -> None:
    source = to_bin(tiny_checkpoint(tmp_path / "a", kv_heads=4, shard_size="10KB"))
    path = source / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = entry
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=says):
        convert(source, tmp_path / "b", num_key_value_heads=1)


def test_a_folder_s_quantization_is_named(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    edit_config(source, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match=r"quantized \(fp8\).*dequantize\(\)"):
        open_checkpoint(source)
