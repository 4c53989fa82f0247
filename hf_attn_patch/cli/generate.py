"""`hf-attn generate`: greedy text from a model with one of the implementations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from .common import ChatOption, DeviceOption, DtypeOption, JsonOption, print_json


@dataclass(frozen=True)
class Continuation:
    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_s: float
    decode_tokens_s: float | None  # None: a single token was written


def generate_command(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a causal language model.")],
    prompt: Annotated[list[str], typer.Option(help="What to continue; repeatable.")],
    attn: Annotated[str, typer.Option(help="attn_implementation, ours or any.")] = "triton_fa2",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
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
    if (window is not None or sinks) and attn != "triton_swa":
        raise ValueError(f"--window and --sinks belong to --attn triton_swa, not {attn}")
    if sinks and window is None:
        raise ValueError("--sinks needs a --window beside it")

    from hf_attn_patch.compare.models import ModelSpec, load

    spec = ModelSpec(path=model, implementation=attn, window=window, sinks=sinks)
    loaded = load(spec, dtype=dtype, device=device)
    if loaded.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer")
    found = [_continue(loaded, text, max_new_tokens, chat) for text in prompt]
    if json:
        print_json(
            {
                "model": model,
                "implementation": attn,
                "window": window,
                "sinks": sinks,
                "continuations": [asdict(c) for c in found],
            }
        )
        return
    for c in found:
        typer.echo(c.text)
        decode = f", decode {c.decode_tokens_s:.1f} tokens/s" if c.decode_tokens_s else ""
        typer.echo(
            f"{loaded.label}: {c.prompt_tokens} prompt tokens, {c.new_tokens} new; "
            f"prefill {c.prefill_tokens_s:.1f} tokens/s{decode}",
            err=True,
        )


def _continue(loaded: Any, prompt: str, new_tokens: int, chat: bool | None) -> Continuation:
    from hf_attn_patch.compare.generation import encode_prompt, greedy
    from hf_attn_patch.compare.speed import TokenClock

    inputs = encode_prompt(loaded.tokenizer, prompt, chat)
    clock = TokenClock()
    tokens = greedy(loaded, inputs, new_tokens, streamer=clock)
    start, first, last = clock.times[0], clock.times[1], clock.times[-1]
    length = inputs["input_ids"].shape[1]
    return Continuation(
        prompt=prompt,
        text=loaded.tokenizer.decode(tokens, skip_special_tokens=True),
        prompt_tokens=length,
        new_tokens=len(tokens),
        prefill_tokens_s=length / (first - start),
        decode_tokens_s=(len(tokens) - 1) / (last - first) if len(tokens) > 1 else None,
    )
