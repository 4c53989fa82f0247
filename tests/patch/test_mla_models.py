"""Models that cache latents under ``triton_mla``, against eager. Also run on transformers 5.17."""

from __future__ import annotations

import copy

import pytest
import torch
from mla_specs import OTHERS, OURS, SPECS, V3, Expanding, batch, decode_logits
from test_models_train import assert_same_step, step
from tiny_models import (
    EVERY,
    TOLERANCE,
    TinyModel,
    assert_close,
    build,
    generate,
    logits,
    padded,
    tokens,
    worst,
)
from torch import Tensor, nn

from hf_attn_patch import PagedCache
from hf_attn_patch.attention import mla
from hf_attn_patch.transformers_compat import latent_layers as adapter

# -- eager's answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spec", SPECS)
def test_prompt(spec: TinyModel, side: str) -> None:
    inputs = padded(side)
    ours, theirs = (logits(spec, name, inputs) for name in (OURS, "eager"))
    assert_close(ours, theirs, inputs["attention_mask"])


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("form", ["unpadded", "padded"])
@pytest.mark.parametrize("spec", SPECS)
def test_absorbed_logits(
    spec: TinyModel, form: str, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = batch(form)
    theirs = decode_logits(build(spec, "eager"), inputs, new)
    expanding = Expanding(monkeypatch)
    ours = decode_logits(build(spec, OURS), inputs, new)
    assert expanding.count == 2, "each of the two layers expands its prompt, and nothing else"
    assert_close(ours, theirs, inputs["attention_mask"][:, -new:])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("form", ["unpadded", "padded"])
@pytest.mark.parametrize("spec", SPECS)
def test_greedy(spec: TinyModel, form: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch(form)
    theirs = generate(spec, "eager", inputs)
    expanding = Expanding(monkeypatch)
    kind = {} if cache == "dynamic" else {"cache_implementation": "static"}
    assert torch.equal(generate(spec, OURS, inputs, **kind), theirs)
    assert expanding.count == 2


@pytest.mark.parametrize("spec", SPECS)
def test_paged_cache(spec: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch("padded")
    theirs = generate(spec, "eager", inputs)
    expanding = Expanding(monkeypatch)
    cache = PagedCache(build(spec, OURS))
    ours = generate(spec, OURS, inputs, past_key_values=cache)
    assert torch.equal(ours, theirs) and expanding.count == 2
    width = sum(heads * columns for heads, columns in cache.layers[0].shapes)
    assert width == 16 + 8, "values of a token and layer: the latent and the rotated key"
    # a conversation goes on over the pages: its next prompt is absorbed
    more = torch.cat([inputs["input_ids"], ours], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ours.shape[1]), value=1)
    again = {"input_ids": more, "attention_mask": mask}
    cache.start(**again)
    got = generate(spec, OURS, again, past_key_values=cache)
    assert torch.equal(got, generate(spec, "eager", again)) and expanding.count == 2


def test_paged_cache_of_8_bits() -> None:
    """Close to eager's logits after a prompt from pages: 2**-4 of each stored number."""
    inputs = batch("unpadded")
    ids, theirs = inputs["input_ids"], logits(V3, "eager", inputs)[:, -3:]
    gaps = []
    for dtype in (None, "fp8"):
        model = build(V3, OURS)
        cache = PagedCache(model, dtype=dtype)
        with torch.no_grad():
            model(input_ids=ids[:, :-3], past_key_values=cache)
            ours = model(input_ids=ids[:, -3:], past_key_values=cache).logits
        gaps.append(worst(ours, theirs))
        assert cache.layers[0].pages[0].element_size() == (4 if dtype is None else 1)
    assert gaps[0] < TOLERANCE and 100 * TOLERANCE < gaps[1] < 0.5


@pytest.mark.parametrize("spec", OTHERS)
def test_the_other_families(spec: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch("padded")
    theirs = generate(spec, "eager", inputs)
    expanding = Expanding(monkeypatch)
    assert torch.equal(generate(spec, OURS, inputs), theirs)
    assert expanding.count == sum(adapter.hands_over(m) for m in build(spec, OURS).modules()) > 0


@pytest.mark.parametrize("spec", SPECS)
def test_beams_and_assistant(spec: TinyModel) -> None:
    beams = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6}
    inputs = batch("padded")
    ours, theirs = (generate(spec, name, inputs, **beams) for name in (OURS, "eager"))
    assert torch.equal(ours, theirs)
    one = {"input_ids": tokens(1, 8)}
    found = generate(spec, OURS, one, assistant_model=build(EVERY[0], "triton_fa2"))
    assert torch.equal(found, generate(spec, "eager", one))


@pytest.mark.parametrize("form", ["bool", "added"])
def test_a_mask_of_the_users(form: str) -> None:
    ids = tokens(2, 7)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    mask[5, 2] = mask[6, 1] = False
    given = mask.expand(2, 1, 7, 7)
    if form == "added":
        given = torch.zeros(given.shape).masked_fill(~given, float("-inf"))
    inputs = {"input_ids": ids, "attention_mask": given}
    oracle = "eager" if form == "added" else "sdpa"  # eager adds a bool mask as numbers
    assert_close(logits(V3, OURS, inputs), logits(V3, oracle, inputs))


@pytest.mark.parametrize("spec", SPECS)
def test_training_step(spec: TinyModel) -> None:
    assert_same_step(step(spec, OURS), step(spec, "eager"))


def test_gradient_checkpointing() -> None:
    assert_same_step(step(V3, OURS, checkpointing=True), step(V3, "eager"))


def test_a_gradient_is_asked_for_in_a_decoding_step() -> None:
    """Short queries absorb, but not where somebody wants a gradient."""
    model = copy.deepcopy(build(V3, OURS))
    ids = tokens(2, 9)
    with torch.no_grad():
        past = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    model(input_ids=ids[:, -1:], past_key_values=past).logits.sum().backward()
    grad = model.model.layers[0].self_attn.kv_b_proj.weight.grad
    assert grad is not None and bool(grad.abs().max() > 0)


def test_bfloat16_and_autocast() -> None:
    inputs = batch("padded")
    low = build(V3, OURS).to(torch.bfloat16)
    eager = build(V3, "eager").to(torch.bfloat16)
    try:
        ours, theirs = (decode_logits(model, inputs) for model in (low, eager))
    finally:
        low.to(torch.float32)
        eager.to(torch.float32)
        build.cache_clear()
    assert worst(ours.float(), theirs.float()) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (decode_logits(build(V3, name), inputs) for name in (OURS, "eager"))
    assert worst(ours.float(), theirs.float()) < 0.1


def test_negative_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of another head, or a padding that is ignored, must be seen by these comparisons."""
    inputs = batch("padded")
    theirs = decode_logits(build(V3, "eager"), inputs)
    unmasked = inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}
    assert worst(decode_logits(build(V3, OURS), unmasked), theirs) > 100 * TOLERANCE
    right = mla._weights

    def wrong(module: nn.Module, query: Tensor) -> Tensor:
        return right(module, query).roll(28, 0)  # 16 + 12 rows: one head further

    monkeypatch.setattr(mla, "_weights", wrong)
    assert worst(decode_logits(build(V3, OURS), inputs), theirs) > 100 * TOLERANCE
