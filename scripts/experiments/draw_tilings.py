"""Draw how the kernels cut their work: the pictures of docs/how.

python scripts/experiments/draw_tilings.py     # writes docs/how/*.svg

Which tiles are read and which need a mask is worked out from the positions, as the kernels do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUT = Path(__file__).resolve().parents[2] / "docs" / "how"
SKIPPED, PLAIN, MASKED, SINK, NOW = "#eceff3", "#7fb3e6", "#f2b668", "#9ccf8f", "#2b4a75"
EDGE = "#ffffff"


def kinds(tokens: int, tile: int, window: int | None, sinks: int = 0) -> list[list[str]]:
    """A colour for each tile of a causal mask, rows of queries first."""
    i, j = np.arange(tokens)[:, None], np.arange(tokens)[None]
    seen = j <= i
    if window is not None:
        seen &= (i - j < window) | (j < sinks)
    count = tokens // tile
    tiles = seen.reshape(count, tile, count, tile).swapaxes(1, 2)
    near = (
        window or tokens
    ) // tile  # a tile further to the left is read for its first tokens only
    return [
        [
            SKIPPED if not t.any() else SINK if y - x > near else PLAIN if t.all() else MASKED
            for x, t in enumerate(line)
        ]
        for y, line in enumerate(tiles)
    ]


def grid(axis: Axes, colours: list[list[str]], title: str) -> None:
    from matplotlib.patches import Rectangle

    for y, line in enumerate(colours):
        for x, colour in enumerate(line):
            axis.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor=EDGE, linewidth=1))
    axis.set(xlim=(-0.1, len(colours[0]) + 0.1), ylim=(len(colours) + 0.1, -0.1), aspect="equal")
    axis.set(xticks=[], yticks=[], xlabel="tiles of keys →", ylabel="← tiles of queries")
    axis.set_title(title, fontsize=10)
    axis.spines[:].set_visible(False)


def walk(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": NOW, "linewidth": 2.2})


def legend(figure: Any, *entries: tuple[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=label) for colour, label in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def forward() -> Any:
    figure, axes = _panels(3)
    grid(axes[0], kinds(640, 64, None), "causal")
    walk(axes[0], (0.2, 7.5), (7.9, 7.5))
    grid(axes[1], kinds(640, 64, 192), "causal, window of three tiles")
    walk(axes[1], (4.2, 7.5), (7.9, 7.5))
    kept = kinds(640, 64, 192, 64)
    grid(axes[2], kept, "the same, first tokens kept")
    walk(axes[2], (0.1, 7.5), (1.0, 7.5))
    walk(axes[2], (4.2, 7.5), (7.9, 7.5))
    legend(
        figure,
        (PLAIN, "no mask"),
        (MASKED, "masked"),
        (SINK, "first tokens, a loop of their own"),
        (SKIPPED, "never read"),
    )
    return figure


def backward() -> Any:
    figure, axes = _panels(2)
    tiles = kinds(640, 64, None)
    grid(axes[0], tiles, "dq: one program, a row of tiles")
    walk(axes[0], (0.2, 6.5), (6.9, 6.5))
    grid(axes[1], tiles, "dk, dv: one program, a column of tiles")
    walk(axes[1], (3.5, 3.1), (3.5, 9.8))
    legend(figure, (PLAIN, "no mask"), (MASKED, "masked"), (SKIPPED, "never read"))
    return figure


def decode() -> Any:
    from matplotlib.patches import Rectangle

    figure, (axis,) = _panels(1, width=8.4, height=2.6)
    shades = (PLAIN, MASKED, SINK)
    for tile in range(18):
        colour = shades[tile // 6]
        axis.add_patch(Rectangle((2 + tile, 0), 0.96, 1, facecolor=colour))
    for row in range(4):
        axis.add_patch(Rectangle((0, row / 4), 1.4, 0.22, facecolor=NOW))
    axis.text(0.7, -0.15, "G query heads\n= rows of one tile", ha="center", va="top", fontsize=9)
    for split, name in enumerate(("split 0", "split 1", "split 2")):
        middle = 2 + split * 6 + 3
        axis.text(middle, 1.12, f"{name}: a program", ha="center", fontsize=9)
        walk(axis, (2.2 + split * 6, 0.5), (7.8 + split * 6, 0.5))
        walk(axis, (middle, -0.05), (11 + (split - 1) * 0.6, -0.62))
    axis.text(11, -0.68, "reduce: weights by log-sum-exp", ha="center", va="top", fontsize=9)
    axis.set(xlim=(-0.6, 20.2), ylim=(-1.05, 1.4))
    axis.axis("off")
    return figure


def paged() -> Any:
    from matplotlib.patches import Rectangle

    figure, (axis,) = _panels(1, width=8.4, height=3.2)
    tables = ((0, [3, 0, 6]), (1, [3, 0, 2, 7]), (2, [5, 1]))
    shades = (PLAIN, MASKED, SINK)
    owners: dict[int, list[int]] = {}
    for row, pages in tables:
        for page in pages:
            owners.setdefault(page, []).append(row)
    for page in range(9):
        rows = owners.get(page, [])
        colour = SKIPPED if not rows else NOW if len(rows) > 1 else shades[rows[0]]
        axis.add_patch(Rectangle((page * 1.5, 0), 1.4, 0.8, facecolor=colour))
        text = {"color": "white" if len(rows) > 1 else "black"}
        axis.text(page * 1.5 + 0.7, 0.4, str(page), ha="center", va="center", **text)
    axis.text(13.7, 0.4, "pool of pages", va="center", fontsize=9)
    for row, pages in tables:
        y = 3.6 - row * 0.9
        axis.text(-0.1, y + 0.3, f"row {row}", ha="right", va="center", fontsize=9)
        for place, page in enumerate(pages):
            shared = len(owners[page]) > 1
            colour = NOW if shared else shades[row]
            axis.add_patch(Rectangle((place * 1.5, y), 1.4, 0.6, facecolor=colour))
            text = {"color": "white" if shared else "black"}
            axis.text(place * 1.5 + 0.7, y + 0.3, str(page), ha="center", va="center", **text)
    axis.text(6.4, 3.9, "block_table: a row's pages in the order of its tokens", fontsize=9)
    axis.text(6.4, 2.9, "dark: shared beginning, held once", fontsize=9)
    axis.text(6.4, 2.1, "grey: free", fontsize=9)
    axis.set(xlim=(-1.4, 16.5), ylim=(-0.2, 4.4))
    axis.axis("off")
    return figure


def mla() -> Any:
    from matplotlib.patches import Rectangle

    figure, (axis,) = _panels(1, width=8.4, height=3.4)

    def box(x: float, y: float, w: float, h: float, colour: str, text: str) -> None:
        axis.add_patch(Rectangle((x, y), w, h, facecolor=colour, edgecolor=EDGE))
        shade = "white" if colour == NOW else "black"
        axis.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=9, color=shade)

    box(0, 2.2, 4, 1, NOW, "q · W_UK   [H, R]")
    box(4, 2.2, 1, 1, NOW, "q rope")
    box(0, 0.2, 4, 1.4, PLAIN, "latents   [n, R]")
    box(4, 0.2, 1, 1.4, MASKED, "k rope")
    axis.text(2.5, -0.12, "the cache: R + P numbers a token", ha="center", va="top", fontsize=9)
    walk(axis, (5.1, 2.7), (6.3, 2.0))
    walk(axis, (5.1, 0.9), (6.3, 1.6))
    box(6.4, 1.3, 2.2, 1, SKIPPED, "scores [H, n]\nsoftmax")
    walk(axis, (8.7, 1.8), (9.9, 1.8))
    box(10, 1.1, 3.4, 1.4, PLAIN, "× the same latents\n[H, R]")
    walk(axis, (2.0, 0.15), (10.6, 1.05))
    walk(axis, (13.5, 1.8), (14.5, 1.8))
    box(14.6, 1.3, 2.4, 1, NOW, "· W_UV\n[H, V]")
    axis.set(xlim=(-0.2, 17.2), ylim=(-0.6, 3.4))
    axis.axis("off")
    return figure


def _panels(count: int, width: float | None = None, height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, count, figsize=(width or 3.2 * count, height), squeeze=False, layout="constrained"
    )
    return figure, axes[0]


PICTURES: dict[str, Callable[[], Any]] = {
    "forward": forward,
    "backward": backward,
    "decode": decode,
    "paged": paged,
    "mla": mla,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.parse_args(argv)
    import matplotlib

    matplotlib.use("svg")
    # the same bytes each time: no random ids, no date
    matplotlib.rcParams["svg.hashsalt"] = "hf-attn-patch"
    OUT.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw().savefig(OUT / f"{name}.svg", metadata={"Date": None}, facecolor="white")
    return 0


if __name__ == "__main__":
    sys.exit(main())
