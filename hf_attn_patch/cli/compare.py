"""`hf-attn compare`: quality, speed and memory of checkpoints and implementations side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    ChatOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    print_json,
    print_table,
    progress_bar,
)

SPEC = "PATH, PATH@implementation or PATH@triton_swa:window=256:sinks=4"


def compare_command(
    source: Annotated[str, typer.Argument(help=f"What all is compared with: {SPEC}.")],
    candidates: Annotated[list[str], typer.Argument(help="The others, written the same way.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text that quality is measured on.")],
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt per line; by default taken from the text.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of the text; 0 leaves quality out.")
    ] = 4096,
    window: Annotated[int, typer.Option(min=2, help="Tokens per perplexity window.")] = 512,
    stride: Annotated[
        int, typer.Option(min=0, help="Tokens scored per window; 0: half of it.")
    ] = 0,
    new_tokens: Annotated[
        int, typer.Option(min=0, help="Greedy tokens per prompt; 0 leaves generation out.")
    ] = 64,
    chat: ChatOption = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            help="Prompt tokens when timing (512); the first is the table's, more a curve."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences at once when timing (1); may be repeated.")
    ] = None,
    decode_tokens: Annotated[int, typer.Option(min=2, help="New tokens when timing.")] = 32,
    rounds: Annotated[int, typer.Option(min=0, help="Timing rounds; 0 leaves speed out.")] = 3,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task of lm-evaluation-harness, or its YAML file; may be repeated."),
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(min=1, help="Examples of each task; by default all.")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(help="Write a page (.html) or Markdown (.md); may be repeated."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compare checkpoints, implementations, or any mix of both. All are loaded at once.

    Encoders too: masked-LM loss and sentence embeddings take the place of perplexity and texts.
    """
    from hf_attn_patch.compare import CompareOptions, compare, table, verdicts
    from hf_attn_patch.compare.page import check_report, write_report

    for path in report or ():
        check_report(path)
    contexts = context or [512]
    options = CompareOptions(
        text=text,
        prompts=prompts,
        max_tokens=max_tokens,
        window=window,
        stride=stride,
        new_tokens=new_tokens,
        chat=chat,
        context=contexts[0],
        more_contexts=tuple(contexts[1:]),
        batches=tuple(batch or [1]),
        decode_tokens=decode_tokens,
        rounds=rounds,
        tasks=tuple(task or ()),
        task_limit=task_limit,
        dtype=dtype,
        device=device,
    )
    with progress_bar() as update:
        result = compare(source, candidates, options, progress=update)
    for path in report or ():
        write_report(path, result)
    if json:
        print_json(result.to_json())
        return
    for verdict in verdicts(result):
        typer.echo(str(verdict))
    print_table(*table(result))
    for path in report or ():
        typer.echo(f"wrote {path}")
