"""A GGUF file as the source: dequantized, then the same output as from safetensors."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import (
    assert_same_weights,
    contents,
    logits_of,
    tiny_checkpoint,
    weights_of,
)
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

import hf_attn_converters
from hf_attn_converters.io.checkpoint import open_checkpoint
from hf_attn_patch.cli import app

convert = functools.partial(hf_attn_converters.convert, method="mean")  # needs no data

gguf = pytest.importorskip("gguf")

_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    if name in _ENDS:
        return _ENDS[name]
    layer, module = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{_GGUF_NAMES[module]}.weight"


def write_gguf(
    source: Path, file: Path, kind: gguf.GGMLQuantizationType, *, tokenizer: bool = False
) -> Path:
    """A Llama as llama.cpp stores it: its names, and q and k with rotary rows interleaved."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if tokenizer:
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        tokens += [f"w{i}" for i in range(config["vocab_size"] - len(tokens))]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    for name, tensor in load_file(source / "model.safetensors").items():
        array = tensor.float().numpy()
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        if (key := heads.get(name.split(".")[-2])) is not None:
            split = array.reshape(config[key], 2, -1, array.shape[-1])
            array = split.swapaxes(1, 2).reshape(array.shape)
        stored = kind if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        if kind == gguf.GGMLQuantizationType.Q8_0 and array.shape[-1] % 32:
            stored = gguf.GGMLQuantizationType.F16  # llama.cpp falls back too: blocks have 32
        data = gguf.quants.quantize(np.ascontiguousarray(array), stored)
        writer.add_tensor(gguf_name(name), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def llama(folder: Path) -> Path:
    """One whose config has what GGUF keeps; no tied head, which GGUF would leave out."""
    return tiny_checkpoint(folder, kv_heads=4, tie=False)


def test_gguf_gives_the_same_weights(tmp_path: Path) -> None:
    source = llama(tmp_path / "a")
    file = write_gguf(source, tmp_path / "model.gguf", gguf.GGMLQuantizationType.F32)
    before = file.read_bytes()
    convert(source, tmp_path / "from-safetensors", num_key_value_heads=1)
    result = convert(file, tmp_path / "from-gguf", num_key_value_heads=1, dequantize=True)
    assert_same_weights(tmp_path / "from-gguf", tmp_path / "from-safetensors")
    ours, theirs = (logits_of(tmp_path / f"from-{f}") for f in ("gguf", "safetensors"))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert type(LlamaForCausalLM.from_pretrained(tmp_path / "from-gguf")) is LlamaForCausalLM
    record = json.loads((tmp_path / "from-gguf" / "conversion.json").read_text())
    assert record["source"] == "model.gguf"
    assert result.plan.kv_heads_before == 4
    assert file.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir() if "partial" in p.name) == []
    assert {p.name for p in (tmp_path / "from-gguf").iterdir()} == {
        "README.md", "config.json", "conversion.json", "generation_config.json",
        "model.safetensors",
    }  # fmt: skip


def test_quantized_gguf(tmp_path: Path) -> None:
    """Eight bits per weight: near, in float16, and verified against its own dequantized form."""
    source = llama(tmp_path / "a")
    file = write_gguf(source, tmp_path / "q8.gguf", gguf.GGMLQuantizationType.Q8_0)
    arguments = ["convert", str(file), str(tmp_path / "b"), "-n", "2", "--dequantize", "--verify"]
    arguments += ["--method", "mean"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "verified" in result.stdout
    convert(source, tmp_path / "plain", num_key_value_heads=2)
    mine, other = weights_of(tmp_path / "b"), weights_of(tmp_path / "plain")
    assert mine.keys() == other.keys()
    for name in mine:
        assert mine[name].dtype == torch.float16
        assert torch.allclose(mine[name].float(), other[name], atol=0.005), name
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())


def test_gguf_plan_without_writing(tmp_path: Path) -> None:
    source = llama(tmp_path / "a")
    file = write_gguf(source, tmp_path / "model.gguf", gguf.GGMLQuantizationType.F16)
    before = contents(tmp_path)
    plan = convert(file, tmp_path / "b", num_key_value_heads=1, dequantize=True, dry_run=True).plan
    assert contents(tmp_path) == before
    done = convert(file, tmp_path / "b", num_key_value_heads=1, dequantize=True).plan
    assert (plan.bytes_after, plan.tensors) == (done.bytes_after, done.tensors)
    assert plan.bytes_after == sum(t.nbytes for t in weights_of(tmp_path / "b").values())
    assert plan.disk_needed > plan.bytes_after + plan.bytes_before  # both lie there for a while


def test_gguf_brings_its_tokenizer(tmp_path: Path) -> None:
    source = llama(tmp_path / "a")
    kind = gguf.GGMLQuantizationType.F16
    file = write_gguf(source, tmp_path / "model.gguf", kind, tokenizer=True)
    convert(file, tmp_path / "b", num_key_value_heads=1, dequantize=True)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "b")) == 300


def test_gguf_is_refused_unless_asked(tmp_path: Path) -> None:
    file = write_gguf(
        llama(tmp_path / "a"), tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0
    )
    for arguments, says in [
        ([str(file)], "--dequantize"),
        ([str(file), "--dequantize", "-n", "3"], "possible: 1, 2, 4"),
        ([str(tmp_path / "a"), "--dequantize"], "no GGUF"),
    ]:
        line = [
            "convert",
            arguments[0],
            str(tmp_path / "b"),
            "-n",
            "1",
            "--method",
            "mean",
            *arguments[1:],
        ]
        result = CliRunner().invoke(app, line)
        assert result.exit_code == 2, result.output
        assert says in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "model.gguf"]


@pytest.mark.parametrize("keep", [0, 3, 40, 2000], ids=lambda n: f"{n}-bytes")
def test_a_truncated_gguf(keep: int, tmp_path: Path) -> None:
    file = write_gguf(
        llama(tmp_path / "a"), tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0
    )
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.gguf cannot be read"):
        convert(file, tmp_path / "b", num_key_value_heads=1, dequantize=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "model.gguf"]


def test_a_folder_of_gguf_names_the_file(tmp_path: Path) -> None:
    source = llama(tmp_path / "a")
    write_gguf(source, source / "tiny.Q8_0.gguf", gguf.GGMLQuantizationType.Q8_0)
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"name the file: .*tiny\.Q8_0\.gguf"):
        open_checkpoint(source)
