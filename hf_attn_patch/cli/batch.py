"""`hf-attn generate --batch`: a file of prompts through transformers' continuous batching."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer


@dataclass(frozen=True, kw_only=True)
class Answer:
    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    error: str | None  # of a request that failed; its text is what it had by then


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    answers: tuple[Answer, ...]  # in the file's order
    seconds: float
    new_tokens_s: float
    pages: int
    page_size: int

    def show(self) -> None:
        """Answers to stdout, a JSON object a line; what it took to stderr."""
        for answer in self.answers:
            typer.echo(json.dumps({"prompt": answer.prompt, "text": answer.text}))
        for answer in self.answers:
            if answer.error is not None:
                typer.echo(f"failed: {answer.prompt[:40]!r}: {answer.error}", err=True)
        typer.echo(
            f"{len(self.answers)} prompts in {self.seconds:.1f} s, {self.new_tokens_s:.1f} new "
            f"tokens/s; {self.pages} pages of {self.page_size} tokens",
            err=True,
        )


def read_batch(path: Path) -> list[str]:
    """The prompts of a JSONL file. Raises ValueError for a line that holds none."""
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, TypeError, KeyError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(
                f'{path} line {number}: expected an object such as {{"prompt": "Once upon"}}'
            )
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def generate_all(
    loaded: Any, prompts: Sequence[str], new_tokens: int, page_size: int, pages: int | None,
    chat: bool | None, *, quiet: bool,
) -> BatchResult:  # fmt: skip
    """All prompts through ``model.generate_batch``, greedily.

    Raises:
        ValueError: an implementation that does not batch continuously, or a page size that is not
            a multiple of 16.
        RuntimeError: what transformers raises for the batch as a whole.
    """
    from transformers import GenerationConfig

    from hf_attn_patch.compare.generation import encode_prompt
    from hf_attn_patch.transformers_compat.compat import batching_config

    ids = [
        encode_prompt(loaded.tokenizer, prompt, chat)["input_ids"][0].tolist() for prompt in prompts
    ]
    # one page more each: the manager asks for it before the last token is written
    enough = sum(-(-(len(row) + new_tokens) // page_size) + 1 for row in ids)
    pages = enough if pages is None else pages
    config = loaded.model.generation_config
    start = time.perf_counter()
    outputs = loaded.model.generate_batch(
        ids,
        generation_config=GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        ),
        continuous_batching_config=batching_config(page_size=page_size, pages=pages),
        progress_bar=not quiet,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    ordered = sorted(outputs.values(), key=lambda out: int(out.request_id.rpartition("_")[2]))
    if len(ordered) != len(prompts):
        raise RuntimeError(
            f"{len(prompts) - len(ordered)} of {len(prompts)} requests got no answer: a request "
            f"may need more than {pages} pages of {page_size} tokens; give more by --pages"
        )
    answers = tuple(
        Answer(
            prompt=prompt,
            text=loaded.tokenizer.decode(out.generated_tokens, skip_special_tokens=True),
            prompt_tokens=len(row),
            new_tokens=len(out.generated_tokens),
            error=str(out.error) if out.error else None,
        )
        for prompt, row, out in zip(prompts, ids, ordered, strict=True)
    )
    return BatchResult(
        answers=answers,
        seconds=seconds,
        new_tokens_s=sum(answer.new_tokens for answer in answers) / seconds,
        pages=pages,
        page_size=page_size,
    )
