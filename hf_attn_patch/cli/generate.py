"""`hf-attn generate`: greedy text from a model with one of the implementations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import ChatOption, DeviceOption, DtypeOption, JsonOption, print_json


class CacheChoice(str, Enum):
    DYNAMIC = "dynamic"
    PAGED = "paged"
    PAGED_FP8 = "paged-fp8"


@dataclass(frozen=True)
class Continuation:
    prompt: str
    text: str
    prompt_tokens: int
    reused_tokens: int  # of the prompt, found in pages
    new_tokens: int
    prefill_tokens_s: float
    decode_tokens_s: float | None  # None: a single token was written


def generate_command(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a causal language model.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What to continue; repeatable.")] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file, a field prompt in each line: all at once by continuous batching."
        ),
    ] = None,
    attn: Annotated[
        str | None,
        typer.Option(
            help="attn_implementation, ours or any; triton_fa2, with --batch triton_paged_flash2."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    cache: Annotated[
        CacheChoice, typer.Option(help="Of --prompt: pages are shared by equal beginnings.")
    ] = CacheChoice.DYNAMIC,
    page_size: Annotated[int, typer.Option(help="Tokens of a page.")] = 16,
    pages: Annotated[
        int | None, typer.Option(min=1, help="With --batch: pages in all; as many as it takes.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="triton_swa: tokens seen, the query's own included.")
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="triton_swa: first tokens kept.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    chat: ChatOption = None,
    json: JsonOption = False,
) -> None:
    """Continue prompts greedily and say how fast it went."""
    if (prompt is None) == (batch is None):
        raise ValueError("give prompts by --prompt, or a file of them by --batch")
    attn = attn or ("triton_fa2" if batch is None else "triton_paged_flash2")
    if (window is not None or sinks) and attn != "triton_swa":
        raise ValueError(f"--window and --sinks belong to --attn triton_swa, not {attn}")
    if sinks and window is None:
        raise ValueError("--sinks needs a --window beside it")
    if batch is not None and cache is not CacheChoice.DYNAMIC:
        raise ValueError("--batch has pages of its own: leave out --cache")
    if batch is None and pages is not None:
        raise ValueError("--pages belongs to --batch")

    from hf_attn_patch.loading import ModelSpec, load

    spec = ModelSpec(path=model, implementation=attn, window=window, sinks=sinks)
    head = {"model": model, "implementation": attn, "window": window, "sinks": sinks}
    if batch is not None:
        from .batch import generate_all, read_batch

        prompts = read_batch(batch)
        loaded = _with_tokenizer(load(spec, dtype=dtype, device=device))
        result = generate_all(loaded, prompts, max_new_tokens, page_size, pages, chat, quiet=json)
        if json:
            print_json(head | asdict(result))
        else:
            result.show()
        return
    assert prompt is not None
    loaded = _with_tokenizer(load(spec, dtype=dtype, device=device))
    held = _cache(loaded.model, cache, page_size)
    found = [_continue(loaded, text, max_new_tokens, chat, held) for text in prompt]
    if json:
        stats = {} if held is None else {"cache": held.stats().to_json()}
        print_json(head | stats | {"continuations": [asdict(c) for c in found]})
        return
    for c in found:
        typer.echo(c.text)
        decode = f", decode {c.decode_tokens_s:.1f} tokens/s" if c.decode_tokens_s else ""
        reused = f" ({c.reused_tokens} of them in pages)" if c.reused_tokens else ""
        typer.echo(
            f"{loaded.label}: {c.prompt_tokens} prompt tokens{reused}, {c.new_tokens} new; "
            f"prefill {c.prefill_tokens_s:.1f} tokens/s{decode}",
            err=True,
        )


def _with_tokenizer(loaded: Any) -> Any:
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.spec.path} has no tokenizer")
    return loaded


def _cache(model: Any, choice: CacheChoice, page_size: int) -> Any:
    if choice is CacheChoice.DYNAMIC:
        return None
    from hf_attn_patch import PagedCache

    dtype = "fp8" if choice is CacheChoice.PAGED_FP8 else None
    return PagedCache(model, page_size=page_size, dtype=dtype)


def _continue(
    loaded: Any, prompt: str, new_tokens: int, chat: bool | None, cache: Any
) -> Continuation:
    from hf_attn_patch.compare.generation import encode_prompt, greedy
    from hf_attn_patch.compare.speed import TokenClock

    inputs = encode_prompt(loaded.tokenizer, prompt, chat)
    reused = 0 if cache is None else cache.start(**inputs)
    clock = TokenClock()
    tokens = greedy(loaded, inputs, new_tokens, streamer=clock, cache=cache)
    start, first, last = clock.times[0], clock.times[1], clock.times[-1]
    length = inputs["input_ids"].shape[1]
    return Continuation(
        prompt=prompt,
        text=loaded.tokenizer.decode(tokens, skip_special_tokens=True),
        prompt_tokens=length,
        reused_tokens=reused,
        new_tokens=len(tokens),
        prefill_tokens_s=(length - reused) / (first - start),
        decode_tokens_s=(len(tokens) - 1) / (last - first) if len(tokens) > 1 else None,
    )
