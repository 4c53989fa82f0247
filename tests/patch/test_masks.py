"""Mask functions: what they recognise, which form they answer in, and that the form means the same.

Also run on transformers 5.17.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from tiny_models import LLAMA_LIKE, having
from torch import Tensor
from transformers import masking_utils as hf

import hf_attn_patch  # noqa: F401
from hf_attn_patch.masking import formats, sinks
from hf_attn_patch.masking.formats import Visible
from hf_attn_patch.masking.patterns import MaskRequest, Pattern, read_pattern
from hf_attn_patch.registration.functions import fa2_mask, swa_mask
from hf_attn_patch.swa_config import SwaSettings, store

LLAMA = transformers.LlamaConfig(**LLAMA_LIKE)
MISTRAL = transformers.MistralConfig(**LLAMA_LIKE | {"sliding_window": 3})


@pytest.fixture(scope="module", autouse=True)
def modelling_code() -> None:
    """The mask functions read the modelling file of a config, which building a model imports."""
    for spec in having(lambda s: s.id in ("llama", "mistral", "modernbert", "t5")):
        getattr(transformers, spec.values[0].model)


def function_of(kind: str) -> Any:
    ids = torch.tensor([[0, 0, 0, 1, 1, 2]])
    made = {
        "causal": hf.causal_mask_function,
        "bidirectional": hf.bidirectional_mask_function,
        "window": hf.sliding_window_causal_mask_function(3),
        "both_sides": hf.sliding_window_bidirectional_mask_function(3),
        "chunks": hf.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long)),
        "packed": hf.and_masks(hf.causal_mask_function, hf.packed_sequence_mask_function(ids)),
        "own": lambda b, h, q, k: k <= q,
        "or": hf.or_masks(hf.causal_mask_function, hf.bidirectional_mask_function),
        "nested": hf.and_masks(
            hf.sliding_window_overlay(5), hf.sliding_window_causal_mask_function(2)
        ),
        "window_alone": hf.and_masks(hf.sliding_window_overlay(5)),
        "twice": hf.and_masks(hf.causal_mask_function, hf.bidirectional_mask_function),
    }
    return made[kind]


EXPECTED: dict[str, Pattern | None] = {
    "causal": Pattern(causal=True),
    "bidirectional": Pattern(causal=False),
    "window": Pattern(causal=True, window=3),
    "both_sides": Pattern(causal=False, window=3),
    "nested": Pattern(causal=True, window=2),
    "chunks": None,
    "own": None,
    "or": None,
    "window_alone": None,
    "twice": None,
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_patterns_are_recognised(kind: str) -> None:
    request = MaskRequest(batch_size=1, q_length=6, kv_length=6, mask_function=function_of(kind))
    assert read_pattern(request) == EXPECTED[kind]


def test_packed_is_recognised() -> None:
    request = MaskRequest(
        batch_size=1, q_length=6, kv_length=6, mask_function=function_of("packed")
    )
    found = read_pattern(request)
    assert found is not None and found.causal and found.packed is not None
    assert found.packed.tolist() == [[0, 0, 0, 1, 1, 2]]


def visible_to(mask: Tensor | None, keys: int, queries: int, window: int | None) -> Tensor:
    """``[B, Q, K]``: what a causal layer sees given a mask in one of the forms, spelled out."""
    found = formats.read(mask, keys)
    i = torch.arange(queries)[:, None] + found.keys - queries
    j = torch.arange(found.keys)[None, :]
    seen = torch.ones(1, queries, found.keys, dtype=torch.bool)
    if found.banded:
        seen = seen & (j <= i) & (True if window is None else j > i - window)
    if found.padding is not None:
        seen = seen & found.padding[:, None, :]
    if found.dense is not None:
        seen = seen & found.dense[:, 0]
    rest = torch.zeros(seen.shape[0], queries, keys - found.keys, dtype=torch.bool)
    return torch.cat([seen, rest], dim=-1)


PADDINGS = {
    "none": None,
    "all_kept": [[1] * 9, [1] * 9],
    "left": [[1] * 9, [0] * 4 + [1] * 5],
    "right": [[1] * 9, [1] * 6 + [0] * 3],
    "holes": [[1, 0, 1, 1, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1, 1, 0, 1]],
}
# (queries, keys the cache returns, position of the first query, position of the first key)
SHAPES = {
    "prompt": (9, 9, 0, 0),
    "step": (1, 9, 8, 0),
    "chunk": (4, 9, 5, 0),
    "static_prompt": (4, 16, 0, 0),
    "static_chunk": (4, 16, 5, 0),
    "static_step": (1, 16, 8, 0),
    "sliding_step": (1, 3, 8, 6),
    "sliding_chunk": (4, 6, 5, 3),
}


def shapes_and_patterns() -> list[Any]:
    # a sliding cache comes with a window and counts on the host
    return [
        pytest.param(shape, pattern, offset, id=f"{shape}-{pattern}-{offset.__name__}")
        for shape in SHAPES
        for pattern in ("causal", "window")
        for offset in (int, torch.tensor)
        if not shape.startswith("sliding") or (pattern == "window" and offset is int)
    ]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("shape", "pattern", "offset_type"), shapes_and_patterns())
def test_forms_mean_what_transformers_means(
    shape: str, pattern: str, offset_type: Any, padding: str
) -> None:
    queries, keys, q_offset, kv_offset = SHAPES[shape]
    rows = PADDINGS[padding]
    mask = None if rows is None else torch.tensor(rows).bool()[:, : q_offset + queries]
    request = {
        "q_offset": offset_type(q_offset),
        "kv_offset": kv_offset,
        "mask_function": function_of(pattern),
        "attention_mask": mask,
    }
    ours = fa2_mask(2, queries, keys, config=MISTRAL, **request)
    theirs = hf.sdpa_mask(2, queries, keys, allow_is_causal_skip=False, **request)
    assert theirs is not None
    seen = visible_to(ours, keys, queries, 3 if pattern == "window" else None)
    assert torch.equal(seen.expand(2, -1, -1), theirs[:, 0])
    if rows is None or padding == "all_kept":
        assert formats.read(ours, keys).padding is None, "no mask work without padding"
    assert ours is None or ours.dim() == 2, "no dense mask"
    again = fa2_mask(2, queries, keys, config=MISTRAL, **request | {"attention_mask": ours})
    assert torch.equal(visible_to(again, keys, queries, 3 if pattern == "window" else None), seen)


@pytest.mark.parametrize("kind", ["chunks", "own", "or", "twice"])
def test_unknown_patterns_become_dense(kind: str) -> None:
    request = {"mask_function": function_of(kind), "use_vmap": kind == "own"}
    ours = fa2_mask(1, 6, 6, config=LLAMA, **request)
    theirs = hf.sdpa_mask(1, 6, 6, allow_is_causal_skip=False, **request)
    assert ours is not None and ours.shape == (1, 1, 6, 6)
    assert torch.equal(ours, theirs)


def test_queries_ahead_of_the_cache_become_dense() -> None:
    ours = fa2_mask(1, 2, 5, q_offset=7, config=LLAMA)
    assert ours is not None and ours.shape == (1, 1, 2, 5) and bool(ours.all())


def test_a_caller_who_wants_the_whole_mask_gets_it() -> None:
    ours = fa2_mask(2, 4, 4, config=LLAMA, allow_is_causal_skip=False)
    assert ours is not None and torch.equal(ours[0, 0], torch.ones(4, 4).tril().bool())


def test_a_model_that_does_not_pass_its_window_gets_a_dense_mask() -> None:
    transformers.Qwen2MoeForCausalLM  # noqa: B018  (imports its modelling file)
    config = transformers.Qwen2MoeConfig()
    ours = fa2_mask(1, 6, 6, mask_function=function_of("window"), config=config)
    assert ours is not None and ours.dim() == 4
    assert fa2_mask(1, 6, 6, config=config) is None


BIDIRECTIONAL = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}


def test_encoder_padding_is_the_same_for_all_queries() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    request = BIDIRECTIONAL | {"mask_function": hf.bidirectional_mask_function, "config": LLAMA}
    ours = fa2_mask(2, 3, 3, attention_mask=mask, **request)
    assert ours is not None and ours.shape == (2, 1, 1, 3)
    assert not formats.read(ours, 3).banded
    whole = fa2_mask(2, 3, 3, attention_mask=torch.ones_like(mask), **request)
    # Llama's layers would be causal if nothing else were said
    assert formats.read(whole, 3) == Visible(keys=3, banded=False)
    encoder = request | {"config": transformers.ModernBertConfig()}
    assert fa2_mask(2, 3, 3, attention_mask=torch.ones_like(mask), **encoder) is None


def test_a_decoder_made_bidirectional_does_not_fall_back_to_causal() -> None:
    config = transformers.LlamaConfig(**LLAMA_LIKE, is_causal=False)
    request = BIDIRECTIONAL | {"mask_function": hf.bidirectional_mask_function, "config": config}
    found = formats.read(fa2_mask(2, 3, 3, **request), 3)
    assert found == Visible(keys=3, banded=False)


def test_bidirectional_windows() -> None:
    request = BIDIRECTIONAL | {"mask_function": function_of("both_sides")}
    modernbert = transformers.ModernBertConfig()
    assert fa2_mask(1, 9, 9, config=modernbert, **request) is None
    # Llama's file does not say that its window is counted as this one must be
    dense = fa2_mask(1, 9, 9, config=LLAMA, **request)
    i = torch.arange(9)
    assert dense is not None and torch.equal(dense[0, 0], (i[:, None] - i).abs() <= 3)
    # a window wider than the text hides nothing
    wide = hf.sliding_window_bidirectional_mask_function(20)
    assert fa2_mask(1, 9, 9, config=modernbert, **request | {"mask_function": wide}) is None


def test_packed_form() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
    form = formats.packed(ids)
    found = formats.read(form, 5)
    assert found.offsets is not None
    assert found.offsets.tolist() == [0, 3, 5, 6, 10]
    assert (found.longest, found.banded) == (4, True)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3), "not understood"),
        (torch.ones(2, 3, 3).bool(), "not understood"),
        (torch.ones(2, 1, 3, 3).long(), "not understood"),
        (torch.ones(2, 7).bool(), "7 key columns"),
    ],
    ids=["float_2d", "rank_3", "integer", "too_wide"],
)
def test_unreadable_masks(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        formats.read(mask, 3)


# --- windows given by configure_swa ---------------------------------------------------------------


def swa_config(window: int, kept: int) -> Any:
    config = transformers.LlamaConfig(**LLAMA_LIKE)
    store(config, SwaSettings(window=window, sinks=kept))
    return config


def spelled_out(mask: Tensor, queries: int, window: int, kept: int) -> Tensor:
    """``[B, Q, K]`` of a windowed layer with kept first tokens, token by token."""
    rows, keys = mask.shape
    seen = torch.zeros(rows, queries, keys, dtype=torch.bool)
    for row, i in itertools.product(range(rows), range(queries)):
        at = i + keys - queries
        first = mask[row].nonzero().flatten().tolist()[:kept]
        for j in range(at + 1):
            seen[row, i, j] = bool(mask[row, j]) and (j > at - window or j in first)
    return seen


@pytest.mark.parametrize("padding", ["all_kept", "left", "right", "holes"])
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_dense_form_of_a_window_with_sinks(padding: str, kept: int) -> None:
    mask = torch.tensor(PADDINGS[padding]).bool()
    ours = swa_mask(
        2, 9, 9, attention_mask=mask, config=swa_config(3, kept), allow_is_causal_skip=False
    )
    assert ours is not None
    assert torch.equal(ours[:, 0], spelled_out(mask, 9, 3, kept))


@pytest.mark.parametrize("padding", ["none", "all_kept", "left"])
@pytest.mark.parametrize("dense", [False, True], ids=["compact", "dense"])
@pytest.mark.parametrize("queries", [1, 2])
def test_rolled_cache(padding: str, dense: bool, queries: int) -> None:
    """Nine tokens seen; the cache holds two sinks and the last four."""
    window, kept, total, start = 3, 2, 9, 5
    rows = PADDINGS[padding] or PADDINGS["all_kept"]
    mask = torch.tensor(rows).bool()
    ours = swa_mask(
        2,
        queries,
        kept + total - start,
        q_offset=total - queries,
        attention_mask=None if padding == "none" else mask,
        config=swa_config(window, kept),
        allow_is_causal_skip=not dense,
    )
    expected = spelled_out(mask, queries, window, kept)
    columns = sinks.sink_columns(mask, kept)
    number, filled = sinks.head_slots(columns, start)
    for row in range(2):
        held = columns[row][number[row]].tolist()
        for i in range(queries):
            head = [
                bool(expected[row, i, c]) and bool(f)
                for c, f in zip(held, filled[row], strict=True)
            ]
            want = head + expected[row, i, start:].tolist()
            if dense:
                assert ours is not None
                assert ours[row, 0, i].tolist() == want
            else:
                padded = torch.ones(kept + 4).bool() if ours is None else ours[row]
                visible = padded & (torch.arange(kept + 4) <= kept + 4 - queries + i)
                near = torch.arange(kept + 4) > kept + 4 - queries + i - window
                first = padded & (padded.cumsum(0) <= kept)
                assert (visible & (near | first)).tolist() == want


def test_sink_columns_of_short_and_empty_rows() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()
    assert sinks.sink_columns(mask, 2).tolist() == [[0, 1], [3, 4], [4, 5], [1, 3]]


def test_own_mask_functions_are_narrowed_only() -> None:
    chunks = function_of("chunks")
    ours = swa_mask(1, 6, 6, mask_function=chunks, config=swa_config(2, 1))
    theirs = hf.sdpa_mask(1, 6, 6, mask_function=chunks, allow_is_causal_skip=False)
    everything = torch.ones(1, 6).bool()
    assert ours is not None and theirs is not None
    assert torch.equal(ours[:, 0], theirs[:, 0] & spelled_out(everything, 6, 2, 1))
