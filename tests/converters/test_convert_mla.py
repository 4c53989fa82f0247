"""Latents in place of KV heads: exact where nothing is left out, decoded unexpanded, near else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mla_conversions import EXACT, YARN, config_of, distance, greedy, load, source, to_latents
from safetensors.torch import load_file, save_file
from tiny_checkpoints import tiny_checkpoint, weights_of
from torch import Tensor

import hf_attn_patch  # noqa: F401  registers triton_mla

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
SOURCES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"kv_heads": 4},
    "mqa": {"kv_heads": 1},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2"},  # biases
    "llama-biases": {"attention_bias": True},
    "llama3-rope": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},  # scores are scaled too
    "untied": {"tie": False},
    "wide-heads": {"head_dim": 12},
}


@pytest.mark.parametrize("name", SOURCES)
def test_exact(name: str, tmp_path: Path) -> None:
    """With a place for every rotated pair and every value, nothing is lost but rounding."""
    options = SOURCES[name]
    folder = source(tmp_path / "a", **options)
    columns = options.get("kv_heads", 2) * options.get("head_dim", 8)
    target = to_latents(folder, tmp_path / "b", columns + 1, columns)
    assert distance(folder, target) < 2e-5
    tokens = greedy(folder, attn_implementation="eager")
    assert torch.equal(greedy(target), tokens)
    assert torch.equal(greedy(target, attn_implementation="triton_mla"), tokens)
    config = config_of(target)
    assert (config["model_type"], config["architectures"]) == (
        "deepseek_v3", ["DeepseekV3ForCausalLM"],
    )  # fmt: skip


def test_heads_as_wide_as_the_rotated_key_take_the_plain_rope(tmp_path: Path) -> None:
    """One place for each frequency, in order, is what any engine calls default."""
    folder = source(tmp_path / "a", kv_heads=1)
    target = to_latents(folder, tmp_path / "b", 9, 8)
    assert config_of(target)["rope_parameters"]["rope_type"] == "default"


def swap_frequencies(folder: Path) -> None:
    path = folder / "config.json"
    config = config_of(folder)
    for kind in ("short_factor", "long_factor"):
        factors = config["rope_parameters"][kind]
        factors[0], factors[-1] = factors[-1], factors[0]
    path.write_text(json.dumps(config))


def silence_constant(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("kv_a_proj_with_mqa.bias"):
                tensors[name][0] = 0

    edit(folder, change)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("spoil", [swap_frequencies, silence_constant])
def test_exactness_needs_each_part(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    """The negative control: either one wrong, and the distance above is far from met."""
    folder = source(tmp_path / "a")
    target = to_latents(folder, tmp_path / "b", *EXACT.values())
    spoil(target)
    assert distance(folder, target) > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """Stored and run in half precision the result is as near as the source's own rounding."""
    folder = source(tmp_path / "a", dtype=dtype, family="qwen2")
    target = to_latents(folder, tmp_path / "b", *EXACT.values())
    assert {x.dtype for x in weights_of(target).values()} == {dtype}
    assert distance(folder, target) < 10 * torch.finfo(dtype).eps
    with torch.inference_mode():
        ids = torch.arange(2, 26)[None]
        mine, its = (load(x, dtype=dtype)(ids).logits.float() for x in (target, folder))
    assert (mine - its).norm() < 20 * torch.finfo(dtype).eps * its.norm()


def test_more_columns_are_nearer(tmp_path: Path) -> None:
    """With the rank, and with the rotated key; at the ends nothing and all is said."""
    folder = source(tmp_path / "a", kv_heads=4)
    by_rank = [distance(folder, to_latents(folder, tmp_path / f"r{r}", r, 32)) for r in (5, 17, 33)]
    by_rope = [distance(folder, to_latents(folder, tmp_path / f"p{p}", 33, p)) for p in (4, 16, 32)]
    for found in (by_rank, by_rope):
        assert found[0] > 1.3 * found[1] > 1.3 * found[2], found
        assert found[2] < 2e-5 < 0.05 < found[0], found


def test_hidden_structure_is_found(tmp_path: Path) -> None:
    """A source whose V has 5 columns, and whose K heads are turned copies of one: both come back
    at that size, and at one column less V does not."""
    folder = tiny_checkpoint(tmp_path / "a", kv_heads=2)
    draw = torch.Generator().manual_seed(3)

    def structure(tensors: dict[str, Tensor]) -> None:
        for name, x in tensors.items():
            if name.endswith("v_proj.weight"):
                low = torch.randn(16, 5, generator=draw) @ torch.randn(5, 32, generator=draw)
                tensors[name] = low * 0.05
            if name.endswith("k_proj.weight"):
                one = x.view(2, 2, 4, 32)[0]  # a head's two halves
                angle = torch.rand(4, 1, generator=draw) * 6
                turned = torch.stack([
                    one[0] * angle.cos() - one[1] * angle.sin(),
                    one[0] * angle.sin() + one[1] * angle.cos(),
                ])  # fmt: skip
                tensors[name] = torch.stack([one, turned]).reshape(16, 32)

    edit(folder, structure)
    assert distance(folder, to_latents(folder, tmp_path / "b", 6, 8)) < 1e-4
    assert distance(folder, to_latents(folder, tmp_path / "c", 5, 8)) > 1e-2
