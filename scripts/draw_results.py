"""Draw the measured rows of results/: the pictures of docs/performance.md.

python scripts/draw_results.py     # writes docs/*.png

A picture whose rows are not measured yet is named and not drawn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from measure.plots import plain_log
from tables.attention import CPU_CSV, GPU_CSV, GROWTH_CSV, describe, grouped, growth_curves, is_ours
from tables.markdown import short

from hf_attn_patch.bench.growth import exponent
from hf_attn_patch.bench.results import OURS, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
OUR_COLOURS = {OURS: "#2b6cb0", f"{OURS}:extension": "#1a365d"}
PEER_COLOURS = ("#c9ced6", "#aab2bd", "#8a94a3", "#6b7686")


def attention_on_a_cpu(results: Path) -> Figure | None:
    """Time of everybody with all threads, as a multiple of the fastest of ours; shorter is
    better."""
    from matplotlib import pyplot

    rows = read_rows(results / CPU_CSV)
    if not rows:
        return None
    most = max(int(row["threads"]) for row in rows)
    groups = grouped(row for row in rows if int(row["threads"]) == most)
    figure: Figure
    figure, axes = pyplot.subplots(figsize=(9, 1.1 * len(groups)), layout="constrained")
    y, ticks, labels = 0.0, [], []
    for problem, contenders in groups.items():
        times = {impl: float(row["p50_ms"]) for impl, row in contenders.items()}
        best = min(ms for impl, ms in times.items() if is_ours(impl))
        ticks.append(y + (len(times) - 1) / 2)
        labels.append(f"{problem.dtype}  {describe(problem)}".replace(", B", "\nB"))
        peers = iter(PEER_COLOURS)
        # ours first, the peers by their time
        for impl, ms in sorted(times.items(), key=lambda item: (not is_ours(item[0]), item[1])):
            colour = OUR_COLOURS.get(impl) or next(peers)
            axes.barh(y, ms / best, height=0.9, color=colour)
            axes.text(ms / best * 1.03, y, f"{impl}  {short(ms)} ms", va="center", fontsize=7)
            y += 1
        y += 1
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(0.7, 250)
    axes.set_ylim(y - 0.5, -1)
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1×", "2×", "5×", "10×", "20×", "50×", "100×"])
    axes.set_xlabel("time, as a multiple of this package's fastest")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def growth_on_a_cpu(results: Path) -> Figure | None:
    """Time over length, both logarithmic."""
    from matplotlib import pyplot

    curves = growth_curves(read_rows(results / GROWTH_CSV))
    if not curves:
        return None
    figure: Figure
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, times in curves.items():
        grown = exponent(list(times), list(times.values()))
        label = name if grown is None else f"{name}, length to the {grown:.2f}"
        axes.plot(list(times), list(times.values()), marker="o", label=label)
    lengths = sorted({n for times in curves.values() for n in times})
    axes.set_xscale("log", base=2)
    plain_log(axes, at="1")
    axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("ms")
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    return figure


def forward_on_a_gpu(results: Path) -> Figure | None:
    """TFLOP/s over length, a panel for each head size, causal and not."""
    from matplotlib import pyplot

    rows = [row for row in read_rows(results / GPU_CSV) if row["pass"] == "forward"]
    square = [row for row in rows if row["heads_q"] == row["heads_kv"] and not row["window"]]
    panels = sorted({(int(row["head_dim"]), row["causal"]) for row in square})
    if not panels:
        return None
    figure: Figure
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.5 * len(panels), 4), layout="constrained", squeeze=False
    )
    for (dim, causal), axis in zip(panels, axes[0], strict=True):
        curves: dict[str, dict[int, float]] = {}
        for row in sorted(square, key=lambda row: (row["date"], int(row["seq_k"]))):
            if (int(row["head_dim"]), row["causal"]) == (dim, causal):
                curves.setdefault(row["impl"], {})[int(row["seq_k"])] = float(row["tflops"])
        for impl, rates in curves.items():
            lengths = sorted(rates)
            width = 2.5 if is_ours(impl) else 1
            axis.plot(lengths, [rates[n] for n in lengths], marker=".", lw=width, label=impl)
        axis.set_xscale("log", base=2)
        axis.set_title(f"head size {dim}, {'causal' if causal == '1' else 'full'}")
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.2)
    axes[0][0].set_ylabel("TFLOP/s")
    axes[0][-1].legend(fontsize=7)
    return figure


PICTURES: dict[str, Callable[[Path], Figure | None]] = {
    "attention_cpu": attention_on_a_cpu,
    "growth_cpu": growth_on_a_cpu,
    "forward_gpu": forward_on_a_gpu,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="the CSVs (results)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder (docs)")
    args = parser.parse_args(argv)
    import matplotlib

    matplotlib.use("agg")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        figure = draw(args.results)
        if figure is None:
            print(f"{name}: no rows are measured yet")
            continue
        figure.savefig(args.out / f"{name}.png", dpi=110, facecolor="white")
        print(args.out / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
