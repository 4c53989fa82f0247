"""generate() with a PagedCache gives the tokens that eager attention and a DynamicCache give."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from tiny_models import EVERY, TinyModel, build, padded, tokens
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from hf_attn_patch import PagedCache, configure_swa
from hf_attn_patch.cache.block_pool import OutOfPagesError

NAME = "triton_paged_flash2"
BY_ID = {spec.id: spec for spec in EVERY}
LLAMA = BY_ID["llama"]
PAGED = (
    "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "gpt2", "phi", "falcon_gqa",
    "falcon_mqa",
)  # fmt: skip
each_model = pytest.mark.parametrize("spec", [BY_ID[name] for name in PAGED], ids=PAGED)
PLAIN = {"input_ids": tokens(2, 37)}
# rows of one full page and more, of less than a page, and of less than the padding
PADDED = padded("left", 37, (37, 20, 3))


def both(
    spec: TinyModel, inputs: dict[str, Tensor], cache: PagedCache, **options: Any
) -> tuple[Tensor, Tensor]:
    """(ours with the cache, eager's): all tokens."""
    if spec.kind == "causal" and "attention_mask" not in inputs:  # else pad tokens are hidden
        inputs = inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False} | options
    found = []
    ours = cache.config._attn_implementation
    for implementation, given in ((ours, {"past_key_values": cache}), (spec.oracle, {})):
        model = build(spec, implementation)  # before the seed: making weights draws from it
        torch.manual_seed(0)
        found.append(model.generate(**inputs, **given, **settings))
    return found[0], found[1]


def fresh(spec: TinyModel = LLAMA, **options: Any) -> PagedCache:
    # transformers takes every name with "flash" for its own class of Falcon
    name = "triton_fa2" if spec.id.startswith("falcon") else NAME
    return PagedCache(build(spec, name), **options)


@each_model
@pytest.mark.parametrize("inputs", [PLAIN, PADDED], ids=["plain", "padded"])
def test_greedy(spec: TinyModel, inputs: dict[str, Tensor]) -> None:
    cache = fresh(spec)
    ours, theirs = both(spec, inputs, cache)
    assert torch.equal(ours, theirs)
    # a second prompt with the same beginning, taken from its pages
    longer = {"input_ids": torch.cat([theirs, tokens(len(theirs), 5, seed=3)], dim=1)}
    if "attention_mask" in inputs:
        ones = torch.ones(len(theirs), longer["input_ids"].shape[1] - 37, dtype=torch.long)
        longer["attention_mask"] = torch.cat([inputs["attention_mask"], ones], dim=1)
    assert cache.start(**longer) >= 32
    ours, theirs = both(spec, longer, cache)
    assert torch.equal(ours, theirs)


STRATEGIES: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 16},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss", "falcon_gqa"])
@pytest.mark.parametrize("inputs", [PLAIN, PADDED], ids=["plain", "padded"])
def test_strategies(strategy: str, name: str, inputs: dict[str, Tensor]) -> None:
    if strategy == "prompt lookup":
        inputs = {key: x[:1] for key, x in inputs.items()}
    cache = fresh(BY_ID[name])
    ours, theirs = both(BY_ID[name], inputs, cache, **STRATEGIES[strategy])
    assert torch.equal(ours, theirs)
    if "num_return_sequences" in STRATEGIES[strategy]:
        # equal beginnings share their pages, with start() or without it
        assert cache.stats().shared > 0
        cache.start(**inputs)
        ours, theirs = both(BY_ID[name], inputs, cache, **STRATEGIES[strategy])
        assert torch.equal(ours, theirs)
        assert cache.stats().shared > 0


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss", "falcon_gqa"])
def test_assisted(name: str) -> None:
    """Guesses of another model change nothing, whatever of them is taken back."""
    spec = BY_ID[name]
    assistant = copy.deepcopy(build(spec, "triton_fa2"))
    with torch.no_grad():
        for parameter in assistant.parameters():  # wrong often enough, so that guesses are dropped
            parameter.add_(0.02 * torch.randn_like(parameter))
    ids, cache = tokens(1, 37), fresh(spec)
    ours = build(spec, cache.config._attn_implementation).generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=24,
        min_new_tokens=24, do_sample=False, assistant_model=assistant,
    )  # fmt: skip
    _, theirs = both(spec, {"input_ids": ids}, fresh(spec))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_resume(name: str) -> None:
    """The cache goes on where it stopped, without start(): the prompt begins with what it holds."""
    spec, cache = BY_ID[name], fresh(BY_ID[name])
    first, _ = both(spec, PLAIN, cache)
    longer = {"input_ids": torch.cat([first, tokens(2, 5, seed=3)], dim=1)}
    ours, theirs = both(spec, longer, cache)
    assert torch.equal(ours, theirs)


def test_one_wrong_page_changes_the_logits() -> None:
    """Negative control: the second row reads a page of the first."""
    model, ids, found = build(LLAMA, NAME), tokens(2, 40), []
    for wrong in (False, True):
        cache = fresh()
        with torch.no_grad():
            model(ids[:, :38], past_key_values=cache)
            model(ids[:, 38:39], past_key_values=cache)
            if wrong:
                table = cache.on_device[None].table
                table[1, 0] = table[0, 0]
            found.append(model(ids[:, 39:], past_key_values=cache).logits)
    gap = (found[0] - found[1]).abs().amax((1, 2)) / found[0].std()
    assert gap[0] == 0
    assert gap[1] > 1e-3


def test_windows_let_pages_go() -> None:
    """Mistral's window of few tokens: a long generation holds few pages."""
    spec = BY_ID["mistral"]
    cache = fresh(spec)
    both(spec, PLAIN, cache, max_new_tokens=200, min_new_tokens=200)
    assert cache.get_seq_length() == 236
    assert cache.stats().used <= 2 * ((5 + 64) // 16 + 2)


@pytest.mark.parametrize("sinks", [0, 3])
def test_with_triton_swa(sinks: int) -> None:
    """Pages of the first tokens stay; the rolling cache gives the same tokens."""
    model = copy.deepcopy(build(LLAMA, "triton_swa"))
    configure_swa(model, window=20, sinks=sinks)
    options = {"max_new_tokens": 80, "min_new_tokens": 80, "do_sample": False}
    theirs = model.generate(**PADDED, **options)
    cache = PagedCache(model)
    ours = model.generate(**PADDED, **options, past_key_values=cache)
    assert torch.equal(ours, theirs)
    assert cache.stats().used <= 3 * ((20 + 64) // 16 + 3)


def test_encoder_decoder() -> None:
    spec = BY_ID["bart"]
    model = build(spec, NAME)
    theirs = build(spec, "eager").generate(PLAIN["input_ids"], max_new_tokens=40, min_new_tokens=40)
    cache = EncoderDecoderCache(PagedCache(model), DynamicCache())
    ours = model.generate(
        PLAIN["input_ids"], max_new_tokens=40, min_new_tokens=40, past_key_values=cache
    )
    assert torch.equal(ours, theirs)


def test_float8_pages_are_near() -> None:
    """Logits after a prompt in pages of 8 bits: near, half the bytes, and not the same."""
    model, ids = build(LLAMA, NAME), tokens(2, 40)
    found = {}
    for dtype in (None, "fp8"):
        cache = fresh(dtype=dtype)
        with torch.no_grad():
            model(ids[:, :39], past_key_values=cache)
            found[dtype] = model(ids[:, 39:], past_key_values=cache).logits
        found[dtype, "bytes"] = cache.stats().used_bytes
    gap = float((found["fp8"] - found[None]).norm() / found[None].norm())
    assert 1e-4 < gap < 0.1, gap
    assert found[None, "bytes"] == 4 * found["fp8", "bytes"]


def test_offload_and_back() -> None:
    cache = fresh()
    first, _ = both(LLAMA, PLAIN, cache)
    cache.offload_to_host()
    assert all(layer.k_pages is None for layer in cache.layers)
    longer = {"input_ids": torch.cat([first, tokens(2, 5, seed=3)], dim=1)}
    ours, theirs = both(LLAMA, longer, cache)
    assert torch.equal(ours, theirs)


def test_equal_rows_share_a_prompt() -> None:
    cache = fresh()
    row = tokens(1, 64)
    both(LLAMA, {"input_ids": row.expand(4, -1)}, cache, max_new_tokens=8, min_new_tokens=8)
    stats = cache.stats()
    assert stats.shared == 4  # 64 tokens of 16
    assert stats.used == 4 + 4


def test_hit_rate_and_bytes() -> None:
    cache = fresh()
    assert cache.stats().bytes == 0
    both(LLAMA, PLAIN, cache)
    assert cache.start(**PLAIN) == 32
    stats = cache.stats()
    assert stats.hit_rate == 64 / 74
    # 2 layers, keys and values, 2 heads of 16 float32
    assert stats.used_bytes == 4 * 16 * 2 * 2 * 2 * 16 * 4
    cache.reset()
    assert cache.stats().used == cache.stats().bytes == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory of a CPU")
def test_pages_stay_where_they_are_until_they_are_twice_as_many() -> None:
    """A decode step that copied all pages would wait for that; limits leave no room beyond them."""
    cache, places = fresh(), []
    for new in (1, 20, 200):
        both(LLAMA, PLAIN, cache, max_new_tokens=new, min_new_tokens=new)
        k, v = cache.layers[0].pages
        assert len(k) == len(v) == cache.rows.tables[None].pool.size
        places.append(k.data_ptr())
        cache.start(**PLAIN)
    assert places[0] == places[1] != places[2]
    limited = fresh(max_bytes=7 * 16 * 2 * 2 * 2 * 16 * 4)
    both(LLAMA, PLAIN, limited, max_new_tokens=1, min_new_tokens=1)
    assert all(len(room) == 7 for layer in limited.layers for room in layer._room or ())


def test_a_limit_in_bytes() -> None:
    page = 16 * 2 * 2 * 2 * 16 * 4
    cache = fresh(max_bytes=7 * page)
    both(LLAMA, PLAIN, cache, max_new_tokens=11, min_new_tokens=11)
    with pytest.raises(OutOfPagesError, match=r"pages of 16 tokens .* more than max_bytes"):
        both(LLAMA, PLAIN | {"input_ids": tokens(2, 48)}, cache, max_new_tokens=9)
    # what was there still is
    assert cache.get_seq_length() == 48
    cache.start(**PLAIN)
    ours, theirs = both(LLAMA, PLAIN, cache, max_new_tokens=11, min_new_tokens=11)
    assert torch.equal(ours, theirs)
    assert cache.stats().bytes <= 7 * page


def test_a_forward_pass_that_failed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(LLAMA, NAME)
    cache = fresh()
    both(LLAMA, PLAIN, cache)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(model.model.layers[1].mlp, "forward", lambda x: x)
        patch.setattr(model.model.layers[0].mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(tokens(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="ended halfway"), torch.no_grad():
        model(tokens(2, 1), past_key_values=cache)
    cache.start(**PLAIN)
    ours, theirs = both(LLAMA, PLAIN, cache)
    assert torch.equal(ours, theirs)


def test_the_hook_goes_with_the_cache() -> None:
    model = build(LLAMA, NAME)
    gc.collect()
    before = len(model._forward_pre_hooks)
    cache = PagedCache(model)
    assert len(model._forward_pre_hooks) == before + 1
    del cache
    gc.collect()
    assert len(model._forward_pre_hooks) == before


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "page size": ({"page_size": 24}, "page_size must be one of"),
    "small page": ({"page_size": 8}, "page_size must be one of"),
    "dtype": ({"dtype": torch.int8}, "dtype must be None"),
    "bytes": ({"max_bytes": 0}, "max_bytes must be positive"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case: str) -> None:
    options, says = BAD[case]
    with pytest.raises(ValueError, match=says):
        fresh(**options)


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        PagedCache(build(LLAMA, "eager"))
    with pytest.raises(ValueError, match="takes a transformers model"):
        PagedCache(build(LLAMA, NAME).config)
    cache = fresh()
    both(LLAMA, PLAIN, cache)
    with pytest.raises(ValueError, match="belongs to another model"):
        build(BY_ID["gpt2"], NAME).generate(**PLAIN, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="cannot use a PagedCache"):  # it caches latents
        both(BY_ID["deepseek_v3"], PLAIN, fresh(BY_ID["deepseek_v3"]))
    with pytest.raises(ValueError, match="position bias"):
        spec = BY_ID["t5"]
        cache = EncoderDecoderCache(fresh(spec), DynamicCache())
        build(spec, NAME).generate(**PLAIN, past_key_values=cache, max_new_tokens=2)


def test_bad_calls() -> None:
    model, cache = build(LLAMA, NAME), fresh()
    with pytest.raises(ValueError, match="padding only before"), torch.no_grad():
        model(**padded("right"), past_key_values=cache)
    with pytest.raises(ValueError, match="no gradients"):
        model(**PLAIN, past_key_values=cache)
    both(LLAMA, PLAIN, cache)
    with pytest.raises(ValueError, match="holds 2 rows and got 3"), torch.no_grad():
        model(tokens(3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="negative number"):
        cache.crop(1)
    with pytest.raises(ValueError, match="the tokens are"):
        cache.start(PLAIN["input_ids"], torch.ones(2, 5))
    mask = torch.ones(2, 1, 1, cache.get_seq_length() + 1, dtype=torch.bool)
    mask[0, 0, 0, 3] = False
    with pytest.raises(ValueError, match="a mask of its own"), torch.no_grad():
        model(tokens(2, 1), past_key_values=cache, attention_mask=mask)
