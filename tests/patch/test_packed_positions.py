"""Packed sequences that only position_ids tell of, as DataCollatorWithFlattening packs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from test_attention_keywords import model
from test_stated_masks import GEMMA4
from tiny_models import (
    LLAMA_LIKE,
    TinyModel,
    assert_close,
    build,
    having,
    tokens,
    worst,
)
from torch import Tensor

import hf_attn_patch
from hf_attn_patch.attention import packing

LENGTHS = (9, 1, 4, 11)
TOTAL = sum(LENGTHS)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
OFFSETS = torch.tensor([0, 9, 10, 14, 25], dtype=torch.int32)
LLAMA = having(lambda spec: spec.id == "llama")[0].values[0]
TOLD = having(
    lambda s: s.id in ("llama", "mistral", "gemma2", "gpt_oss", "qwen3", "falcon_gqa", "falcon_mqa")
)


def alone(model: Any, ids: Tensor) -> Tensor:
    """Each document by itself."""
    return torch.cat([model(part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)


@pytest.mark.parametrize("spec", TOLD)
@pytest.mark.parametrize("use_cache", [True, False])
def test_documents_are_kept_apart(spec: TinyModel, use_cache: bool) -> None:
    ids = tokens(1, TOTAL)
    ours = build(spec, "triton_fa2")
    with torch.no_grad():
        want = alone(build(spec, "eager"), ids)
        found = ours(ids, position_ids=POSITIONS, use_cache=use_cache).logits
        together = ours(ids, use_cache=use_cache).logits
    assert_close(found, want)
    assert worst(together, want) > 0.01


@pytest.mark.parametrize("name", ["OPT", "BioGpt"])
def test_models_that_keep_positions_from_the_mask(name: str) -> None:
    arguments = {k: v for k, v in LLAMA_LIKE.items() if k not in ("head_dim", "intermediate_size")}
    extra = {"ffn_dim": 40, "word_embed_proj_dim": 48} if name == "OPT" else {}
    config = getattr(transformers, f"{name}Config")(**arguments | extra)
    ids, found = tokens(1, TOTAL), {}
    for implementation in ("eager", "triton_fa2"):
        torch.manual_seed(0)
        cls = getattr(transformers, f"{name}ForCausalLM")
        model = cls._from_config(config, attn_implementation=implementation).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        with torch.no_grad():
            found[implementation] = alone(model, ids)
            if implementation == "triton_fa2":
                found["packed"] = model(ids, position_ids=POSITIONS).logits
    assert_close(found["triton_fa2"], found["eager"])
    assert_close(found["packed"], found["eager"])


def test_a_dense_mask_of_ours_leaves_them_apart_and_a_callers_own_does_not() -> None:
    """gemma4 slices its masks, so they are dense; what a caller's 4D mask shows is shown."""
    config = transformers.Gemma4TextConfig(**GEMMA4)
    eager, ours = (model(config, "Gemma4ForCausalLM", name) for name in ("eager", "triton_fa2"))
    ids = tokens(1, TOTAL)
    everything = torch.ones(TOTAL, TOTAL).tril().bool()[None, None]
    spec = build(LLAMA, "triton_fa2")
    with torch.no_grad():
        assert_close(ours(ids, position_ids=POSITIONS).logits, alone(eager, ids))
        shown = spec(ids, position_ids=POSITIONS, attention_mask=everything).logits
        added = torch.zeros(1, 1, TOTAL, TOTAL).masked_fill(~everything, torch.finfo().min)
        want = build(LLAMA, "eager")(ids, position_ids=POSITIONS, attention_mask=added).logits
    assert_close(shown, want)


def test_gradients_stay_within_documents() -> None:
    ids = tokens(1, TOTAL)
    embedded = build(LLAMA, "triton_fa2").get_input_embeddings()(ids).detach().requires_grad_()
    out = build(LLAMA, "triton_fa2")(inputs_embeds=embedded, position_ids=POSITIONS).logits
    out[:, 14:].sum().backward()
    assert embedded.grad is not None
    assert not embedded.grad[:, :14].any() and embedded.grad[:, 14:].any()


@pytest.mark.parametrize("spec", having(lambda s: s.id in ("falcon_gqa", "falcon_mqa")))
def test_falcon_takes_cu_seq_lens(spec: TinyModel) -> None:
    ids = tokens(1, TOTAL)
    ours = build(spec, "triton_fa2")
    packed = {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS, "max_length_q": 11}
    with torch.no_grad():
        assert_close(ours(ids, **packed).logits, alone(build(spec, "eager"), ids))
        with pytest.raises(ValueError, match="leave position_ids out"):
            ours(ids, position_ids=torch.arange(TOTAL)[None], **packed)


def test_a_falcon_built_before_the_name_was_taken_back() -> None:
    spec = having(lambda s: s.id == "falcon_gqa")[0].values[0]
    ids = tokens(1, TOTAL)
    ours = build(spec, "triton_fa2")
    try:
        hf_attn_patch.unregister()
    finally:
        hf_attn_patch.register()
    with torch.no_grad():
        found = ours(ids, cu_seq_lens_q=OFFSETS, cu_seq_lens_k=OFFSETS, max_length_q=11).logits
        assert_close(found, alone(build(spec, "eager"), ids))


def test_falcon_with_alibi() -> None:
    spec = having(lambda s: s.id == "falcon_alibi")[0].values[0]
    ids = tokens(1, TOTAL)
    with torch.no_grad():
        want = alone(build(spec, "sdpa"), ids)
        found = build(spec, "triton_fa2")(ids, position_ids=POSITIONS).logits
    assert_close(found, want)


@pytest.mark.parametrize(
    ("positions", "offsets"),
    [
        ([0, 1, 2, 3], None),
        ([5, 6, 7, 8], None),  # a later chunk
        ([0, 1, 1, 1, 2], None),  # image tokens that share a place
        ([0, 1, 0, 1, 2], [0, 2, 5]),
        ([2, 3, 2, 3, 4], [0, 2, 5]),  # RoBERTa counts from padding_idx + 1
        ([0, 0, 0], [0, 1, 2, 3]),
        ([4, 5, 0, 1], [0, 2, 4]),
    ],
)
def test_the_rule(positions: list[int], offsets: list[int] | None) -> None:
    told = packing.documents(torch.tensor([positions]))
    assert (None if told is None else told.cu_seqlens.tolist()) == offsets


def test_what_was_seen_is_kept_only_for_the_same_positions() -> None:
    positions = torch.tensor([[0, 1, 0, 1]])
    assert packing.documents(positions) is packing.documents(positions)
    positions[0, 2:] += 2
    assert packing.documents(positions) is None
    with torch.inference_mode():
        other = torch.tensor([[0, 1, 0, 1]])
        assert packing.documents(other) is not None
        other[0, 2:] += 2
        assert packing.documents(other) is None


def test_m_rope_positions_and_batches_are_no_packing() -> None:
    assert not packing.may_be_packed(torch.zeros(3, 1, 4), 1, 4)
    assert not packing.may_be_packed(torch.zeros(2, 4), 2, 4)
    assert not packing.may_be_packed(torch.zeros(1, 1), 1, 1)
    assert packing.may_be_packed(torch.zeros(1, 4), 1, 4)


def test_packed_rows_cannot_be_continued() -> None:
    model, ids = build(LLAMA, "triton_fa2"), tokens(1, 8)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="cannot be continued"):
            model(
                ids[:, 4:],
                position_ids=torch.tensor([[4, 5, 0, 1]]),
                past_key_values=cache,
                use_cache=True,
            )
    paged = hf_attn_patch.PagedCache(model)
    with torch.no_grad(), pytest.raises(ValueError, match="packed sequences"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3] * 2]), past_key_values=paged)


def test_a_compiled_model_fails_rather_than_mix_documents() -> None:
    model, ids = build(LLAMA, "triton_fa2"), tokens(1, TOTAL)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        plain = torch.arange(TOTAL)[None]
        assert_close(compiled(ids, position_ids=plain).logits, model(ids).logits)
        with pytest.raises(RuntimeError, match="packed sequences"):
            compiled(ids, position_ids=POSITIONS)
    torch._dynamo.reset()
