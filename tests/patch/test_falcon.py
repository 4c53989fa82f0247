"""Falcon's adapter: what it caches, how it splits the fused projection, how it comes and goes."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FALCONS, TinyModel, assert_close, build, logits, padded, tokens, worst

import hf_attn_patch
from hf_attn_patch.models.falcon import split_heads

SPECS = [pytest.param(spec, id=spec.id) for spec in FALCONS]
KV_HEADS = {"falcon_gqa": 2, "falcon_mqa": 1, "falcon_alibi": 8}
STOCK_HEADS = {"falcon_gqa": 8, "falcon_mqa": 1, "falcon_alibi": 8}


@pytest.mark.parametrize("spec", SPECS)
def test_cache_holds_only_the_kv_heads(spec: TinyModel) -> None:
    ids = tokens(1, 5)
    shapes = {}
    for name in ("triton_fa2", "sdpa"):
        with torch.no_grad():
            cache = build(spec, name)(ids, use_cache=True).past_key_values
        shapes[name] = tuple(cache.layers[0].keys.shape)
        assert cache.layers[0].values.shape == cache.layers[0].keys.shape
    assert shapes["triton_fa2"] == (1, KV_HEADS[spec.id], 5, 8)
    assert shapes["sdpa"] == (1, STOCK_HEADS[spec.id], 5, 8)


@pytest.mark.parametrize("spec", SPECS)
def test_split_agrees_with_transformers(spec: TinyModel) -> None:
    attention = build(spec, "sdpa").transformer.h[0].self_attention
    fused = attention.query_key_value(torch.randn(2, 3, 64))
    interleaved = attention.new_decoder_architecture or not attention.multi_query
    ours = split_heads(fused, KV_HEADS[spec.id], 8, interleaved)
    theirs = attention._split_heads(fused)
    for part, (mine, stock) in enumerate(zip(ours, theirs, strict=True)):
        repeats = stock.shape[2] // mine.shape[1]
        expanded = mine.repeat_interleave(repeats, dim=1).transpose(1, 2)
        torch.testing.assert_close(expanded, stock, rtol=0, atol=0, msg=f"part {part}")


def test_alibi_is_there() -> None:
    """Negative control: without ALiBi the logits of falcon-rw must come out different."""
    spec = next(s for s in FALCONS if s.id == "falcon_alibi")
    model = copy.deepcopy(build(spec, "triton_fa2"))
    ids = tokens(1, 9)
    for block in model.transformer.h:
        block.self_attention.inv_norm_factor = 0.0  # the factor of ALiBi only
    with torch.no_grad():
        assert worst(model(ids).logits, logits(spec, "sdpa", {"input_ids": ids})) > 1e-2


def test_unregister_takes_the_name_out_of_falcons_table() -> None:
    from transformers.models.falcon import modeling_falcon

    spec = FALCONS[0]
    # built anew: another test may have unregistered since a cached one was made
    model = build.__wrapped__(spec, "triton_fa2")
    assert "triton_fa2" in modeling_falcon.FALCON_ATTENTION_CLASSES
    try:
        hf_attn_patch.unregister()
        assert "triton_fa2" not in modeling_falcon.FALCON_ATTENTION_CLASSES
        assert set(modeling_falcon.FALCON_ATTENTION_CLASSES) == {
            "eager",
            "sdpa",
            "flash_attention_2",
        }
    finally:
        hf_attn_patch.register()
    inputs = padded("left")
    ours = logits(spec, "triton_fa2", inputs)
    assert_close(ours, logits(spec, "sdpa", inputs), inputs["attention_mask"])
    assert hf_attn_patch.check(model, "cpu").ok
