"""Greedy tokens of tiny models against eager's, through every kind of cache and search."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    TinyModel,
    build,
    generate,
    having,
    is_causal,
    padded,
    tokens,
)

GENERATING = having(lambda s: s.kind != "masked")


def batch(spec: TinyModel, form: str) -> dict[str, torch.Tensor]:
    if form == "unpadded":
        ids = tokens(2, 9)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return padded("right" if spec.kind == "seq2seq" else "left")


@pytest.mark.parametrize("form", ["unpadded", "padded"])
@pytest.mark.parametrize("spec", GENERATING)
def test_greedy(spec: TinyModel, form: str) -> None:
    inputs = batch(spec, form)
    ours, theirs = (generate(spec, name, inputs) for name in ("triton_fa2", spec.oracle))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("form", ["unpadded", "padded"])
@pytest.mark.parametrize("spec", having(lambda s: s.kind != "masked" and s.static))
def test_greedy_static_cache(spec: TinyModel, form: str) -> None:
    inputs = batch(spec, form)
    ours = generate(spec, "triton_fa2", inputs, cache_implementation="static")
    assert torch.equal(ours, generate(spec, spec.oracle, inputs))


@pytest.mark.parametrize("spec", GENERATING)
def test_beam_search(spec: TinyModel) -> None:
    inputs = batch(spec, "padded")
    ours, theirs = (
        generate(spec, name, inputs, num_beams=3, max_new_tokens=6, min_new_tokens=6)
        for name in ("triton_fa2", spec.oracle)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("spec", having(is_causal))
def test_assisted(spec: TinyModel) -> None:
    inputs = {"input_ids": tokens(1, 8)}
    draft = next(s for s in having(is_causal)).values[0]
    assistant = build(draft, "triton_fa2")
    ours = generate(spec, "triton_fa2", inputs, assistant_model=assistant)
    assert torch.equal(ours, generate(spec, spec.oracle, inputs))


@pytest.mark.parametrize("spec", having(lambda s: s.id in ("llama", "mistral", "falcon_mqa")))
def test_prompt_in_chunks(spec: TinyModel) -> None:
    inputs = {"input_ids": tokens(2, 13)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    ours = generate(spec, "triton_fa2", inputs, prefill_chunk_size=4)
    assert torch.equal(ours, generate(spec, spec.oracle, inputs))


@pytest.mark.parametrize("spec", having(lambda s: s.id == "llama"))
def test_negative_control_ignored_padding_is_seen(spec: TinyModel) -> None:
    """The comparison of this file must fail when the padding is ignored."""
    inputs = batch(spec, "padded")
    unmasked = inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}
    ours = generate(spec, "triton_fa2", unmasked)
    assert not torch.equal(ours, generate(spec, spec.oracle, inputs))
