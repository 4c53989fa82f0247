"""triton_swa against eager with the same mask written out, and its cache against a bound."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import (
    TinyModel,
    assert_close,
    build,
    having,
    padded,
    positions,
    tokens,
    worst,
)
from torch import Tensor

import hf_attn_patch
from hf_attn_patch import RollingCache, configure_swa
from hf_attn_patch.cache import rolling

NAMES = ("llama", "mistral", "gemma2", "gpt_oss", "gpt2", "phi", "deepseek_v3", "falcon_gqa")
MODELS = having(lambda s: s.id in NAMES)
LLAMA = next(p.values[0] for p in MODELS if p.values[0].id == "llama")
SETTINGS = [(4, 0), (4, 2), (1, 3), (7, 1)]


@pytest.fixture(autouse=True)
def drop_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny texts must reach the point where the cache drops keys."""
    monkeypatch.setattr(rolling, "SLACK", 2)


def windowed(spec: TinyModel, window: int, sinks: int) -> Any:
    model = copy.deepcopy(build(spec, "triton_swa"))
    configure_swa(model, window=window, sinks=sinks)
    return model


def written_out(spec: TinyModel, mask: Tensor, window: int, sinks: int) -> Tensor:
    """``[B, 1, S, S]`` additive: what a query may see, token by token."""
    rows, length = mask.shape
    keep = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for row in range(rows):
        real = mask[row].nonzero().flatten().tolist()
        for i in range(length):
            for j in range(i + 1):
                near = j > i - window
                first = j in real[:sinks]
                keep[row, 0, i, j] = bool(mask[row, j]) and (near or first)
    return torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)


def eager_logits(spec: TinyModel, inputs: dict[str, Tensor], window: int, sinks: int) -> Tensor:
    """Eager under the written-out mask; layers with a window of their own get the narrower one."""
    model = build(spec, "eager")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    own = getattr(model.config, "sliding_window", None)
    wide = written_out(spec, mask, window, sinks)
    near = written_out(spec, mask, min(window, own or window), sinks)
    kinds = set(getattr(model.config, "layer_types", None) or ())
    given: Any = near if spec.id == "mistral" else wide
    if "sliding_attention" in kinds and len(kinds) > 1:
        given = {"full_attention": wide, "sliding_attention": near}
    with torch.no_grad():
        return model(ids, attention_mask=given, position_ids=positions(mask)).logits


def eager_greedy(
    spec: TinyModel, inputs: dict[str, Tensor], window: int, sinks: int, steps: int
) -> Tensor:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    start = ids.shape[1]
    for _ in range(steps):
        step = {"input_ids": ids, "attention_mask": mask}
        following = eager_logits(spec, step, window, sinks)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
        mask = torch.cat([mask, torch.ones_like(following)], dim=1)
    return ids[:, start:]


def whole(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def greedy(model: Any, inputs: dict[str, Tensor], steps: int, **options: Any) -> Tensor:
    out = model.generate(
        **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, **options
    )
    return out[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(("window", "sinks"), SETTINGS)
@pytest.mark.parametrize("spec", MODELS)
def test_logits(spec: TinyModel, window: int, sinks: int) -> None:
    for inputs in (whole(tokens(2, 13)), padded("left"), padded("right")):
        places = positions(inputs["attention_mask"])
        with torch.no_grad():
            ours = windowed(spec, window, sinks)(**inputs, position_ids=places).logits
        theirs = eager_logits(spec, inputs, window, sinks)
        assert_close(ours, theirs, inputs["attention_mask"])


@pytest.mark.parametrize("form", ["unpadded", "left_padded"])
@pytest.mark.parametrize(("window", "sinks"), SETTINGS)
@pytest.mark.parametrize("spec", MODELS)
def test_generate_with_rolling_cache(spec: TinyModel, window: int, sinks: int, form: str) -> None:
    inputs = whole(tokens(2, 9)) if form == "unpadded" else padded("left", lengths=(12, 7, 1))
    ours = greedy(windowed(spec, window, sinks), inputs, 14)
    assert torch.equal(ours, eager_greedy(spec, inputs, window, sinks, 14))


def test_generate_makes_a_rolling_cache_and_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = windowed(LLAMA, window=6, sinks=3)
    held: list[int] = []
    update = rolling.RollingLayer.update

    def watch(self: rolling.RollingLayer, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out = update(self, *args, **kwargs)
        held.append(self.keys.shape[-2])
        return out

    monkeypatch.setattr(rolling.RollingLayer, "update", watch)
    out = model.generate(
        **whole(tokens(2, 40)), max_new_tokens=40, min_new_tokens=40, return_dict_in_generate=True
    )
    cache = out.past_key_values
    assert all(isinstance(layer, rolling.RollingLayer) for layer in cache.layers)
    assert cache.get_seq_length() == 79
    slack = cache.layers[0].slack
    assert max(held) <= 3 + 5 + 2 * slack
    # the dropped keys are freed, not merely hidden behind a view
    assert cache.layers[0].keys.untyped_storage().nbytes() == cache.layers[0].keys.nbytes


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 5}], ids=str)
@pytest.mark.parametrize("sinks", [0, 2])
def test_other_ways_to_generate(options: dict[str, int], sinks: int) -> None:
    # the same search over a growing cache, which the tests above hold against eager
    inputs = padded("left", lengths=(12, 9, 4))
    model = windowed(LLAMA, 5, sinks)
    rolled = greedy(model, inputs, 12, **options)
    plain = greedy(model, inputs, 12, **options, past_key_values=growing_cache(model))
    assert torch.equal(rolled, plain)


def growing_cache(model: Any) -> Any:
    from transformers.cache_utils import Cache, DynamicLayer

    # any cache that is not exactly the DynamicCache of generate() is left as it is
    return Cache(layers=[DynamicLayer() for _ in range(model.config.num_hidden_layers)])


@pytest.mark.parametrize("sinks", [0, 2])
def test_assisted_generation_takes_tokens_back(sinks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling, "SLACK", 5)  # as many as are guessed beside the prompt
    inputs = whole(tokens(1, 16))
    model = windowed(LLAMA, 5, sinks)
    plain = greedy(model, inputs, 16)
    helped = greedy(model, inputs, 16, assistant_model=build(LLAMA, "triton_fa2"))
    looked_up = greedy(model, inputs, 16, prompt_lookup_num_tokens=5)
    assert torch.equal(helped, plain)
    assert torch.equal(looked_up, plain)


@pytest.mark.parametrize("sinks", [0, 2])
def test_static_cache(sinks: int) -> None:
    inputs = padded("left")
    ours = greedy(windowed(LLAMA, 5, sinks), inputs, 10, cache_implementation="static")
    assert torch.equal(ours, eager_greedy(LLAMA, inputs, 5, sinks, 10))


def test_own_loop_with_rolling_cache() -> None:
    model = windowed(LLAMA, window=4, sinks=2)
    ids = tokens(2, 24)
    cache = RollingCache(model.config)
    parts = []
    with torch.no_grad():
        for part in ids.split([9, 1, 1, 6, 1, 1, 1, 4], dim=1):
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    assert_close(torch.cat(parts, dim=1), eager_logits(LLAMA, whole(ids), 4, 2))


LONG = padded("left", length=60, lengths=(60, 53, 11))


def in_parts(model: Any, cache: Any, sizes: list[int], how: str) -> Tensor:
    """Logits of LONG, given to the model in parts, each call in one of the ways to make it."""
    ids, mask, places = LONG["input_ids"], LONG["attention_mask"], positions(LONG["attention_mask"])
    out, end = [], 0
    for part, place in zip(ids.split(sizes, 1), places.split(sizes, 1), strict=True):
        end += part.shape[1]
        with torch.no_grad():
            if how == "keywords":
                found = model(
                    part, attention_mask=mask[:, :end], position_ids=place, past_key_values=cache
                )
            elif how == "positions":
                found = model(part, mask[:, :end], place, cache)
            elif how == "mask as position":
                found = model(part, mask[:, :end], position_ids=place, past_key_values=cache)
            else:  # no hook of the model as a whole
                inner = model.model(
                    part, attention_mask=mask[:, :end], position_ids=place, past_key_values=cache
                )
                out.append(model.lm_head(inner[0]))
                continue
        out.append(found.logits)
    return torch.cat(out, 1)


PARTS = {"ones": [1] * 60, "ten, ones": [10] + [1] * 50, "fives": [5] * 12, "one, rest": [1, 59]}


@pytest.mark.parametrize("how", ["keywords", "positions", "mask as position", "inner model"])
@pytest.mark.parametrize("parts", PARTS)
def test_first_tokens_behind_padding(parts: str, how: str) -> None:
    """However the model is called, a row's first tokens stay, not the padding before them."""
    model = windowed(LLAMA, window=4, sinks=3)
    cache = RollingCache(model.config)
    ours = in_parts(model, cache, PARTS[parts], how)
    assert_close(ours, eager_logits(LLAMA, LONG, 4, 3), LONG["attention_mask"])
    if len(PARTS[parts]) > 2:
        assert cache.layers[0].keys.shape[-2] < 30  # and the rest is let go


def test_first_tokens_of_a_model_that_was_loaded(tmp_path: Any) -> None:
    """Its settings are in the config; no hook is on it."""
    from transformers import AutoModelForCausalLM

    windowed(LLAMA, 4, 3).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="triton_swa").eval()
    ours = in_parts(again, RollingCache(again.config), [5] * 12, "keywords")
    assert_close(ours, eager_logits(LLAMA, LONG, 4, 3), LONG["attention_mask"])
    prompt = {name: x[:, :30] for name, x in LONG.items()}
    prompt = {name: x[:2] for name, x in prompt.items()}
    found = greedy(again, prompt, 20, past_key_values=RollingCache(again.config))
    assert torch.equal(found, eager_greedy(LLAMA, prompt, 4, 3, 20))


def test_prefill_one_by_one() -> None:
    inputs = padded("left", length=20, lengths=(20, 13, 5))
    model = windowed(LLAMA, 4, 3)
    ours = greedy(model, inputs, 20, prefill_chunk_size=1)
    assert torch.equal(ours, eager_greedy(LLAMA, inputs, 4, 3, 20))


def test_first_tokens_of_reordered_rows() -> None:
    """Rows are exchanged, repeated and selected between passes; then their masks are others."""
    model = windowed(LLAMA, 4, 3)
    ids, mask = LONG["input_ids"], LONG["attention_mask"]
    theirs = eager_logits(LLAMA, LONG, 4, 3)
    cache, order = RollingCache(model.config), torch.arange(3)
    moves = {
        15: ("reorder_cache", torch.tensor([2, 0, 1])),
        25: ("batch_select_indices", torch.tensor([2, 1])),
        35: ("batch_repeat_interleave", 2),
        45: ("reorder_cache", torch.tensor([3, 2, 1, 0])),
    }
    for end in range(5, 65, 5):
        if end - 5 in moves:
            name, value = moves[end - 5]
            getattr(cache, name)(value)
            order = order.repeat_interleave(2) if name.endswith("interleave") else order[value]
        now, seen = mask[order, :end], slice(end - 5, end)
        with torch.no_grad():
            ours = model(
                ids[order, seen], attention_mask=now, position_ids=positions(now)[:, seen],
                past_key_values=cache,
            ).logits  # fmt: skip
        assert_close(ours, theirs[order, seen], now[:, seen])


def test_what_nobody_has_told_is_not_dropped() -> None:
    """A mask of the caller's own in four dimensions bypasses the mask function."""
    model = windowed(LLAMA, 4, 2)
    cache, ids = RollingCache(model.config), tokens(2, 40)
    wide = written_out(LLAMA, torch.ones_like(ids), 4, 2)
    out = []
    for end in range(10, 41, 10):
        with torch.no_grad():
            given = wide[:, :, end - 10 : end, :end]
            out.append(model(ids[:, end - 10 : end], attention_mask=given, past_key_values=cache))
    assert cache.layers[0].keys.shape[-2] == 40
    assert_close(torch.cat([x.logits for x in out], 1), eager_logits(LLAMA, whole(ids), 4, 2))


def test_a_mask_that_is_left_out_later() -> None:
    """Without padding it may be; with it, who knows which columns were kept?"""
    model = windowed(LLAMA, 4, 2)
    for inputs, says in ((whole(tokens(2, 30)), None), (padded("left", 30, (30, 9)), "has none")):
        cache = RollingCache(model.config)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            if says is None:
                model(tokens(2, 1), past_key_values=cache)
            else:
                with pytest.raises(ValueError, match=says):
                    model(tokens(2, 1), past_key_values=cache)


def test_window_wider_than_the_text_changes_nothing() -> None:
    inputs = padded("left")
    assert torch.equal(
        greedy(windowed(LLAMA, 100, 4), inputs, 10), greedy(build(LLAMA, "triton_fa2"), inputs, 10)
    )


def test_training_step() -> None:
    model = windowed(LLAMA, 4, 2).train()
    oracle = copy.deepcopy(build(LLAMA, "eager")).train()
    inputs = whole(tokens(2, 13))
    labels = inputs["input_ids"]
    model(**inputs, labels=labels).loss.backward()
    mask = written_out(LLAMA, inputs["attention_mask"], 4, 2)
    oracle(labels, attention_mask=mask, labels=labels).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_compiles_into_one_graph() -> None:
    inputs = padded("left")
    torch._dynamo.reset()
    compiled = torch.compile(windowed(LLAMA, 4, 2), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        ours = compiled(**inputs, use_cache=False).logits
    theirs = eager_logits(LLAMA, inputs, 4, 2)
    assert_close(ours, theirs, inputs["attention_mask"])


def test_packed_rows_keep_their_own_first_tokens() -> None:
    model = windowed(LLAMA, 3, 2)
    ids = tokens(1, 16)
    places = torch.cat([torch.arange(7), torch.arange(9)])[None]
    with torch.no_grad():
        ours = model(ids, position_ids=places, use_cache=False).logits
    for part, logits in zip(ids.split([7, 9], dim=1), ours.split([7, 9], dim=1), strict=True):
        assert_close(logits, eager_logits(LLAMA, whole(part), 3, 2))


def test_settings_are_saved_with_the_model(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    windowed(LLAMA, 4, 2).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="triton_swa")
    inputs = whole(tokens(2, 13))
    with torch.no_grad():
        assert_close(again(**inputs).logits, eager_logits(LLAMA, inputs, 4, 2))


def test_negative_control_a_window_off_by_one_is_seen() -> None:
    inputs = whole(tokens(2, 13))
    with torch.no_grad():
        ours = windowed(LLAMA, 5, 2)(**inputs).logits
    assert worst(ours, eager_logits(LLAMA, inputs, 4, 2)) > 1e-2
    assert worst(ours, eager_logits(LLAMA, inputs, 5, 1)) > 1e-2


# --- bad input ----------------------------------------------------------------------------------


def test_without_a_window_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="configure_swa"):
        build(LLAMA, "triton_swa")(tokens(1, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "1 or more"),
        ({"window": 2.5}, "whole number"),
        ({"window": True}, "whole number"),
        ({"window": 4, "sinks": -1}, "0 or more"),
        ({}, "has no sliding_window"),
    ],
    ids=["zero", "fraction", "bool", "negative_sinks", "no_window"],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure_swa(copy.deepcopy(build(LLAMA, "triton_swa")), **arguments)


def test_default_window_is_the_configs() -> None:
    mistral = next(p.values[0] for p in MODELS if p.values[0].id == "mistral")
    model = copy.deepcopy(build(mistral, "triton_swa"))
    assert configure_swa(model, sinks=1) == hf_attn_patch.SwaSettings(window=5, sinks=1)


def test_other_implementation_is_refused() -> None:
    model = copy.deepcopy(build(LLAMA, "triton_fa2"))
    with pytest.raises(ValueError, match="triton_swa"):
        configure_swa(model, window=4)
    with pytest.raises(ValueError, match="RollingCache works with"):
        RollingCache(model.config)


def test_model_without_causal_layers_is_refused() -> None:
    bert = next(p.values[0] for p in having(lambda s: s.id == "bert"))
    with pytest.raises(ValueError, match="no causal attention layer"):
        configure_swa(copy.deepcopy(build(bert, "triton_swa")), window=4)
    with pytest.raises(ValueError, match="needs a window"):
        build(bert, "triton_swa")(**padded("right"))


def test_rolled_cache_and_another_implementation() -> None:
    model = windowed(LLAMA, 4, 2)
    cache = RollingCache(model.config)
    with torch.no_grad():
        model(tokens(1, 20), past_key_values=cache)
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="start over with a new cache"):
            model(tokens(1, 1), past_key_values=cache)


def test_a_cache_that_dropped_the_first_tokens_is_refused() -> None:
    mistral = next(p.values[0] for p in MODELS if p.values[0].id == "mistral")
    model = windowed(mistral, 4, 2)
    inputs = whole(tokens(1, 9))
    with pytest.raises(ValueError, match="has dropped them"):
        greedy(model, inputs, 4, cache_implementation="static")


def test_taking_back_more_than_is_held() -> None:
    layer = rolling.RollingLayer(window=4, sinks=0, slack=2)
    layer.update(torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8))
    with pytest.raises(ValueError, match="activate_past_recording"):
        layer.crop(-3)
    with pytest.raises(ValueError, match="negative number"):
        layer.crop(3)
    layer.update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
    layer.crop(-3)
    assert layer.get_seq_length() == 18
    assert layer.keys.shape[-2] == 3
