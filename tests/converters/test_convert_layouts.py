"""Layouts and facts: what the table says of a family, against transformers' own modules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_cases import WEIGHTS, Case, config_of, each_case, low_checkpoint, merge, read
from safetensors.torch import save_file
from tiny_checkpoints import TINY, load, logits_of, tiny_checkpoint
from transformers import AutoConfig, AutoModel

from hf_attn_converters import FAMILIES, convert, family_of, plan_conversion
from hf_attn_converters.families.layouts import Heads, LayerHeads, Part, separate
from hf_attn_converters.heads.layer import change_heads, layer_facts, read_layer, store_layer

# --- layouts --------------------------------------------------------------------------------------

SEPARATE = separate("q", "k", "v", "o", norms=("q_norm", "k_norm"))


def _heads(tiny: str) -> Heads:
    config = config_of(tiny)
    spec = family_of(config)
    return Heads(spec.query_heads(config), spec.kv_heads(config), spec.head_dim(config))


@pytest.mark.parametrize("tiny", TINY)
def test_fused_to_separate_and_back(tiny: str, tmp_path: Path) -> None:
    """Real state dicts: every attention tensor is found, split, stored apart, fused: equal bits."""
    model = tiny_checkpoint(tmp_path / "a", family=tiny)
    config = json.loads((model / "config.json").read_text())
    spec, heads, tensors = family_of(config), _heads(tiny), read(model)
    found = {name: place for name in tensors if (place := spec.layout.locate(name))}
    per_layer = len(spec.layout.slots) * len(spec.layout.layer)
    weights = [place for place in found.values() if place.kind == "weight"]
    assert len(weights) == len(set(weights)) == per_layer * spec.layers(config)
    for name, place in found.items():
        stored = tensors[name]
        assert tuple(stored.shape) == place.slot.shape(place.kind, heads, spec.hidden(config))
        if not place.slot.parts(place.kind):
            continue  # the output's bias belongs to no head
        parts = place.slot.split(stored, place.kind, heads)
        apart: dict[Part, torch.Tensor] = {}
        for part in parts:
            assert parts[part].shape[:2] == (heads.of(part.role), heads.dim)
            slot = next(
                s for s in SEPARATE if s.roles == (part.role,) and s.norm == (part.kind == "norm")
            )
            apart |= slot.split(slot.join(parts, place.kind), place.kind, heads)
        assert torch.equal(place.slot.join(apart, place.kind), stored), name


def test_gpt_neox_is_split_as_its_model_splits(tmp_path: Path) -> None:
    """It is never converted, so no logits say whether its layout is right."""
    source = tiny_checkpoint(tmp_path / "a", family="gpt_neox")
    layout = FAMILIES["gpt_neox"].layout
    attention = load(source).gpt_neox.layers[1].attention
    parts = layout.slots[0].split(attention.query_key_value.weight, "weight", Heads(4, 4, 8))
    x = torch.randn(5, 32)
    q, k, v = (x @ attention.query_key_value.weight.T).view(5, 4, 24).chunk(3, dim=-1)
    for role, expected in zip("qkv", (q, k, v), strict=True):
        mine = torch.einsum("hde,ne->nhd", parts[Part(role, "weight")], x)
        torch.testing.assert_close(mine, expected)


def test_prefixes_are_optional() -> None:
    for spec in FAMILIES.values():
        path = spec.layout.layer[0].format(3)
        tail = f"{path}.{spec.layout.slots[0].module}.weight"
        bare = spec.layout.locate(tail)
        assert bare is not None and bare.layer == 3 * len(spec.layout.layer)
        for prefix in spec.layout.prefixes:
            assert spec.layout.locate(prefix + tail) == bare
        assert spec.layout.locate("x." + tail) is None
        assert spec.layout.locate(tail + "_x.y") != bare


# --- what calibrated methods are told -------------------------------------------------------------

CALIBRATED = [name for name in TINY if TINY[name].model_type != "t5"]


@pytest.mark.parametrize("tiny", CALIBRATED)
def test_facts_agree_with_transformers(tiny: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", family=tiny)
    model = load(source)
    config = json.loads((source / "config.json").read_text())
    spec = family_of(config)
    layers = model.get_submodule(spec.layers_path)
    assert len(layers) == spec.layers(config)
    attention = layers[0].get_submodule(spec.attention_path)
    assert "Attention" in type(attention).__name__
    rotary = [m for n, m in model.named_modules() if n.endswith("rotary_emb") and "vision" not in n]
    frequencies = [b for m in rotary for n, b in m.named_buffers() if n.endswith("inv_freq")]
    used = frequencies and not config.get("alibi")  # Falcon makes them, and leaves them, for ALiBi
    assert spec.rotary_dims(config) == (2 * len(frequencies[0]) if used else 0)
    normed = any(key in n for n, _ in attention.named_modules() for key in ("k_norm", "k_layern"))
    assert spec.k_is_free(config) != normed
    assert spec.heads_can_move(config) != bool(config.get("alibi"))


def test_shares_of_rotary_dimensions(tmp_path: Path) -> None:
    """Where config.json says how much of a head turns: today's key, and yesterday's."""
    for tiny, key, old in (
        ("phi", "partial_rotary_factor", "partial_rotary_factor"),
        ("phi3", "partial_rotary_factor", "partial_rotary_factor"),
        ("gpt_neox", "partial_rotary_factor", "rotary_pct"),
    ):
        config = config_of(tiny)
        spec = family_of(config)
        rope = dict(config["rope_parameters"]) | {key: 0.75}
        assert spec.rotary_dims(config | {"rope_parameters": rope}) == 6
        legacy = {k: v for k, v in config.items() if k != "rope_parameters"} | {old: 0.25}
        assert spec.rotary_dims(legacy) == 2
        model = AutoModel.from_config(AutoConfig.for_model(**(config | {"rope_parameters": rope})))
        assert 2 * len(model.rotary_emb.inv_freq) == 6


def test_canonical_form_is_the_same_from_every_layout() -> None:
    """A layer's heads, whichever layout they came from, are keyed and shaped alike."""
    shapes: set[tuple[tuple[Part, torch.Size], ...]] = set()
    for tiny in ("llama", "phi3", "falcon"):
        config = config_of(tiny)
        spec = family_of(config)
        heads, hidden = _heads(tiny), spec.hidden(config)
        layer: LayerHeads = {}
        for slot in spec.layout.slots:
            shape = slot.shape("weight", heads, hidden)
            assert shape is not None
            layer = {**layer, **slot.split(torch.zeros(shape), "weight", heads)}
        shapes.add(tuple(sorted((part, tensor.shape) for part, tensor in layer.items())))
    assert len(shapes) == 1


@each_case
def test_a_method_that_turns_every_role(case: Case, tmp_path: Path) -> None:
    """csvd rewrites q, k, v and o: on repeated heads it must find the source again, so a wrong
    layout, rotary share or norm of any family shows in the logits."""
    low = low_checkpoint(case, tmp_path)
    convert(low, tmp_path / "high", num_key_value_heads=case.high)
    merge(tmp_path / "high", tmp_path / "back", num_key_value_heads=case.low)
    work = plan_conversion(
        tmp_path / "high", tmp_path / "none", num_key_value_heads=case.low, method="csvd"
    )
    hidden = work.family.hidden(work.source.config)
    x = torch.randn(4 * hidden, hidden, dtype=torch.float64)
    covariance = torch.eye(hidden + 1, dtype=torch.float64)
    covariance[:-1, :-1] = x.T @ x / len(x)
    tensors = read(tmp_path / "back")
    for layer in range(work.plan.layers):
        heads = read_layer(work, layer)
        assert {part.role for part in heads} == set("qkvo")
        facts = replace(layer_facts(work, layer), covariance=covariance)
        found = store_layer(work, layer, change_heads(work, heads, facts))
        assert found.keys() == work.places_of(layer).keys()
        assert all(tensors[name].shape == tensor.shape for name, tensor in found.items())
        tensors |= found
    save_file(tensors, tmp_path / "back" / WEIGHTS, metadata={"format": "pt"})
    after, before = logits_of(tmp_path / "back"), logits_of(low)
    assert (after - before).abs().max() < 2e-5 * before.abs().max()


@pytest.mark.parametrize("name", [n for n, s in FAMILIES.items() if "_gqa" not in n])
def test_absent_keys_mean_what_transformers_takes(name: str) -> None:
    """Counts that config.json leaves out, against the configuration class's own values."""
    spec = FAMILIES[name]
    config = config_of(name)
    settings = dict(spec.settings(config))
    optional = [spec.kv_heads_key, spec.head_dim_key if name != "t5" else None]
    if spec.absent_heads is not None:
        optional.append(spec.heads_key)
    for key in optional:
        settings.pop(key, None)
    settings[spec.hidden_key] = 256  # divides by every default number of heads
    silent = {spec.nested: settings} if spec.nested else settings
    read = AutoConfig.for_model(**({"model_type": spec.model_type} | silent)).get_text_config()
    heads = read.num_attention_heads
    assert spec.query_heads(silent) == heads
    if spec.kv_heads_key is not None:
        assert spec.kv_heads(silent) == getattr(read, spec.kv_heads_key)
    if spec.head_dim_key is not None:
        given = getattr(read, "head_dim", None)
        assert spec.head_dim(silent) == (given or 256 // heads)
