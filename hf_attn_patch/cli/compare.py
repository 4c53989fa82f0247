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
    stride: Annotated[int, typer.Option(min=1, help="Tokens scored per window.")] = 256,
    new_tokens: Annotated[
        int, typer.Option(min=0, help="Greedy tokens per prompt; 0 leaves generation out.")
    ] = 64,
    chat: ChatOption = None,
    context: Annotated[int, typer.Option(min=1, help="Prompt tokens when timing.")] = 512,
    decode_tokens: Annotated[int, typer.Option(min=2, help="New tokens when timing.")] = 32,
    rounds: Annotated[int, typer.Option(min=0, help="Timing rounds; 0 leaves speed out.")] = 3,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    report: Annotated[Path | None, typer.Option(help="Write the comparison as Markdown.")] = None,
    json: JsonOption = False,
) -> None:
    """Compare checkpoints, implementations, or any mix of both. All are loaded at once."""
    from hf_attn_patch.compare import CompareOptions, compare, markdown, table, verdicts

    if report is not None and not report.absolute().parent.is_dir():
        raise ValueError(f"--report {report}: the folder does not exist")
    options = CompareOptions(
        text=text,
        prompts=prompts,
        max_tokens=max_tokens,
        window=window,
        stride=stride,
        new_tokens=new_tokens,
        chat=chat,
        context=context,
        decode_tokens=decode_tokens,
        rounds=rounds,
        dtype=dtype,
        device=device,
    )
    with progress_bar() as update:
        result = compare(source, candidates, options, progress=update)
    if report is not None:
        report.write_text("# Report\n\n" + markdown(result), encoding="utf-8")
    if json:
        print_json(result.to_json())
        return
    for line in verdicts(result):
        typer.echo(line)
    print_table(*table(result))
    if report is not None:
        typer.echo(f"wrote {report}")
