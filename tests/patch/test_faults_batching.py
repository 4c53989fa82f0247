"""A thousand requests through continuous batching, some cancelled, one too large, a stop midway.

What must hold: every answer has eager's tokens, every page is free again, the memory does not grow.
Scheduler and pages are transformers'; what is at stake is that reading pages in place never reads
those of another request, or of one that is gone.
"""

from __future__ import annotations

import functools
import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_continuous import MODELS, NAME, NEWER, batching, greedy
from tiny_models import TinyModel, build, tokens

if not NEWER:
    pytest.skip("counts the pages of transformers 5.19 and later", allow_module_level=True)

REQUESTS = 1000
ROUNDS = 4  # the memory is compared between them
MOST_NEW = 16
PAGES = 48  # of 16 tokens: a dozen requests, so that the others wait and pages change hands
TIMEOUT = 300  # seconds without any answer


@dataclass
class Load:
    """Requests of a seed, with what eager answers."""

    spec: TinyModel
    every: int = 1  # of the lengths
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    answers: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        chooser = random.Random(0)
        model = build(self.spec, "eager")
        for length in [*range(1, 80, self.every), 120, 200]:
            several = tokens(3, length, seed=chooser.randrange(10**6))
            options = {"max_new_tokens": MOST_NEW, "min_new_tokens": MOST_NEW, "do_sample": False}
            found = model.generate(several, attention_mask=torch.ones_like(several), **options)
            for ids, new in zip(several.tolist(), found[:, length:].tolist(), strict=True):
                self.prompts.append(tuple(ids))
                self.answers[tuple(ids)] = new


@functools.cache
def load_of(model: str) -> Load:
    return Load(MODELS[model], every=1 if model == "llama" else 7)


@contextmanager
def serving(spec: TinyModel, **options: Any) -> Iterator[Any]:
    manager = build(spec, NAME).init_continuous_batching(
        generation_config=greedy(),
        continuous_batching_config=batching(num_blocks=PAGES, **options),
    )
    manager.start()
    try:
        yield manager
    finally:
        if manager.is_running():
            manager.stop(block=True, timeout=TIMEOUT, hard_stop=True)


def pages_held(manager: Any) -> int:
    """Pages that are not free, once those kept for their content are let go."""
    cache = manager.batch_processor.cache
    with manager.pause() if manager.is_running() else nullcontext():
        cache.evict_cached_blocks()
        for allocator in cache.cache_allocators.values():
            assert not allocator.block_table, "a request that is gone has pages"
        return round((1 - cache.compute_free_capacity()) * cache.num_sectors)


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@dataclass
class Served:
    right: int = 0
    cancelled: int = 0


def serve(manager: Any, load: Load, requests: int, seed: int) -> Served:
    """Send requests and cancel every tenth at some time; every answer is compared."""
    chooser = random.Random(seed)
    served = Served()
    sent: dict[str, tuple[tuple[int, ...], int]] = {}
    doomed: dict[str, int] = {}  # to be cancelled when so many others are done
    for number in range(requests):
        prompt = chooser.choice(load.prompts)
        new = chooser.randint(1, MOST_NEW)
        if number % 10 == 3:
            name = manager.add_request(list(prompt), max_new_tokens=10_000)
            doomed[name] = number + chooser.randint(-9, 9)
        else:
            name = manager.add_request(list(prompt), max_new_tokens=new)
            sent[name] = (prompt, new)
    while sent:
        for name, due in list(doomed.items()):
            if served.right >= due or len(sent) < 10:
                manager.cancel_request(name)
                served.cancelled += 1
                del doomed[name]
        result = manager.get_result(timeout=TIMEOUT)
        assert result is not None, f"no answer in {TIMEOUT} s; {len(sent)} are missing"
        if result.request_id in sent and result.is_finished():
            prompt, new = sent.pop(result.request_id)
            assert result.error is None
            assert list(result.generated_tokens) == load.answers[prompt][:new]
            served.right += 1
    for name in doomed:
        manager.cancel_request(name)
    served.cancelled += len(doomed)
    return served


def settle(manager: Any) -> None:
    """Wait until the cancelled are gone too."""
    for _ in range(TIMEOUT * 100):
        if not manager.batch_processor.has_pending_requests():
            return
        manager.get_result(timeout=0.01)
    pytest.fail("cancelled requests are still being served")


@pytest.mark.parametrize("model", ["llama", "gemma3-W20"])
def test_a_thousand_requests(model: str) -> None:
    load = load_of(model)
    requests = REQUESTS if model == "llama" else REQUESTS // 10
    total, memory = Served(), []
    with serving(MODELS[model]) as manager:
        for part in range(ROUNDS):
            served = serve(manager, load, requests // ROUNDS, seed=part)
            total.right += served.right
            total.cancelled += served.cancelled
            settle(manager)
            assert pages_held(manager) == 0
            memory.append(resident())
    assert total.right + total.cancelled == requests
    assert total.cancelled >= requests // 10
    growth = memory[-1] - memory[0]  # the first round pays for what is allocated once
    print(f"{total.right} answers, {total.cancelled} cancelled, {growth // 1024} KiB more memory")
    assert growth < 16 << 20, f"{growth / 2**20:.1f} MiB more after {ROUNDS - 1} more rounds"


def test_a_request_larger_than_the_pool_beside_others() -> None:
    """transformers then gives up this manager: every request is answered or failed, none wrongly,
    no page stays taken, and the model serves the next manager at once."""
    load = load_of("llama")
    too_long = tokens(1, (PAGES + 8) * 16)[0].tolist()
    with serving(MODELS["llama"]) as manager:
        sent = {manager.add_request(list(p), max_new_tokens=9): p for p in load.prompts[40:60]}
        doomed = manager.add_request(too_long, max_new_tokens=4)
        answered, failed = 0, set()
        while answered + len(failed) < len(sent) + 1:
            result = manager.get_result(timeout=TIMEOUT)
            assert result is not None, "neither answered nor failed"
            if result.error:
                failed.add(result.request_id)
            elif result.is_finished():
                answered += 1
                wanted = load.answers[sent[result.request_id]][:9]
                assert list(result.generated_tokens) == wanted
        assert doomed in failed
        assert pages_held(manager) == 0
    with serving(MODELS["llama"]) as manager:
        assert serve(manager, load, 20, seed=6) == Served(right=18, cancelled=2)
        settle(manager)
        assert pages_held(manager) == 0


def test_a_stop_in_the_middle() -> None:
    """The thread ends although requests wait, and the model serves a new manager at once."""
    load = load_of("llama")
    for stopped_after in (0, 1, 7):
        with serving(MODELS["llama"]) as manager:
            for prompt in load.prompts[:60]:
                manager.add_request(list(prompt), max_new_tokens=MOST_NEW)
            for _ in range(stopped_after):
                assert manager.get_result(timeout=TIMEOUT) is not None
            manager.stop(block=True, timeout=TIMEOUT, hard_stop=True)
            assert not manager.is_running()
        with serving(MODELS["llama"]) as manager:
            assert serve(manager, load, 20, seed=stopped_after) == Served(18, 2)
