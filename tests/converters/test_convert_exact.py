"""Conversions that must be exact, and what mean pooling must compute."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import assert_same_logits, contents, edit_config, logits_of, tiny_checkpoint
from transformers import AutoConfig, LlamaForCausalLM, LlamaModel

from hf_attn_converters import convert
from hf_attn_converters.families.layouts import Part
from hf_attn_converters.merge import METHODS
from hf_attn_converters.merge.kv_heads import change_kv_heads

merge = functools.partial(convert, method="mean")

EXPANSIONS = [
    pytest.param(4, 1, 4, id="MQA-to-MHA-H4"),
    pytest.param(4, 2, 4, id="GQA2-to-MHA-H4"),
    pytest.param(6, 1, 3, id="MQA-to-GQA3-H6"),
    pytest.param(9, 3, 9, id="GQA3-to-MHA-H9"),
]
SPELLINGS = ["llama", "mistral", "qwen2"]  # every family once: test_convert_families.py


@pytest.mark.parametrize(("heads", "before", "after"), EXPANSIONS)
@pytest.mark.parametrize("family", SPELLINGS)
def test_expansion_leaves_the_logits(
    family: str, heads: int, before: int, after: int, tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path / "a", family=family, heads=heads, kv_heads=before)
    result = convert(source, tmp_path / "b", num_key_value_heads=after)
    assert result.plan.method == "exact"
    assert AutoConfig.from_pretrained(tmp_path / "b").num_key_value_heads == after
    assert_same_logits(logits_of(tmp_path / "b"), logits_of(source))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_expand_then_mean_gives_back_every_bit(family: str, dtype: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(
        tmp_path / "a", family=family, heads=9, kv_heads=3, dtype=getattr(torch, dtype)
    )
    convert(source, tmp_path / "b", num_key_value_heads=9)
    result = merge(tmp_path / "b", tmp_path / "c", num_key_value_heads=3)
    assert result.plan.method == "mean"
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "c" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype == getattr(torch, dtype)
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_expansion_in_float64_is_exact_to_its_last_digits(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", heads=6, kv_heads=1, dtype=torch.float64)
    convert(source, tmp_path / "b", num_key_value_heads=6)
    before, after = (logits_of(tmp_path / d, dtype=torch.float64) for d in "ab")
    torch.testing.assert_close(after, before, atol=1e-13, rtol=0)


def test_control_rotated_k_changes_the_logits(tmp_path: Path) -> None:
    """The comparison above can fail: with K's heads one place off, the logits are far away."""
    source = tiny_checkpoint(tmp_path / "a", kv_heads=2)
    convert(source, tmp_path / "b", num_key_value_heads=4)
    file = tmp_path / "b" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].view(4, 8, -1).roll(1, 0).reshape(32, -1).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(AssertionError):
        assert_same_logits(logits_of(tmp_path / "b"), logits_of(source))
    assert (logits_of(tmp_path / "b") - logits_of(source)).abs().max() > 0.01


def test_llama_with_bias(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", attention_bias=True)
    result = convert(source, tmp_path / "b", num_key_value_heads=4)
    assert result.plan.tensors_changed == 2 * 2 * 2  # layers, k and v, weight and bias
    assert_same_logits(logits_of(tmp_path / "b"), logits_of(source))


def test_mean_is_the_mean_of_neighbours(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", heads=4, kv_heads=4, attention_bias=True)
    merge(source, tmp_path / "b", num_key_value_heads=2)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    for role in "kv":
        for kind in ("weight", "bias"):
            name = f"model.layers.1.self_attn.{role}_proj.{kind}"
            first, second, third, fourth = before[name].double().chunk(4)
            expected = torch.cat([(first + second) / 2, (third + fourth) / 2]).float()
            assert torch.equal(after[name], expected)
    untouched = [n for n in before if "k_proj" not in n and "v_proj" not in n]
    assert untouched
    assert all(torch.equal(before[n], after[n]) for n in untouched)


def test_six_to_four_of_twelve_goes_through_twelve(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", heads=12, kv_heads=6)
    merge(source, tmp_path / "direct", num_key_value_heads=4)
    convert(source, tmp_path / "mha", num_key_value_heads=12)
    merge(tmp_path / "mha", tmp_path / "through", num_key_value_heads=4)
    direct, through = (
        (tmp_path / d / "model.safetensors").read_bytes() for d in ("direct", "through")
    )
    assert direct == through


def test_plain_transformers_loads_it_in_the_stock_class(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", heads=4, kv_heads=4, tokenizer=True)
    (source / "LICENSE").write_text("a licence")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (source / "optimizer.pt").write_bytes(b"pickle")
    merge(source, tmp_path / "b", num_key_value_heads=1)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "b")
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (8, 32)
    expected = set(contents(source)) - {"optimizer.pt"} | {"conversion.json", "README.md"}
    assert set(contents(tmp_path / "b")) == expected
    made = json.loads((tmp_path / "b" / "conversion.json").read_text())
    assert (made["method"], made["kv_heads_before"], made["kv_heads_after"]) == ("mean", 4, 1)
    assert str(tmp_path) not in json.dumps(made)


def test_kv_bytes_per_token(tmp_path: Path) -> None:
    source = tiny_checkpoint(
        tmp_path / "a", heads=4, kv_heads=4, layers=3, dtype=torch.bfloat16, attention_bias=True
    )
    plan = merge(source, tmp_path / "b", num_key_value_heads=1, dry_run=True).plan
    assert plan.kv_bytes_per_token_before == 3 * 2 * 4 * 8 * 2  # layers, K and V, heads, dim, bytes
    assert plan.kv_bytes_per_token_after == plan.kv_bytes_per_token_before // 4
    assert not (tmp_path / "b").exists()


def test_dry_run_foretells_the_size(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", heads=4, kv_heads=2)
    plan = convert(source, tmp_path / "b", num_key_value_heads=4, dry_run=True).plan
    convert(source, tmp_path / "b", num_key_value_heads=4)
    tensors = load_file(tmp_path / "b" / "model.safetensors").values()
    assert plan.bytes_after == sum(t.numel() * t.element_size() for t in tensors)


class TestConfig:
    def test_head_counts_are_spelled_out(self, tmp_path: Path) -> None:
        """A Mistral config without num_key_value_heads means 8, not as many as query heads."""
        source = tiny_checkpoint(tmp_path / "a", family="mistral", heads=16, kv_heads=8, head_dim=2)
        edit_config(source, drop=("num_key_value_heads", "head_dim"))
        convert(source, tmp_path / "b", num_key_value_heads=16)
        config = json.loads((tmp_path / "b" / "config.json").read_text())
        assert (config["num_key_value_heads"], config["head_dim"]) == (16, 2)
        assert_same_logits(logits_of(tmp_path / "b"), logits_of(source))

    @pytest.mark.parametrize("how", ["absent", "null"])
    def test_llama_without_kv_heads_is_mha(self, how: str, tmp_path: Path) -> None:
        source = tiny_checkpoint(tmp_path / "a", heads=4, kv_heads=4)
        edit_config(source, drop=("num_key_value_heads",))
        if how == "null":
            edit_config(source, num_key_value_heads=None)
        plan = merge(source, tmp_path / "b", num_key_value_heads=2).plan
        assert plan.kv_heads_before == 4

    def test_the_rest_is_kept(self, tmp_path: Path) -> None:
        source = tiny_checkpoint(tmp_path / "a", heads=4, kv_heads=4)
        edit_config(source, my_own_key={"a": [1, "ü"]})
        before = json.loads((source / "config.json").read_text())
        merge(source, tmp_path / "b", num_key_value_heads=2)
        after = json.loads((tmp_path / "b" / "config.json").read_text())
        assert after == before | {"num_key_value_heads": 2, "head_dim": 8}


class TestShards:
    def test_same_weights_as_from_one_file(self, tmp_path: Path) -> None:
        whole = tiny_checkpoint(tmp_path / "whole", kv_heads=4)
        shards = tiny_checkpoint(tmp_path / "shards", kv_heads=4, shard_size="10KB")
        assert len(list(shards.glob("*.safetensors"))) > 3
        for name in ("whole", "shards"):
            merge(tmp_path / name, tmp_path / f"{name}-1", num_key_value_heads=1)
        one = load_file(tmp_path / "whole-1" / "model.safetensors")
        many: dict[str, torch.Tensor] = {}
        for file in (tmp_path / "shards-1").glob("*.safetensors"):
            many |= load_file(file)
        assert one.keys() == many.keys()
        assert all(torch.equal(one[n], many[n]) for n in one)
        assert torch.equal(logits_of(tmp_path / "shards-1"), logits_of(tmp_path / "whole-1"))
        index = json.loads((tmp_path / "shards-1" / "model.safetensors.index.json").read_text())
        sizes = sum(t.numel() * t.element_size() for t in many.values())
        assert index["metadata"]["total_size"] == sizes
        assert whole.exists()

    def test_a_layer_across_two_files(self, tmp_path: Path) -> None:
        """K of a layer in one file, V in another: both are read together, written apart."""
        source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
        tensors = load_file(source / "model.safetensors")
        files = {name: "1.safetensors" if "k_proj" in name else "2.safetensors" for name in tensors}
        for file in set(files.values()):
            part = {n: t for n, t in tensors.items() if files[n] == file}
            save_file(part, source / file, metadata={"format": "pt"})
        shutil.move(source / "model.safetensors", tmp_path / "model.safetensors")
        index = {"metadata": {}, "weight_map": files}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        merge(source, tmp_path / "b", num_key_value_heads=2)
        k = load_file(tmp_path / "b" / "1.safetensors")
        v = load_file(tmp_path / "b" / "2.safetensors")
        for name, tensor in (k | v).items():
            expected = tensors[name]
            if "k_proj" in name or "v_proj" in name:
                expected = expected.view(2, 2, 8, -1).mean(1).view(16, -1)
            torch.testing.assert_close(tensor, expected)


class TestTied:
    @pytest.mark.parametrize("same", [True, False], ids=["copy-dropped", "different-kept"])
    def test_lm_head_beside_tied_embeddings(self, same: bool, tmp_path: Path) -> None:
        source = tiny_checkpoint(tmp_path / "a", kv_heads=4, tie=True)
        file = source / "model.safetensors"
        tensors = load_file(file)
        assert "lm_head.weight" not in tensors
        head = tensors["model.embed_tokens.weight"].clone()
        head[-1, -1] += 0 if same else 1
        save_file(tensors | {"lm_head.weight": head}, file, metadata={"format": "pt"})
        plan = merge(source, tmp_path / "b", num_key_value_heads=2).plan
        assert plan.tensors_dropped == int(same)
        assert ("lm_head.weight" in load_file(tmp_path / "b" / "model.safetensors")) != same

    def test_untied_head_is_kept(self, tmp_path: Path) -> None:
        source = tiny_checkpoint(tmp_path / "a", kv_heads=2, tie=False)
        convert(source, tmp_path / "b", num_key_value_heads=4)
        assert_same_logits(logits_of(tmp_path / "b"), logits_of(source))


def test_a_base_model_without_head(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=2)
    LlamaModel.from_pretrained(source).save_pretrained(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "b", num_key_value_heads=4)
    tokens = torch.arange(2, 20)[None]
    a, b = (LlamaModel.from_pretrained(tmp_path / d).eval() for d in ("base", "b"))
    with torch.inference_mode():
        torch.testing.assert_close(
            b(tokens).last_hidden_state, a(tokens).last_hidden_state, atol=1e-6, rtol=1e-6
        )


def test_change_kv_heads_leaves_queries() -> None:
    layer = {Part("q", "weight"): torch.randn(4, 2, 3), Part("k", "weight"): torch.randn(2, 2, 3)}
    wide = change_kv_heads(layer, 4, METHODS["mean"])
    assert wide[Part("q", "weight")] is layer[Part("q", "weight")]
    assert wide[Part("k", "weight")].shape == (4, 2, 3)
