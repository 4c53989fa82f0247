"""matplotlib figures as SVG that takes its colours from the page, so that both themes fit."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from .key import COLOURS, Model

WIDTH, HEIGHT = 4.6, 3.0  # inches: text stays legible on a phone, where a plot fills the width
TAG = 11.0  # points that a letter takes
# matplotlib draws with these, and the page's variables take their place.
INK, GRID = "#010203", "#040506"
SERIES = tuple(f"#0a0b{i:02x}" for i in range(COLOURS))
VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)"} | {
    colour: f"var(--s{i})" for i, colour in enumerate(SERIES)
}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "axes.grid": True,
    "axes.grid.which": "major",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


def draw(name: str, about: str, paint: Callable[[Any], None]) -> str:
    """The SVG of what `paint` puts on an axes. `name` must be the page's only one of its kind."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        paint(figure.subplots())
        part_tags(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), name, about)


def _inline(svg: str, name: str, about: str) -> str:
    """Without prologue, metadata and fixed size; ids of its own; the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    assert not set('<>"&') & set(about), about
    return svg.replace("<svg", f'<svg role="img" aria-label="{about}"', 1)


def line(ax: Any, model: Model, x: Sequence[float], y: Sequence[float]) -> None:
    """A model's curve, its letter at the end."""
    ax.plot(x, y, color=SERIES[model.colour], marker=model.marker, clip_on=False)
    tag(ax, model, x[-1], y[-1])


def point(ax: Any, model: Model, x: float, y: float) -> None:
    colour = SERIES[model.colour]
    ax.plot([x], [y], color=colour, marker=model.marker, markersize=8, clip_on=False, zorder=3)
    tag(ax, model, x, y)


def tag(ax: Any, model: Model, x: float, y: float) -> None:
    """A model's letter beside a point."""
    ax.annotate(
        model.letter,
        (x, y),
        xytext=(7, 0),
        textcoords="offset points",
        color=SERIES[model.colour],
        fontweight="bold",
        va="center",
        annotation_clip=False,
    )


def part_tags(figure: Any) -> None:
    """Push letters apart that would lie on each other, upwards."""
    from matplotlib.text import Annotation

    figure.draw_without_rendering()  # places are known only after the layout
    per_point = figure.dpi / 72
    for ax in figure.axes:
        tags = [child for child in ax.get_children() if isinstance(child, Annotation)]
        places = {t: ax.transData.transform(t.xy) / per_point for t in tags}
        done: list[tuple[float, float]] = []
        for t in sorted(tags, key=lambda t: float(places[t][1])):
            x, y = places[t]
            height = y
            for other_x, other_y in done:  # from the lowest
                if abs(x - other_x) < TAG and abs(height - other_y) < TAG:
                    height = other_y + TAG
            done.append((x, height))
            t.xyann = (7, height - y)


def plain_ticks(axis: Any) -> None:
    """1000 rather than 10³; with fewer than two decades, some numbers in between too."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = sorted(axis.get_view_interval())
    few = high / low < 100 if low > 0 else True
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def short(value: float) -> str:
    """A tick: 46k, 0.01, 2M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"
