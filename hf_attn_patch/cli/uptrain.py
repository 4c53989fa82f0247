"""`hf-attn uptrain`: train a converted checkpoint on the distributions of its source.

Names, defaults and help are those of `hf_attn_converters.uptrain.UptrainOptions`, written again
because --help must not wait for torch; tests/cli/test_uptrain_script.py holds them together.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import JsonOption, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from hf_attn_converters.uptrain import Estimate, UptrainOptions, UptrainResult

OURS = "triton_fa2"


def uptrain_command(
    student: Annotated[Path, typer.Argument(help="Folder of the converted checkpoint.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist, or be empty.")],
    text: Annotated[
        list[str],
        typer.Option(help="Text, JSONL, Parquet or a dataset NAME:SPLIT; may be several."),
    ],
    teacher: Annotated[
        Path | None, typer.Option(help="Folder of the source that the student was converted from.")
    ] = None,
    eval_text: Annotated[
        str | None, typer.Option(help="Measure on this, not on a held-out part of the text.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="To train on; if not given, a share of the pretraining's.")
    ] = None,
    pretraining_tokens: Annotated[
        int | None,
        typer.Option(
            help="What the source was trained on; if not given, what is usual for its size."
        ),
    ] = None,
    sequence_length: Annotated[
        int, typer.Option(help="Tokens of a row; at most what the model has positions for.")
    ] = 512,
    loss: Annotated[
        str, typer.Option(help="kl (from the teacher, forward, temperature 1), ce or mix.")
    ] = "kl",
    kl_share: Annotated[float, typer.Option(help="Of the KL, in a mix.")] = 0.5,
    train: Annotated[str, typer.Option(help="attention, or all weights.")] = "all",
    learning_rate: Annotated[
        float, typer.Option(help="The peak, after the warm-up; then linear to zero.")
    ] = 5e-4,
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="AdamW's, on matrices only.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Rows at once, of each process.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    precision: Annotated[
        str,
        typer.Option(
            help="bf16 (arithmetic), bf16-weights or float32; auto: bf16 where that is fast."
        ),
    ] = "auto",
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Compute activations twice to save memory.")
    ] = False,
    evaluations: Annotated[
        int,
        typer.Option(
            help="In the course of the training, a checkpoint after each; one more before it."
        ),
    ] = 10,
    eval_tokens: Annotated[
        int, typer.Option(help="Held out; at most a tenth of the text.")
    ] = 16_384,
    patience: Annotated[
        int, typer.Option(help="Evaluations in a row without gain before it stops; 0 never stops.")
    ] = 3,
    min_gain: Annotated[
        float, typer.Option(help="What counts as a gain: a share of the best loss so far.")
    ] = 0.001,
    seed: Annotated[
        int, typer.Option(help="Of whatever is drawn: the order of the text, dropout.")
    ] = 0,
    attn_implementation: Annotated[
        str, typer.Option(help="As transformers knows it: triton_fa2, sdpa, eager and others.")
    ] = OURS,
    device: Annotated[str | None, typer.Option(help="cpu, to leave an accelerator unused.")] = None,
    report_to: Annotated[
        str,
        typer.Option(help="Loggers of transformers' Trainer, such as tensorboard; commas between."),
    ] = "none",
    control: Annotated[
        bool, typer.Option(help="Train the source likewise, to say how much was recovered.")
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Continue an interrupted run to the same output.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Uptrain a converted checkpoint; in many processes by `accelerate launch scripts/uptrain.py`.

    The loss is the forward KL from the source; see docs/uptraining.md.
    """
    given = {k: v for k, v in locals().items() if k != "json"}
    from hf_attn_converters.uptrain import UptrainOptions

    run(UptrainOptions(**given | {"text": tuple(text)}), json=json)


def run(options: UptrainOptions, *, json: bool) -> None:
    """Uptrain with progress on stderr and the result on stdout, both in the first process only."""
    import hf_attn_patch  # noqa: F401  registers the attention implementations
    from hf_attn_converters.uptrain import Hooks, uptrain

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
    before, after = (record["steps"][at]["loss"] for at in (0, -1))
    if after > before:
        line += (
            f"; worse than before (held-out loss {after:.4g} against {before:.4g}): give it more "
            "tokens, or a lower --learning-rate"
        )
    if record.get("recovered_percent") is not None:
        line += f"; recovered {record['recovered_percent']:.1f}% of what the conversion lost"
    return line
