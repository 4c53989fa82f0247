"""Logits of tiny models against eager's, for every way a batch can be masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import (
    TOLERANCE,
    TinyModel,
    assert_close,
    build,
    having,
    inputs_for,
    is_causal,
    logits,
    padded,
    positions,
    tokens,
    worst,
)

ALL = having(lambda spec: True)


@pytest.mark.parametrize("spec", ALL)
def test_unpadded(spec: TinyModel) -> None:
    inputs = inputs_for(spec, {"input_ids": tokens(2, 13)})
    assert_close(logits(spec, "triton_fa2", inputs), logits(spec, spec.oracle, inputs))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spec", ALL)
def test_padded(spec: TinyModel, side: str) -> None:
    inputs = inputs_for(spec, padded(side))
    keep = None if spec.kind == "seq2seq" else inputs["attention_mask"]
    if is_causal(spec):
        inputs["position_ids"] = positions(inputs["attention_mask"])
    ours = logits(spec, "triton_fa2", inputs)
    assert torch.isfinite(ours).all(), "padding rows must not turn into NaN"
    assert_close(ours, logits(spec, spec.oracle, inputs), keep)


@pytest.mark.parametrize("spec", having(lambda s: s.packed and s.packed_by_position))
def test_packed_by_position_ids(spec: TinyModel) -> None:
    lengths = (6, 1, 8)
    ids = tokens(1, sum(lengths))
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    inputs = {"input_ids": ids, "position_ids": places, "use_cache": False}
    ours = logits(spec, "triton_fa2", inputs)
    start = 0
    for n in lengths:
        alone = logits(spec, spec.oracle, {"input_ids": ids[:, start : start + n]})
        assert_close(ours[:, start : start + n], alone)
        start += n


@pytest.mark.parametrize("spec", having(lambda s: s.packed))
def test_packed_rows_of_a_batch(spec: TinyModel) -> None:
    places = torch.stack(
        [
            torch.cat([torch.arange(5), torch.arange(4)]),
            torch.cat([torch.arange(2), torch.arange(7)]),
        ]
    )
    inputs = {"input_ids": tokens(2, 9), "position_ids": places, "use_cache": False}
    ours, theirs = (logits(spec, name, inputs) for name in ("triton_fa2", spec.oracle))
    assert_close(ours, theirs)


@pytest.mark.parametrize("spec", having(lambda s: s.packed))
def test_packed_by_offsets(spec: TinyModel) -> None:
    lengths = (5, 9)
    ids = tokens(1, sum(lengths))
    offsets = torch.tensor([0, 5, 14], dtype=torch.int32)
    inputs = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": 9,
        "max_length_k": 9,
        "use_cache": False,
    }
    ours = logits(spec, "triton_fa2", inputs)
    assert_close(ours[:, :5], logits(spec, spec.oracle, {"input_ids": ids[:, :5]}))
    assert_close(ours[:, 5:], logits(spec, spec.oracle, {"input_ids": ids[:, 5:]}))


@pytest.mark.parametrize("form", ["bool", "added", "per_head"])
@pytest.mark.parametrize("spec", having(lambda s: s.mask_4d))
def test_custom_4d_mask(spec: TinyModel, form: str) -> None:
    ids = tokens(2, 11)
    generator = torch.Generator().manual_seed(3)
    heads = 4 if form == "per_head" and "falcon" not in spec.id else 1
    keep = torch.rand(2, heads, 11, 11, generator=generator) < 0.5
    if is_causal(spec):
        keep = keep.tril()
    keep = keep | torch.eye(11, dtype=torch.bool)
    added = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    ours = logits(
        spec, "triton_fa2", {"input_ids": ids, "attention_mask": keep if form == "bool" else added}
    )
    assert_close(ours, logits(spec, spec.oracle, {"input_ids": ids, "attention_mask": added}))


@pytest.mark.parametrize("spec", having(lambda s: s.id in ("llama", "mistral", "gemma2", "gpt2")))
def test_static_cache_forward_in_two_parts(spec: TinyModel) -> None:
    from transformers import StaticCache

    ids = tokens(2, 14)
    whole = logits(spec, spec.oracle, {"input_ids": ids})
    model = build(spec, "triton_fa2")
    cache = StaticCache(config=model.config, max_cache_len=24)
    parts, start = [], 0
    with torch.no_grad():
        for part in ids.split([5, 3, 1, 1, 4], dim=1):
            places = torch.arange(start, start + part.shape[1])[None]
            out = model(part, past_key_values=cache, position_ids=places, use_cache=True)
            parts.append(out.logits)
            start += part.shape[1]
    assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("form", ["unpadded", "left_padded"])
@pytest.mark.parametrize("spec", having(lambda s: s.id in ("llama", "mistral", "bert")))
def test_compiles_into_one_graph(spec: TinyModel, form: str) -> None:
    inputs: dict[str, Any] = (
        padded("left") if form == "left_padded" else {"input_ids": tokens(2, 13)}
    )
    if is_causal(spec):
        inputs["use_cache"] = False
    torch._dynamo.reset()
    compiled = torch.compile(build(spec, "triton_fa2"), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        ours = compiled(**inputs).logits
    assert_close(ours, logits(spec, spec.oracle, inputs), inputs.get("attention_mask"))


@pytest.mark.parametrize("spec", having(lambda s: s.id == "mistral"))
def test_compiled_steps_over_a_static_cache(spec: TinyModel) -> None:
    from transformers import StaticCache

    ids = tokens(2, 9)
    whole = logits(spec, spec.oracle, {"input_ids": ids})
    model = build(spec, "triton_fa2")
    cache = StaticCache(config=model.config, max_cache_len=16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
        for at in range(6, 9):
            step = {"past_key_values": cache, "position_ids": torch.tensor([[at]])}
            out = compiled(ids[:, at : at + 1], **step).logits
            assert_close(out, whole[:, at : at + 1])


@pytest.mark.parametrize("spec", having(lambda s: s.id in ("llama", "t5", "falcon_gqa")))
def test_negative_control_a_shifted_mask_is_seen(
    spec: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison of this file must fail when the attention is wrong by one key, or, on the
    straight way of plain calls, not causal."""
    from hf_attn_patch.attention import dense
    from hf_attn_patch.attention.call import Call

    right, plain = dense._band, dense.plain_attention

    def open_plain(*args: Any, causal: bool, **options: Any) -> Any:
        return plain(*args, causal=False, **options)

    def shifted(call: Call) -> dict[str, object]:
        band = right(call)
        return band | {"causal": False, "window_size": (band["window_size"][0], 1)}

    monkeypatch.setattr(dense, "_band", shifted)
    monkeypatch.setattr(dense, "plain_attention", open_plain)
    inputs = inputs_for(spec, {"input_ids": tokens(2, 13)})
    if spec.kind == "seq2seq":  # the decoder's mask is dense there: hide one key in the encoder
        inputs["attention_mask"] = torch.ones(2, 13, dtype=torch.long)
        reference = logits(spec, spec.oracle, inputs)
        inputs["attention_mask"][:, 5] = 0
    else:
        reference = logits(spec, spec.oracle, inputs)
    gap = worst(logits(spec, "triton_fa2", inputs), reference)
    assert gap > 100 * TOLERANCE
