"""`hf-attn uptrain`: train a converted checkpoint on the distributions of its source.

Defaults are in `hf_attn_converters.uptrain.UptrainOptions`: what is not given is not passed on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import JsonOption, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from hf_attn_converters.uptrain import Estimate, UptrainResult

OURS = "triton_fa2"


def uptrain_command(
    student: Annotated[Path, typer.Argument(help="Folder of the converted checkpoint.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist, or be empty.")],
    text: Annotated[
        list[str], typer.Option(help="Text, JSONL, Parquet or a dataset NAME:SPLIT; repeat.")
    ],
    teacher: Annotated[
        Path | None, typer.Option(help="The source that STUDENT was converted from.")
    ] = None,
    eval_text: Annotated[
        str | None, typer.Option(help="Measure on this, not on a held-out part of the text.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="To train on (1,000,000).")] = None,
    pretraining_tokens: Annotated[
        int | None, typer.Option(help="Of the source; 0.01% of them are trained on.")
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of a row (512).")] = None,
    loss: Annotated[
        str | None, typer.Option(help="kl (from the teacher; the default), ce or mix.")
    ] = None,
    kl_share: Annotated[float | None, typer.Option(help="Of the mix (0.5).")] = None,
    train: Annotated[str | None, typer.Option(help="attention, or all weights (all).")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="After the warm-up; then down to zero (5e-4).")
    ] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps (0.05).")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's (0).")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm (1).")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows at once, of each process (8).")
    ] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches per step (1).")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="bf16 (arithmetic; the default), bf16-weights or float32."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Compute activations twice to save memory.")
    ] = False,
    evaluations: Annotated[
        int | None, typer.Option(help="In all, a checkpoint after each (10).")
    ] = None,
    eval_tokens: Annotated[int | None, typer.Option(help="Held out (16,384).")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Evaluations without gain before it stops; 0: never (3).")
    ] = None,
    min_gain: Annotated[
        float | None, typer.Option(help="What counts as a gain, a share of the loss (0.001).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the text.")] = None,
    attn_implementation: Annotated[
        str, typer.Option(help="Also sdpa, eager and what `hf-attn list` names.")
    ] = OURS,
    device: Annotated[str | None, typer.Option(help="cpu, to leave an accelerator unused.")] = None,
    report_to: Annotated[
        str | None, typer.Option(help="Loggers of transformers' Trainer, such as tensorboard.")
    ] = None,
    control: Annotated[
        bool, typer.Option(help="Train the source likewise, to say how much was recovered.")
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Continue an interrupted run to the same --output.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Uptrain a converted checkpoint; in many processes by `accelerate launch scripts/uptrain.py`.

    The loss is the forward KL from the source; see docs/uptraining.md.
    """
    given = {k: v for k, v in locals().items() if v is not None and k != "json"}
    import hf_attn_patch  # noqa: F401  registers the attention implementations
    from hf_attn_converters.uptrain import Hooks, UptrainOptions, uptrain

    options = UptrainOptions(**given | {"text": tuple(text)})
    main = int(os.environ.get("RANK", 0)) == 0
    with progress_bar(quiet=not main) as update:

        def say(line: str) -> None:
            if main:
                typer.echo(line, err=True)

        result = uptrain(
            options,
            Hooks(
                progress=lambda done, total, what: update(f"training {what}", done, total),
                say=say,
                announce=lambda estimate: say(announcement(estimate)),
            ),
        )
    if not main:
        return
    if json:
        print_json(result.record)
        return
    print_table(*evaluations_table(result))
    typer.echo(summary(result))


def announcement(estimate: Estimate) -> str:
    """What is ahead, in one line."""
    line = (
        f"{estimate.what}: {estimate.tokens:,} tokens in {estimate.steps} steps of "
        f"{estimate.tokens_per_step:,}"
    )
    if estimate.passes > 1:
        line += f", the text {estimate.passes:.1f} times"
    if estimate.seconds is None:
        return line
    minutes, seconds = divmod(round(estimate.seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return line + f"; about {hours}:{minutes:02}:{seconds:02} (h:mm:ss), from one timed step"


def evaluations_table(result: UptrainResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per evaluation."""
    steps = result.record["steps"]
    names = [name for name in ("kl", "ppl") if name in steps[0]]
    rows = [[f"{s['tokens']:,}", *(f"{s[name]:.4g}" for name in names)] for s in steps]
    return ["tokens", *names], rows


def summary(result: UptrainResult) -> str:
    record: dict[str, Any] = result.record
    line = f"wrote {result.output} in {result.seconds:.1f} s"
    if record["stopped_early"]:
        line += f"; stopped on a plateau after {record['tokens']:,} tokens"
    if record.get("recovered_percent") is not None:
        line += f"; recovered {record['recovered_percent']:.1f}% of what the conversion lost"
    return line
