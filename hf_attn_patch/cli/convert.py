"""`hf-attn convert`: a checkpoint with another number of KV heads, or with latents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import JsonOption, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from hf_attn_converters import ConversionPlan, Verification
    from hf_attn_converters.calibration import Calibration


def convert_command(
    src: Annotated[
        Path, typer.Argument(help="Folder with config.json and weights, or a GGUF file.")
    ],
    dst: Annotated[Path, typer.Argument(help="Folder to write; must not exist, or be empty.")],
    num_key_value_heads: Annotated[
        int | None, typer.Option("--num-key-value-heads", "-n", help="KV heads wanted; 1 is MQA.")
    ] = None,
    to: Annotated[
        str, typer.Option(help="heads, or mla: latents in the form of deepseek_v3.")
    ] = "heads",
    kv_lora_rank: Annotated[
        int | None, typer.Option(help="With --to mla: columns of the latent, one of them constant.")
    ] = None,
    qk_rope_head_dim: Annotated[
        int | None, typer.Option(help="With --to mla: columns of the rotated key.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="How heads are merged; an unknown name lists the known. "
            "Default: csvd+fit with --calibration-text, else csvd; mla+fit and mla of latents."
        ),
    ] = None,
    group_heads: Annotated[
        bool, typer.Option(help="First put those heads together that lose least by sharing.")
    ] = False,
    calibration_text: Annotated[
        str | None,
        typer.Option(help="Text, JSONL or dataset that a calibrated method measures on."),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to calibrate on.")
    ] = None,
    own_text: Annotated[
        float | None,
        typer.Option(min=0, max=0.99, help="Share of the tokens that the model writes itself."),
    ] = None,
    fit_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps by which a +fit method fits each layer.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where calibration runs: cpu, cuda ... (the best there is)")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of whatever a calibration draws.")] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(min=1, help="Refuse KV heads that this many devices cannot share.")
    ] = None,
    dequantize: Annotated[
        bool, typer.Option(help="Convert a GGUF file's dequantized weights.")
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Load the result and compare it with the source.")
    ] = False,
    verify_text: Annotated[
        Path | None, typer.Option(help="Text for --verify; by default a short built-in one.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue an interrupted conversion to the same DST.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the plan and write nothing.")] = False,
    json: JsonOption = False,
) -> None:
    """Change a checkpoint's KV heads: MHA, GQA and MQA in both directions, streamed.

    More heads is exact. Fewer costs quality: see `hf-attn compare`. With --to mla keys and values
    become latents (docs/mla.md).
    """
    if verify_text is not None and not verify:
        raise ValueError("--verify-text goes with --verify")
    from hf_attn_converters import convert

    with progress_bar(quiet=dry_run) as update:
        result = convert(
            src,
            dst,
            num_key_value_heads=num_key_value_heads,
            to=to,
            kv_lora_rank=kv_lora_rank,
            qk_rope_head_dim=qk_rope_head_dim,
            method=method,
            group_heads=group_heads,
            calibration=calibration_of(
                text=calibration_text,
                tokens=calibration_tokens,
                own_text=own_text,
                seed=seed,
                device=device,
                fit_steps=fit_steps,
            ),
            tensor_parallel_size=tensor_parallel_size,
            dequantize=dequantize,
            resume=resume,
            verify=verify,
            verify_text=verify_text,
            dry_run=dry_run,
            progress=lambda done, total, name: update("converting", done, total, in_bytes=True),
            layer_progress=lambda done, total, name: update(
                "surveying" if name.startswith("survey") else "calibrating", done, total
            ),
        )
    if json:
        print_json(result.to_json())
        return
    print_table(["", "before", "after"], plan_rows(result.plan), title=result.plan.model_type)
    if dry_run:
        typer.echo(
            f"dry run: nothing written; {result.plan.disk_needed:,} bytes needed, "
            f"{result.plan.disk_free:,} free"
        )
        return
    if result.calibration is not None:
        typer.echo(f"calibrated on {result.calibration['origin']}")
    if result.verification is not None:
        typer.echo(verification_line(result.verification))
    line = f"wrote {dst} in {result.seconds:.1f} s"
    if result.calibration is None:  # else the time is not that of copying
        line += f" ({result.plan.bytes_after / result.seconds / 1e6:.0f} MB/s)"
    typer.echo(line)


def calibration_of(*, fit_steps: int | None, **options: Any) -> Calibration | None:
    """The options that were given as a Calibration; None when none was."""
    given = {name: value for name, value in options.items() if value is not None}
    if not given and fit_steps is None:
        return None
    from hf_attn_converters.calibration import Calibration
    from hf_attn_converters.calibration.fit import FitSettings

    if fit_steps is not None:
        given["fit"] = FitSettings(steps=fit_steps)
    return Calibration(**given)


def verification_line(found: Verification) -> str:
    """What --verify found, in one line."""
    if found.cosine is not None:
        numbers = f"cosine of the hidden states {found.cosine:.6f}"
    else:
        numbers = f"KL {found.kl:.3g}, top-1 agreement {found.top1:.1%}"
    tensors = "all tensors load"
    if found.source_lacks:
        tensors = (
            f"all tensors load but {', '.join(found.source_lacks)}, which the source lacks too"
        )
    return (
        f"verified: {tensors}; {numbers} on {found.tokens} tokens ({found.text}); "
        f"round trip: {found.round_trip}"
    )


def plan_rows(plan: ConversionPlan) -> list[list[str]]:
    """A plan as the rows of a table: what, before, after."""
    tensors = f"{plan.tensors}, {plan.tensors_changed} of them rewritten ({plan.method})"
    if plan.tensors_dropped:
        tensors += f", {plan.tensors_dropped} tied left out"
    kept = f"{plan.kv_heads_after}"
    if plan.kv_lora_rank is not None:
        kept = f"latent of {plan.kv_lora_rank}, rotated key of {plan.qk_rope_head_dim}"
    return [
        ["query heads", f"{plan.query_heads}", f"{plan.query_heads}"],
        ["KV heads", f"{plan.kv_heads_before}", kept],
        [
            "KV bytes per token",
            f"{plan.kv_bytes_per_token_before:,}",
            f"{plan.kv_bytes_per_token_after:,}",
        ],
        ["weights, bytes", f"{plan.bytes_before:,}", f"{plan.bytes_after:,}"],
        ["tensors", f"{plan.tensors + plan.tensors_dropped}", tensors],
        ["files", f"{plan.shards}", f"{plan.shards}"],
    ]
