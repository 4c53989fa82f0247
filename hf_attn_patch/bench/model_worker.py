"""One turn of one implementation on a whole model: what is timed, and what it is checked by.

Runs in a process of its own (:mod:`.worker`), which keeps the model in between. On a GPU one
process serves all implementations in turn, on a CPU each has its own. Shape letters: B sequences, N
tokens of context, V vocabulary.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .memory import Memory
from .shapes import load

STEPS = 8  # decoded in a turn
PERIOD = 512  # a cache is filled with what so many tokens left, again and again
SEEN = 4096  # numbers of an answer that are compared
PAGED = "triton_paged_flash2"

Work = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model on a device."""

    name: str  # a folder, or one of SHAPES
    dtype: str
    device: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is done with it."""

    phase: str  # prefill | decode | training
    batch: int
    context: int
    checkpointing: bool = False

    def __str__(self) -> str:
        again = ", checkpointing" if self.checkpointing else ""
        return f"{self.phase} of {self.batch} x {self.context} tokens{again}"


@dataclass(frozen=True)
class Turn:
    """Milliseconds of the phase's unit (a prompt, a step); bytes above what was held before."""

    ms: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the other side wants to know of a model before it plans."""

    bytes: int  # of the weights
    free_bytes: int  # of the device's memory
    layers: int
    heads: int
    kv_bytes: int  # of a token
    width: int
    inner: int
    vocabulary: int
    itemsize: int


@dataclass(frozen=True)
class _Loaded:
    model: Any
    kv: list[tuple[Tensor, Tensor]]  # keys and values of PERIOD tokens, of each layer [H, P, D]


def facts(subject: Subject) -> Facts:
    """Of a model; the first call loads it."""
    loaded = _load(subject)
    config = loaded.model.config.get_text_config(decoder=True)
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    itemsize = getattr(torch, subject.dtype).itemsize
    return Facts(
        bytes=weights,
        free_bytes=Memory(subject.device).free(),
        layers=len(loaded.kv),
        heads=config.num_attention_heads,
        kv_bytes=sum(x[:, 0].nbytes for layer in loaded.kv for x in layer),
        width=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        itemsize=itemsize,
    )


def answer(impl: str, subject: Subject, case: Case) -> list[float]:
    """Numbers that a wrong attention changes: the last token's logits, or the embeddings' gradient.

    It is a turn's warm-up too.
    """
    if subject.device != "cpu":
        torch.cuda.empty_cache()  # blocks of the case before fit this one badly
    with _ready(impl, subject, case) as (loaded, work):
        out = _gradient(loaded.model, case) if case.phase == "training" else work()
        out = out.detach().flatten()
        return out[:: max(1, out.numel() // SEEN)].float().tolist()


def turn(impl: str, subject: Subject, case: Case) -> Turn:
    """Time the work once; a cache that it works on counts as its memory."""
    memory = Memory(subject.device)
    memory.forget_peak()
    held = memory.now()
    with _ready(impl, subject, case) as (_, work):
        _wait(subject)
        memory.forget_peak()  # what making the case took on the way does not count
        start = time.perf_counter()
        work()
        _wait(subject)
        ms = (time.perf_counter() - start) * 1e3
        units = STEPS if case.phase == "decode" else 1
        return Turn(ms / units, memory.peak() - held)


# --- the model -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _load(subject: Subject) -> _Loaded:
    from transformers import DynamicCache

    torch.set_num_threads(subject.threads)
    model = load(subject.name, "eager", subject.dtype, subject.device)  # what every model has
    # every weight is touched too: those of a file come into memory when they are first read
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        ids = _ids(model, 1, PERIOD)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: list[Any] = list(cache.layers)
    return _Loaded(model, [(layer.keys[0], layer.values[0]) for layer in layers])


@contextmanager
def _ready(impl: str, subject: Subject, case: Case) -> Iterator[tuple[_Loaded, Work]]:
    """The model with an implementation, and the work to be done, with what it needs made."""
    loaded = _load(subject)
    model = loaded.model
    if model.config._attn_implementation != impl:
        model.set_attn_implementation(impl)
    if case.phase == "training":
        with _in_training(model, case.checkpointing):
            yield loaded, _training(model, case)
        return
    with torch.inference_mode():
        yield loaded, (_prefill if case.phase == "prefill" else _decode)(loaded, case)


def _wait(subject: Subject) -> None:
    if subject.device != "cpu":
        torch.cuda.synchronize()


def _ids(model: Any, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(1, model.config.vocab_size, (batch, tokens), generator=generator)
    return ids.to(model.device)


# --- prompts and steps ---------------------------------------------------------------------------


def _cache(model: Any) -> Any:
    """As `generate` makes it, in pages where that is the implementation's own way."""
    from transformers import DynamicCache

    from hf_attn_patch import PagedCache

    if model.config._attn_implementation == PAGED:
        return PagedCache(model)
    return DynamicCache(config=model.config)


def _prefill(loaded: _Loaded, case: Case) -> Work:
    model = loaded.model
    ids = _ids(model, case.batch, case.context)
    mask = torch.ones_like(ids)

    def work() -> Tensor:
        out = model(
            ids, attention_mask=mask, past_key_values=_cache(model), use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        return out.logits  # type: ignore[no-any-return]

    return work


def _decode(loaded: _Loaded, case: Case) -> Work:
    model, n = loaded.model, case.context
    cache = _cache(model)
    fill(cache, loaded.kv, case.batch, n)
    ids = _ids(model, case.batch, STEPS)
    mask = torch.ones(case.batch, n + STEPS, dtype=ids.dtype, device=ids.device)

    def work() -> Tensor:
        for step in range(STEPS):
            out = model(
                ids[:, step : step + 1], attention_mask=mask[:, : n + step + 1],
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        return out.logits  # type: ignore[no-any-return]

    return work


def fill(cache: Any, kv: list[tuple[Tensor, Tensor]], batch: int, tokens: int) -> None:
    """Keys and values of `tokens` tokens in every layer, in a fraction of a prefill's time.

    They are the model's own for a short text, repeated; each row begins elsewhere. With random ones
    a model is far from anything it was made for, and every rounding grows.
    """
    from hf_attn_patch.attention import paged
    from hf_attn_patch.attention.call import Call
    from hf_attn_patch.cache.page_storage import layer_of

    for number, known in enumerate(kv):
        device, period = known[0].device, known[0].shape[1]
        begin = 7 * torch.arange(batch, device=device)[:, None]
        places = (begin + torch.arange(tokens, device=device)) % period  # [B, N]
        k, v = (x[:, places].transpose(0, 1) for x in known)
        keys, values = cache.update(k, v, number)
        if (layer := layer_of(keys)) is not None:  # it stores when the attention function asks
            call = Call(query=keys, key=keys, value=values, window=layer.window)
            paged.run(call, layer, lambda call: call.key)


# --- training ------------------------------------------------------------------------------------


def _training(model: Any, case: Case) -> Work:
    ids = _ids(model, case.batch, case.context)

    def work() -> Tensor:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss  # type: ignore[no-any-return]

    return work


def _gradient(model: Any, case: Case) -> Tensor:
    """The loss's gradient at the embedded tokens, ``[B, N, width]``: every layer's backward."""
    ids = _ids(model, case.batch, case.context)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
    grad: Tensor | None = embedded.grad
    assert grad is not None
    return grad


@contextmanager
def _in_training(model: Any, checkpointing: bool) -> Iterator[None]:
    newer = hasattr(model, "activation_checkpointing_enable")
    prefix = "activation" if newer else "gradient"
    model.train()
    try:
        if checkpointing:
            getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
        yield
    finally:
        if checkpointing:
            getattr(model, f"{prefix}_checkpointing_disable")()
        model.zero_grad(set_to_none=True)
        model.eval()
