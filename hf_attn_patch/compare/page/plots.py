"""The page's plots: each takes the comparison and says nothing when there is nothing to show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..options import Comparison
from ..speed import Speed
from .drawing import SERIES, draw, line, plain_ticks, point, short, tag
from .key import Model

LEAST_KL = 1e-6  # a logarithmic axis has no 0


@dataclass(frozen=True)
class Plot:
    title: str
    caption: str
    svg: str


def plots(comparison: Comparison, models: list[Model]) -> list[Plot]:
    """Those that have something to show."""
    makers: Sequence[Callable[[Comparison, list[Model]], Iterator[Plot]]] = (
        quality_and_cache,
        by_position,
        layer_errors,
        still_same,
        recovery,
        speed_by_context,
    )
    return [plot for make in makers for plot in make(comparison, models)]


def quality_and_cache(c: Comparison, models: list[Model]) -> Iterator[Plot]:
    """KL to the source against KV bytes per token: down and to the left is better."""
    found = [
        (model, speed.kv_bytes_per_token, quality.kl_mean)
        for model, speed, quality in zip(models, c.speed, c.quality, strict=False)
        if speed.kv_bytes_per_token
    ]
    if len(found) < 2:
        return

    def paint(ax: Any) -> None:
        ax.set_yscale("symlog", linthresh=0.01)  # the source's 0 has a place
        for model, held, kl in found:
            point(ax, model, held, max(kl or 0, 0))
        ax.set_xlim(0, 1.12 * max(held for _, held, _ in found))
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_formatter(lambda value, _: short(value))
        ax.yaxis.set_major_formatter(lambda value, _: short(value))
        ax.set(xlabel="KV cache, bytes per token", ylabel="KL to the source, nats")

    yield Plot(
        "Quality against KV cache",
        "Down is nearer to the source, left is a smaller cache.",
        draw("cache", "KL to the source by KV cache bytes per token", paint),
    )


def by_position(c: Comparison, models: list[Model]) -> Iterator[Plot]:
    measured = [
        (model, quality.kl_by_position)
        for model, quality in zip(models, c.quality, strict=False)
        if quality.kl_by_position
    ]
    found = [(model, bins) for model, bins in measured if max(b.kl for b in bins) > LEAST_KL]
    if not found:
        return
    zero = [model.letter for model, bins in measured if (model, bins) not in found]
    left_out = f" Not shown, being 0 everywhere: {', '.join(zero)}." if zero else ""

    def paint(ax: Any) -> None:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        for model, bins in found:
            line(ax, model, [b.begin for b in bins], [max(b.kl, LEAST_KL) for b in bins])
        ax.xaxis.set_major_formatter(lambda value, _: short(value))
        plain_ticks(ax.yaxis)
        ax.set(xlabel="tokens before it in the window", ylabel="KL to the source, nats")

    yield Plot(
        "KL by position",
        f"Mean over tokens with at least so much context, and less than twice as much.{left_out}",
        draw("position", "KL to the source by tokens of context", paint),
    )


def layer_errors(c: Comparison, models: list[Model]) -> Iterator[Plot]:
    found = [
        (model, record.layer_errors)
        for model, record in zip(models, c.records, strict=False)
        if record.layer_errors
    ]
    if not found:
        return

    def paint(ax: Any) -> None:
        for model, errors in found:
            line(ax, model, list(range(len(errors))), list(errors))
        ax.set_ylim(bottom=0)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set(xlabel="layer", ylabel="relative error")

    yield Plot(
        "What the conversion left over, by layer",
        "Squared error of each layer's output after its fit, relative to what the layer adds; "
        "from the conversion's own record.",
        draw("layers", "Error of the conversion by layer", paint),
    )


def still_same(c: Comparison, models: list[Model]) -> Iterator[Plot]:
    found = list(zip(models, c.generation, strict=False))[1:]
    if not found:
        return

    def paint(ax: Any) -> None:
        for model, g in found:
            shares = [100.0, *(100 * share for share in g.still_same)]
            ax.step(range(len(shares)), shares, where="post", color=SERIES[model.colour])
            tag(ax, model, len(shares) - 1, shares[-1])
        ax.set_ylim(-3, 103)
        ax.set(xlabel="new tokens", ylabel="prompts still the same, %")

    yield Plot(
        "How long greedy texts stay the source's",
        "Share of prompts without a first difference so far.",
        draw("same", "Share of prompts still the same by new tokens", paint),
    )


def recovery(c: Comparison, models: list[Model]) -> Iterator[Plot]:
    found = [
        (model, [(p.tokens, p.kl) for p in record.recovery if p.kl is not None])
        for model, record in zip(models, c.records, strict=False)
    ]
    found = [(model, points) for model, points in found if points]
    if not found:
        return

    def paint(ax: Any) -> None:
        ax.set_yscale("log")
        for model, points in found:
            line(ax, model, [t for t, _ in points], [max(kl, LEAST_KL) for _, kl in points])
        ax.xaxis.set_major_formatter(lambda value, _: short(value))
        plain_ticks(ax.yaxis)
        ax.set(xlabel="tokens of uptraining", ylabel="KL to the source, nats")

    yield Plot(
        "Recovery by uptraining",
        "KL on the held-out text of the uptraining; from its own record.",
        draw("recovery", "KL to the source by tokens of uptraining", paint),
    )


def speed_by_context(c: Comparison, models: list[Model]) -> Iterator[Plot]:
    """Decode and prefill against context, for the first batch; against batch if that varies."""
    batch, context = (c.speed[0].batch, c.speed[0].context) if c.speed else (0, 0)
    at_batch = [s for s in c.sweep if s.batch == batch]
    at_context = [s for s in c.sweep if s.context == context]
    for what, attribute in (("Decode", "decode_tokens_s"), ("Prefill", "prefill_tokens_s")):
        yield from _speed_plot(
            models, at_batch, "context", attribute,
            f"{what} speed by context", f"Batch {batch}; more is better.", "prompt tokens",
        )  # fmt: skip
        yield from _speed_plot(
            models, at_context, "batch", attribute,
            f"{what} speed by batch", f"{context} prompt tokens; all sequences together.",
            "sequences at once",
        )  # fmt: skip


def _speed_plot(
    models: Iterable[Model],
    rows: Sequence[Speed],
    by: str,
    attribute: str,
    title: str,
    caption: str,
    xlabel: str,
) -> Iterator[Plot]:
    if len({getattr(s, by) for s in rows}) < 2 or getattr(rows[0], attribute) is None:
        return

    def paint(ax: Any) -> None:
        ax.set_xscale("log", base=2)
        for model in models:
            mine = sorted((s for s in rows if s.label == model.label), key=lambda s: getattr(s, by))
            line(ax, model, [getattr(s, by) for s in mine], [getattr(s, attribute) for s in mine])
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_formatter(lambda value, _: short(value))
        ax.yaxis.set_major_formatter(lambda value, _: short(value))
        ax.set(xlabel=xlabel, ylabel="tokens per second")

    yield Plot(title, caption, draw(f"{attribute}-{by}", title, paint))
