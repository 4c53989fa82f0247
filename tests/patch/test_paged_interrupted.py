"""A forward pass that breaks off, anywhere: start() and generate() then give eager's tokens.

Whatever a layer has not written must not be found again, and whatever was there before still is.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import EVERY, TinyModel, build, padded, tokens
from torch import Tensor

from hf_attn_patch import PagedCache, configure_swa
from hf_attn_patch.cache.block_pool import PagePool
from hf_attn_patch.cache.page_storage import PagedLayer
from hf_attn_patch.cache.sequences import Rows
from hf_attn_patch.cache.step import DeviceTable

SPECS = {spec.id: spec for spec in EVERY}
GREEDY: dict[str, Any] = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
PROMPTS = {"plain": tokens(1, 40, seed=3), "rows": padded("left", 40, (40, 23, 40))}


class Interrupted(BaseException):
    """As KeyboardInterrupt is: no handler for errors sees it."""


def broken(*args: Any, **kwargs: Any) -> None:
    raise Interrupted


class Nth:
    """Raises at its n-th call, before or after what it stands for."""

    def __init__(self, function: Callable[..., Any], n: int, after: bool = False) -> None:
        self.function, self.left, self.after = function, n, after

    def __get__(self, instance: Any, owner: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Interrupted
        out = self.function(*args, **kwargs)
        if self.left == 0:
            raise Interrupted
        return out


def model_of(name: str, spec: TinyModel) -> Any:
    model = copy.deepcopy(build.__wrapped__(spec, name))
    if name == "triton_swa":
        configure_swa(model, window=20, sinks=2)
    return model


MODELS = {
    "triton_fa2": ("triton_fa2", "llama"),
    "windows": ("triton_fa2", "gemma3"),
    "triton_swa": ("triton_swa", "llama"),
    "triton_paged_flash2": ("triton_paged_flash2", "mistral"),
    "triton_mla": ("triton_mla", "deepseek_v3"),
}
# (what breaks, the function that does, at which of its calls in a pass; after it has done its work)
PLACES: dict[str, tuple[Any, str, int, bool]] = {
    "extending": (Rows, "extend", 1, False),
    "extended": (Rows, "extend", 1, True),
    "taking pages": (PagePool, "take", 1, True),
    "copying pages": (PagedLayer, "copy_pages", 2, False),
    "the table": (DeviceTable, "update", 1, False),
    "writing 0": (PagedLayer, "set_scales", 1, False),
    "writing 1": (PagedLayer, "set_scales", 2, False),
    "wrote 0": (PagedCache, "wrote", 1, False),
    "written 0": (PagedCache, "wrote", 1, True),
    "wrote 1": (PagedCache, "wrote", 2, False),
    "written 1": (PagedCache, "wrote", 2, True),
}
LAYERS = {f"{when} layer {i}": (when, i) for i in (0, 1) for when in ("before", "behind")}
WHERE = (*PLACES, *LAYERS, "lm head", "embedding")


def interrupt(model: Any, where: str, patch: pytest.MonkeyPatch, run: Callable[[], Any]) -> None:
    """`run` breaks off at a place of its first forward pass."""
    handle = None
    if where in PLACES:
        owner, name, n, after = PLACES[where]
        patch.setattr(owner, name, Nth(getattr(owner, name), n, after))
    elif where in LAYERS:
        when, number = LAYERS[where]
        layer = model.model.layers[number]
        handle = (
            layer.register_forward_pre_hook(broken)
            if when == "before"
            else layer.self_attn.register_forward_hook(broken)
        )
    else:
        module = model.lm_head if where == "lm head" else model.model.embed_tokens
        handle = module.register_forward_pre_hook(broken)
    with pytest.raises(Interrupted):
        run()
    patch.undo()
    if handle is not None:
        handle.remove()


def check(model: Any, cache: PagedCache, inputs: dict[str, Tensor], expected: Tensor) -> int:
    column = cache.start(**inputs)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **GREEDY), expected)
    return column


def masked(name: str) -> dict[str, Tensor]:
    inputs = PROMPTS[name]
    if isinstance(inputs, dict):
        return inputs
    return {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}


@pytest.mark.parametrize("kind", MODELS)
def test_any_place(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """First prompt and decode step, cache used before or not, padded rows, two of them equal."""
    name, family = MODELS[kind]
    model = model_of(name, SPECS[family])
    reference = model if name == "triton_swa" else build(SPECS[family], "eager")
    inputs = masked("rows")
    mask = inputs["attention_mask"]
    prompt = inputs | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    step = {
        "input_ids": tokens(3, 1),
        "attention_mask": torch.nn.functional.pad(mask, (0, 1), value=1),
        "position_ids": prompt["position_ids"][:, -1:] + 1,
    }
    with torch.no_grad():
        expected = reference.generate(**inputs, **GREEDY)
        for where in WHERE:
            for used in (False, True):
                for decoding in (False, True):
                    cache = PagedCache(model, max_bytes=1 << 22)
                    if used:
                        model(tokens(2, 25, seed=7), past_key_values=cache)
                        cache.start(**inputs)
                    if decoding:
                        model(**prompt, past_key_values=cache)
                    given = step if decoding else prompt
                    run = partial(model, **given, past_key_values=cache)
                    interrupt(model, where, monkeypatch, run)
                    said = f"{where}, used {used}, decoding {decoding}"
                    column = cache.start(**inputs)
                    found = model.generate(**inputs, past_key_values=cache, **GREEDY)
                    assert torch.equal(found, expected), said
                    assert column in (0, 16, 17, 32), said  # whole pages of the shortest row


def test_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens as with pages of 8 bits that nothing has disturbed."""
    model, inputs = model_of("triton_fa2", SPECS["llama"]), masked("rows")
    with torch.no_grad():
        whole = PagedCache(model, dtype="fp8")
        expected = model.generate(**inputs, past_key_values=whole, **GREEDY)
        for where in WHERE:
            cache = PagedCache(model, dtype="fp8")
            interrupt(
                model, where, monkeypatch,
                lambda c=cache: model.generate(**inputs, past_key_values=c, **GREEDY),
            )  # fmt: skip
            check(model, cache, inputs, expected)


def test_the_next_call_without_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken before the first layer nothing has happened; after it the cache refuses."""
    model, inputs = model_of("triton_fa2", SPECS["llama"]), masked("plain")
    expected = build(SPECS["llama"], "eager").generate(**inputs, **GREEDY)
    with torch.no_grad():
        for where in WHERE:
            cache = PagedCache(model)
            run = lambda c=cache: model.generate(**inputs, past_key_values=c, **GREEDY)  # noqa: E731
            interrupt(model, where, monkeypatch, run)
            if where in ("embedding", "before layer 0"):
                assert torch.equal(run(), expected)
            elif where in ("lm head", "behind layer 1", "written 1"):  # every layer has written
                assert cache.get_seq_length() == 40
            else:
                with pytest.raises(ValueError, match="ended halfway"):
                    model(inputs["input_ids"], past_key_values=cache)
                with pytest.raises(ValueError, match="ended halfway"):
                    cache.crop(-1)
                cache.reset()
                assert torch.equal(run(), expected)


def test_every_implementation_writes_through_the_cache() -> None:
    """Control: the places above are on the way of every pass."""
    for kind, (name, family) in MODELS.items():
        model = model_of(name, SPECS[family])
        cache = PagedCache(model)
        with torch.no_grad():
            for part in tokens(1, 20).split([18, 1, 1], 1):
                model(part, past_key_values=cache)
                assert cache.step is not None, kind
                assert cache.step.written == cache.step.entered == {0, 1}, kind
                assert not cache.unfinished


def test_moving_to_the_host_and_back_may_break_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of("triton_fa2", SPECS["llama"]), masked("plain")
    expected = build(SPECS["llama"], "eager").generate(**inputs, **GREEDY)
    cache = PagedCache(model)
    with torch.no_grad():
        model.generate(**inputs, past_key_values=cache, **GREEDY)
        cache.offload_to_host()
        monkeypatch.setattr(PagedLayer, "_more_room", broken)
        assert cache.start(**inputs) == 32
        with pytest.raises(Interrupted):
            model.generate(**inputs, past_key_values=cache, **GREEDY)
        monkeypatch.undo()
        assert check(model, cache, inputs, expected) == 32


@pytest.mark.parametrize("kind", MODELS)
def test_a_dropped_cache_is_freed_at_once(kind: str) -> None:
    """Without the cyclic collector; its hooks are gone from the model as well."""
    name, family = MODELS[kind]
    model = model_of(name, SPECS[family])
    before = (len(model._forward_pre_hooks), len(model._forward_hooks))
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            cache = PagedCache(model)
            model.generate(**masked("plain"), past_key_values=cache, **GREEDY)
            cache.start(**masked("plain"))
            pages = weakref.ref(cache.layers[0].pages[0].untyped_storage())
            twin = copy.deepcopy(cache)
            alive = [weakref.ref(cache), weakref.ref(twin), pages]
            del cache, twin
            assert [one() for one in alive] == [None] * 3
    finally:
        gc.enable()
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == before


def test_a_cache_keeps_no_model_alive() -> None:
    model = model_of("triton_fa2", SPECS["llama"])
    cache = PagedCache(model)
    model.generate(**masked("plain"), past_key_values=cache, **GREEDY)
    weight = weakref.ref(model.model.layers[0].self_attn.k_proj.weight)
    del model
    gc.collect()
    assert weight() is None
    assert cache.get_seq_length() == 41
    assert cache.start(**masked("plain")) == 0  # nobody knows what will be called
