"""`hf-attn estimate`: KV cache, roofline times and the largest batch, from a config alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import JsonOption, print_json, print_table

if TYPE_CHECKING:
    from hf_attn_patch.estimate import Estimate, Shape


def estimate_command(
    model: Annotated[str, typer.Argument(help="Folder with config.json; no weights are needed.")],
    device: Annotated[
        str,
        typer.Option(help="h100, h200, a100, mi300x, ...; cpu is measured; a wrong one lists all."),
    ] = "h100",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each sequence.")] = 4096,
    dtype: Annotated[
        str | None, typer.Option(help="Of weights and cache; by default the config's.")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Output of `hf-attn compare --json`, to stand beside it.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """What a model will cost to serve, as it is and with every other number of KV heads.

    Lower bounds of time, by the roofline: docs/estimate.md has the formulas.
    """
    from hf_attn_patch.estimate import beside, estimate, find_device, kv_head_choices, read_shape

    shape = read_shape(model, dtype)
    chip = find_device(device)
    choices = kv_head_choices(shape) or [shape.kv_heads]
    found = {
        n: estimate(
            shape if n == shape.kv_heads else shape.with_kv_heads(n),
            chip,
            batch=batch,
            context=context,
        )
        for n in choices
    }
    rows = beside(shape, chip, measured) if measured is not None else []
    if json:
        print_json(_plain(shape, chip, found, rows, batch, context))
        return
    typer.echo(f"{shape.name}: {shape.model_type}, {shape.parameters:,} parameters, {shape.dtype}")
    typer.echo(f"{_layers(shape)}; {_cache(shape)}")
    if shape.left_out:
        typer.echo(f"the decoder's weights only: {shape.left_out}")
    typer.echo(
        f"{chip.title}: {chip.flops_s(shape.element_size) / 1e12:.3g} TFLOP/s, "
        f"{chip.gbytes_s:,.0f} GB/s, {chip.gbytes:.0f} GB ({chip.source}); batch {batch}, "
        f"context {context:,}"
    )
    if shape.element_size < 4 and chip.tflops < chip.float32_tflops:
        typer.echo(
            f"{chip.title} multiplies {shape.dtype} slower than float32 ({chip.tflops:.2g} against "
            f"{chip.float32_tflops:.2g} TFLOP/s): --dtype float32 shows what that costs in memory"
        )
    print_table(*_table(found, shape.kv_heads))
    if rows:
        header = ["measured", "batch", "context", "prefill tok/s", "of roofline",
                  "decode tok/s", "of roofline"]  # fmt: skip
        print_table(
            header,
            [
                [
                    r.label,
                    str(r.batch),
                    str(r.context),
                    f"{r.prefill_measured:,.4g}",
                    f"{r.prefill_measured / r.prefill_estimated:.0%}",
                    f"{r.decode_measured:,.4g}",
                    f"{r.decode_measured / r.decode_estimated:.0%}",
                ]
                for r in rows
            ],
        )


def _table(found: dict[int, Estimate], now: int) -> tuple[list[str], list[list[str]]]:
    header = ["KV heads", "KV B/token", "KV/sequence", "largest batch", "prefill", "FLOP/B",
              "bound by", "decode step", "FLOP/B", "bound by", "decode tok/s"]  # fmt: skip
    rows = []
    for n, e in found.items():
        rows.append(
            [
                f"{n} (now)" if n == now else str(n),
                f"{e.kv_bytes_per_token:,}",
                _size(e.kv_bytes),
                f"{e.largest_batch:,}" if e.largest_batch else "none",
                _time(e.prefill.seconds),
                f"{e.prefill.intensity:.3g}",
                e.prefill.bound,
                _time(e.decode.seconds),
                f"{e.decode.intensity:.3g}",
                e.decode.bound,
                f"{e.decode.tokens_s:,.0f}",
            ]
        )
    return header, rows


def _layers(shape: Shape) -> str:
    """ "32 layers: 26 with a window of 512, 6 full"."""
    kinds = Counter(
        "without a KV cache of their own"
        if not layer.cached
        else "full"
        if layer.window is None
        else f"with a window of {layer.window:,}"
        for layer in shape.layers
    )
    parts = [f"{count} {kind}" for kind, count in kinds.most_common()]
    return f"{len(shape.layers)} layers: {', '.join(parts)}"


def _cache(shape: Shape) -> str:
    layer = max(shape.layers, key=lambda layer: layer.cached)
    if shape.latent:
        return (
            f"{shape.query_heads} heads share a latent of {layer.v_dim} and a key of {layer.k_dim}"
        )
    return f"{shape.query_heads} query and {shape.kv_heads} KV heads of {layer.k_dim}"


def _plain(
    shape: Shape, chip: Any, found: dict[int, Estimate], rows: list[Any], batch: int, context: int
) -> dict[str, Any]:
    from dataclasses import asdict

    def one(e: Estimate) -> dict[str, Any]:
        passes = {"prefill": e.prefill, "decode": e.decode}
        return asdict(e) | {
            name: asdict(p)
            | {
                "seconds": p.seconds,
                "intensity": p.intensity,
                "bound": p.bound,
                "tokens_s": p.tokens_s,
            }
            for name, p in passes.items()
        }

    return {
        "model": asdict(shape) | {"kv_heads": shape.kv_heads},
        "device": asdict(chip),
        "batch": batch,
        "context": context,
        "estimates": [one(e) for e in found.values()],
        "measured": [asdict(row) for row in rows],
    }


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _size(count: float) -> str:
    from hf_attn_patch.compare.format import size

    return size(count)
