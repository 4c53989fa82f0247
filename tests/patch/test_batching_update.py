"""The manager's cache, where the layers update it themselves. Also run on transformers 5.17."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_continuous import MODELS, NAME, NEWER, PROMPTS, batched, batching, eager, greedy
from tiny_models import build
from transformers.generation.continuous_batching import PagedAttentionCache, continuous_api

import hf_attn_patch
from hf_attn_patch.registration import functions as entry
from hf_attn_patch.transformers_compat import batching_update

PAGES = {"read_index": [], "write_index": [], "cu_seq_lens_q": None, "cu_seq_lens_k": {}}


@pytest.fixture
def registered() -> Iterator[None]:
    yield
    hf_attn_patch.register()


def test_the_manager_makes_ours_while_the_name_is_registered(registered: None) -> None:
    hf_attn_patch.register()
    made = continuous_api.PagedAttentionCache
    assert issubclass(made, PagedAttentionCache)
    assert (made is not PagedAttentionCache) == NEWER  # up to 5.18 layers cannot update it
    hf_attn_patch.unregister([NAME])
    assert continuous_api.PagedAttentionCache is PagedAttentionCache
    hf_attn_patch.register()
    hf_attn_patch.register()
    assert continuous_api.PagedAttentionCache.__mro__.count(PagedAttentionCache) == 1
    assert len(continuous_api.PagedAttentionCache.__mro__) == (3 if NEWER else 2)


def test_models_of_other_implementations_keep_their_own_update() -> None:
    implementation = "eager" if NEWER else "paged|eager"
    found = build(MODELS["gemma3-W20"], implementation).generate_batch(
        [list(PROMPTS[5])],
        generation_config=greedy(),
        continuous_batching_config=batching(),
        progress_bar=False,
    )
    (answer,) = found.values()
    assert [list(answer.generated_tokens)] == eager(MODELS["gemma3-W20"], PROMPTS[5:6])


class Cache:
    """As the manager's, by its signature; counts what reaches it."""

    def __init__(self, implementation: str) -> None:
        self.config = types.SimpleNamespace(_attn_implementation=implementation)
        self.updates = 0

    def update(self, key_states: Any, value_states: Any, layer_idx: int, kwargs: Any) -> Any:
        self.updates += 1
        return key_states * 2, value_states * 2


def test_an_update_hands_the_cache_over() -> None:
    cache = batching_update._handing_over(Cache)(NAME)
    k, v, kwargs = torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), {"read_index": []}
    assert cache.update(k, v, 0, kwargs=kwargs) == (k, v) and cache.updates == 0
    assert kwargs["cache"] is cache
    batching_update.taken_over(cache, 0)
    cache.update(k, v, 1, {})  # the next layer
    other = batching_update._handing_over(Cache)("eager")
    assert other.update(k, v, 0, kwargs := {})[0].sum() == 2 * k.sum()
    assert "cache" not in kwargs and other.updates == 1


def test_a_layer_that_keeps_its_keywords_is_refused() -> None:
    cache = batching_update._handing_over(Cache)(NAME)
    k = torch.ones(1, 2, 3, 4)
    cache.update(k, k, 4, {})
    with pytest.raises(ValueError, match=r"layer 4 did not hand its keywords on.*generate\(\)"):
        cache.update(k, k, 5, {})
    cache.update(k, k, 0, {})  # the next pass is not refused for it


def test_a_batch_without_its_cache_is_refused() -> None:
    module = build(MODELS["llama"], NAME).model.layers[0].self_attn
    q = torch.randn(1, 4, 3, 16)
    with pytest.raises(ValueError, match=r"without the cache that holds its pages.*generate\(\)"):
        entry.paged_forward(module, q, q[:, :2], q[:, :2], None, **PAGES)


def test_caches_are_let_go() -> None:
    """Neither the table of wrapped classes nor what layers share keeps a pool alive."""
    batched(MODELS["llama"], PROMPTS[:2])
    gc.collect()
    assert not [x for x in gc.get_objects() if isinstance(x, PagedAttentionCache)]
