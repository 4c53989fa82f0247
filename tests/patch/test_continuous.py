"""Continuous batching: tokens equal eager's, whatever the scheduling. Also run on 5.17."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from tiny_models import EVERY, TinyModel, build, tokens
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import initialization

from hf_attn_patch.attention import batching_tables, continuous
from hf_attn_patch.registration.functions import paged_forward
from hf_attn_patch.transformers_compat.continuous_cache import layer_pages

NAME = "triton_paged_flash2"
NEWER = "page_size" in ContinuousBatchingConfig.__dataclass_fields__
PAGE = 16
NEW = 24
# below, at and beyond a page, and beyond max_batch_tokens, so that prompts come in pieces
PROMPTS = tuple(tuple(tokens(1, n, seed=n)[0].tolist()) for n in (1, 3, 16, 17, 47, 90, 5, 33))


def tiny(model_id: str, **arguments: Any) -> TinyModel:
    spec = next(spec for spec in EVERY if spec.id == model_id)
    return replace(spec, arguments=spec.arguments | arguments)


# windows below a page, of whole pages, and neither; the prompts wrap all of them
MODELS = {
    "llama": tiny("llama"),
    "mistral-W5": tiny("mistral"),
    "mistral-W32": tiny("mistral", sliding_window=32),
    "mistral-W40": tiny("mistral", sliding_window=40),
    "gemma2-W20-softcap": tiny("gemma2", sliding_window=20),
    "gemma3-W20": tiny("gemma3", sliding_window=20),
    "gpt_oss-W20-sinks": tiny("gpt_oss", sliding_window=20),
}


def batching(**options: Any) -> Any:
    """A small ContinuousBatchingConfig, by the release's name for a page."""
    settings = {"page_size": PAGE, "num_blocks": 96, "max_batch_tokens": 64} | options
    if not NEWER:
        settings["block_size"] = settings.pop("page_size")
    return ContinuousBatchingConfig(**settings)


def greedy(**options: Any) -> GenerationConfig:
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return GenerationConfig(**settings | options)


def answers(spec: TinyModel, prompts: tuple[tuple[int, ...], ...], **options: Any) -> list[Any]:
    """What generate_batch gives, in the order of the prompts."""
    found = build(spec, NAME).generate_batch(
        [list(prompt) for prompt in prompts],
        generation_config=greedy(),
        continuous_batching_config=batching(**options),
        progress_bar=False,
    )
    assert len(found) == len(prompts)
    return sorted(found.values(), key=lambda answer: int(answer.request_id.split("_")[1]))


def batched(
    spec: TinyModel, prompts: tuple[tuple[int, ...], ...] = PROMPTS, **options: Any
) -> list[list[int]]:
    found = answers(spec, prompts, **options)
    assert [answer.error for answer in found] == [None] * len(prompts)
    return [list(answer.generated_tokens) for answer in found]


@functools.cache
def _eager(spec: TinyModel, prompt: tuple[int, ...]) -> list[int]:
    ids = torch.tensor([prompt])
    out = build(spec, "eager").generate(
        ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def eager(spec: TinyModel, prompts: tuple[tuple[int, ...], ...] = PROMPTS) -> list[list[int]]:
    return [_eager(spec, prompt) for prompt in prompts]


@dataclass
class Routes:
    """How often each way through :mod:`hf_attn_patch.attention.continuous` was taken."""

    taken: dict[str, int] = field(default_factory=dict)
    forwarded: int = 0  # tokens that went through the first layer


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Routes]:
    found = Routes()

    def spy(name: str) -> None:
        original = getattr(continuous, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            found.taken[name] = found.taken.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(continuous, name, counted)

    for name in ("_in_place", "_table", "windowed_keys", "_one_token_each"):
        spy(name)
    whole = continuous.attend_pages

    def attend_pages(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.forwarded += query.shape[2] if module.layer_idx == 0 else 0
        return whole(module, query, *args, **kwargs)

    monkeypatch.setattr(continuous, "attend_pages", attend_pages)
    yield found


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_tokens_equal_eagers(model: str, routes: Routes) -> None:
    assert batched(MODELS[model]) == eager(MODELS[model])
    assert routes.taken["_in_place"] > NEW  # decoding never copies keys together
    assert ("windowed_keys" in routes.taken) == ("-W" in model)  # prompts in pieces do, in windows


@pytest.mark.parametrize("model", MODELS)
def test_more_requests_than_fit(model: str) -> None:
    """The pool holds the longest request and little else: the others wait, or are put off."""
    assert batched(MODELS[model], num_blocks=18) == eager(MODELS[model])


@pytest.mark.parametrize("sharing", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("model", ["llama", "mistral-W40", "gemma3-W20"])
def test_prefix_sharing(model: str, sharing: bool, routes: Routes) -> None:
    """Requests with a common beginning, more than are served at once."""
    common = tuple(tokens(1, 3 * PAGE + 5, seed=3)[0].tolist())
    prompts = (common, *(common + prompt[:9] for prompt in PROMPTS))
    options = {"allow_block_sharing": sharing, "max_requests_per_batch": 2}
    if not NEWER:
        options.pop("max_requests_per_batch")
    spec = MODELS[model]
    assert batched(spec, prompts, **options, max_batch_tokens=60) == eager(spec, prompts)
    all_tokens = sum(map(len, prompts)) + len(prompts) * (NEW - 1)
    if sharing and model == "llama":  # transformers shares where no layer has a window
        assert routes.forwarded <= all_tokens - 4 * 3 * PAGE
    else:
        assert routes.forwarded == all_tokens


def test_several_answers_to_one_prompt() -> None:
    """The manager forks requests: pages are shared or copied, then written apart."""
    spec = MODELS["gemma3-W20"]
    prompt = PROMPTS[4]
    found = build(spec, NAME).generate_batch(
        [list(prompt)],
        generation_config=greedy(num_return_sequences=3, do_sample=True, top_k=1),
        continuous_batching_config=batching(),
        progress_bar=False,
    )
    assert len(found) == 3 or not NEWER  # 5.17 gives back the first to be ready
    for answer in found.values():
        assert [list(answer.generated_tokens)] == eager(spec, (prompt,))


@pytest.mark.parametrize("page_size", [32, 64, 256])
def test_page_sizes(page_size: int) -> None:
    for model in ("llama", "gpt_oss-W20-sinks"):
        assert batched(MODELS[model], page_size=page_size, num_blocks=24) == eager(MODELS[model])


@pytest.mark.parametrize("model", ["llama", "gpt_oss-W20-sinks"])
def test_generate_too(model: str) -> None:
    """Without the manager the name does what triton_fa2 does."""
    prompt = torch.tensor([PROMPTS[5]])
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    ours = build(MODELS[model], NAME).generate(prompt, **options)
    assert ours[0, prompt.shape[1] :].tolist() == _eager(MODELS[model], PROMPTS[5])


def test_bfloat16() -> None:
    """Rounding may turn near ties, so most tokens and not all."""
    spec = MODELS["llama"]
    model = build(replace(spec), NAME).to(torch.bfloat16)
    found = model.generate_batch(
        [list(prompt) for prompt in PROMPTS],
        generation_config=greedy(max_new_tokens=1),
        continuous_batching_config=batching(),
        progress_bar=False,
    )
    first = {tuple(one.prompt_ids): one.generated_tokens[0] for one in found.values()}
    same = [first[prompt] == _eager(spec, prompt)[0] for prompt in PROMPTS]
    assert sum(same) >= len(PROMPTS) - 2


# --- the manager at work --------------------------------------------------------------------------


def test_a_cancelled_request_leaves_the_others_alone() -> None:
    spec = MODELS["gemma3-W20"]
    model = build(spec, NAME)
    manager = model.init_continuous_batching(
        generation_config=greedy(), continuous_batching_config=batching()
    )
    manager.start()
    try:
        doomed = manager.add_request(list(PROMPTS[5]), max_new_tokens=2000, streaming=True)
        kept = [manager.add_request(list(prompt), max_new_tokens=NEW) for prompt in PROMPTS[:3]]
        found: dict[str, list[int]] = {}
        seen = 0
        while len(found) < len(kept):
            result = manager.get_result(timeout=300)
            assert result is not None, "the manager has stopped"
            if result.request_id == doomed:
                seen += 1
                if seen == 3:
                    manager.cancel_request(doomed)
            elif result.is_finished():
                found[result.request_id] = list(result.generated_tokens)
        later = manager.add_request(list(PROMPTS[4]), max_new_tokens=NEW)
        while later not in found:
            result = manager.get_result(timeout=300)
            assert result is not None, "the manager has stopped"
            if result.request_id == later and result.is_finished():
                found[later] = list(result.generated_tokens)
    finally:
        manager.stop(block=True, timeout=300)
    assert seen >= 3
    wanted = eager(spec, (*PROMPTS[:3], PROMPTS[4]))
    assert [found[request] for request in (*kept, later)] == wanted


def test_a_request_that_cannot_fit_fails_and_the_next_batch_is_served() -> None:
    spec = MODELS["llama"]
    too_long = tuple(tokens(1, 20 * PAGE)[0].tolist())
    failed = answers(spec, (too_long,), num_blocks=4)
    assert failed[0].error and not failed[0].generated_tokens
    assert batched(spec, PROMPTS[:3], num_blocks=12) == eager(spec, PROMPTS[:3])


def test_page_size_that_the_kernels_cannot_read() -> None:
    (found,) = answers(MODELS["llama"], PROMPTS[2:3], page_size=24)
    assert "pages of 24 tokens" in found.error and "multiples of 16" in found.error


def test_a_cache_that_is_not_the_managers() -> None:
    module = build(MODELS["llama"], NAME).model.layers[0].self_attn
    q = torch.randn(1, 4, 3, 16)
    rest = {"cu_seq_lens_q": None, "cu_seq_lens_k": None, "read_index": [], "write_index": []}
    with pytest.raises(ValueError, match="past_key_values"):
        paged_forward(module, q, q[:, :2], q[:, :2], None, cache={}, **rest)
    with pytest.raises(ValueError, match=r"PagedAttentionCache.*got int"):
        layer_pages(1, 0)


# --- the fast path for decoding, which transformers takes on GPUs only ----------------------------


@pytest.fixture
def block_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the manager make block tables although there is no GPU."""
    monkeypatch.setattr(
        initialization, "ensure_decode_fast_path_is_available", lambda *args, **kwargs: None
    )


def test_block_tables(block_tables: None, routes: Routes) -> None:
    assert batched(MODELS["llama"], max_blocks_per_request=10) == eager(MODELS["llama"])
    assert routes.taken["_one_token_each"] > NEW


# --- tables ---------------------------------------------------------------------------------------


def test_one_table_for_all_layers(routes: Routes) -> None:
    """Two layers of one kind share it; a pass without earlier tokens needs none."""
    batched(MODELS["llama"])
    assert routes.taken["_table"] * 2 == routes.taken["_in_place"]


@pytest.mark.parametrize("model", ["llama", "mistral-W40"])
def test_negative_control_two_pages_swapped(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of the right pages in the wrong order must change tokens, where order matters."""
    right = batching_tables.block_table

    def swapped(*args: Any) -> Tensor:
        table = right(*args)
        both = (table[:, :2] >= 0).all(1, keepdim=True) if table.shape[1] > 1 else None
        if both is not None:
            table[:, :2] = torch.where(both, table[:, :2].flip(1), table[:, :2])
        return table

    def shifted(*args: Any) -> Tensor:
        return torch.where(right(*args) > 0, right(*args) - 1, right(*args))

    for wrong in (swapped, shifted):
        monkeypatch.setattr(batching_tables, "block_table", wrong)
        assert batched(MODELS[model]) != eager(MODELS[model])


# --- CUDA graphs: what can be said without one ----------------------------------------------------


def test_the_mask_of_a_graph_under_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a graph is captured nothing may be counted; the manager's batches need no count."""
    from hf_attn_patch.masking import functions

    monkeypatch.setattr(functions, "_captured", lambda x: True)
    assert batched(MODELS["llama"], PROMPTS[:4]) == eager(MODELS["llama"], PROMPTS[:4])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match=r"CUDA graph.*cu_seq_lens_q"):
        build(MODELS["llama"], NAME)(tokens(1, 6), position_ids=positions, use_cache=False)
