"""The GQA paper's experiment in small: merge, uptrain, compare; a row per cell, resumable.

    python scripts/experiments/gqa.py --text corpus_train.txt.xz --eval-text corpus_valid.txt.xz

A multi-head Llama (tests/fixtures/tiny-llama-mha) goes to fewer KV heads by each method and is
uptrained on a share of the tokens that it was trained on, with cross-entropy or with the KL from
the source. The control is the source itself, uptrained likewise. (arXiv:2305.13245, section 3)

Held out are whole works: --eval-text must hold none that is in --text.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, for its packages

from measure.texts import read_plain

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "fixtures" / "tiny-llama-mha"
OUT, PLOT = ROOT / "results" / "gqa_experiment.csv", ROOT / "docs" / "gqa_experiment.png"

METHODS = ("first", "random", "mean", "csvd", "csvd+fit")
KV_HEADS = (4, 2, 1)
SHARES = (0, 5, 10)  # per cent of the tokens that the source saw
LOSSES = ("ce", "kl")
CONTROL = "control"  # as a method: the source, not merged
CALIBRATION_TOKENS, LENGTH, FIT_STEPS = 49_152, 256, 384


@dataclass(frozen=True, kw_only=True)
class Cell:
    method: str
    kv_heads: int
    percent: int
    loss: str  # "" where nothing is trained

    @property
    def name(self) -> str:
        return f"{self.method}/{self.kv_heads}/{self.percent}/{self.loss or 'none'}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A finished cell: measured on text that neither training nor calibration saw."""

    method: str
    kv_heads: int
    percent: int
    loss: str
    learning_rate: float
    tokens: int
    ppl: float
    kl: float
    source_ppl: float
    eval_tokens: int
    convert_seconds: float
    uptrain_seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        run(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--text", type=Path, required=True, help="to train and calibrate on, .xz or plain")
    add("--eval-text", type=Path, required=True, help="held out, .xz or plain")
    add("--source", type=Path, default=SOURCE, help="a multi-head checkpoint with training.json")
    add("--only", help="cells METHOD/KV_HEADS/PERCENT/LOSS, with * and ?, by commas")
    add("--learning-rate", type=float, default=5e-4)
    add("--eval-tokens", type=int, default=32_768)
    add("--device", help="cpu, to leave an accelerator unused")
    add("--out", type=Path, default=OUT, help="CSV; finished cells in it are not done again")
    add("--plot", type=Path, default=PLOT)
    add("--list", action="store_true", help="print the cells and do nothing")
    return parser.parse_args(argv)


def cells() -> Iterator[Cell]:
    """The control first; then from many heads to one."""
    kinds = [(0, ""), *((percent, loss) for percent in SHARES[1:] for loss in LOSSES)]
    for percent, loss in kinds:
        yield Cell(method=CONTROL, kv_heads=0, percent=percent, loss=loss)
    for kv_heads in KV_HEADS:
        for method in METHODS:
            for percent, loss in kinds:
                yield Cell(method=method, kv_heads=kv_heads, percent=percent, loss=loss)


def wanted(only: str | None) -> list[Cell]:
    patterns = only.split(",") if only else ["*"]
    found = [c for c in cells() if any(fnmatch.fnmatchcase(c.name, p) for p in patterns)]
    if not found:
        raise ValueError(f"--only {only!r} matches no cell; --list prints them")
    return found


def run(args: argparse.Namespace) -> None:
    todo, done = wanted(args.only), finished(args.out)
    if args.list:
        print(*(cell.name + ("  done" if cell.name in done else "") for cell in todo), sep="\n")
        return
    todo = [cell for cell in todo if cell.name not in done]
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(args, Path(folder))
        for number, cell in enumerate(todo, 1):
            row = lab.measure(cell)
            append(args.out, row)
            print(
                f"{number}/{len(todo)} {cell.name}: ppl {row.ppl:.4g} (source "
                f"{row.source_ppl:.4g}), KL {row.kl:.4g}; "
                f"{row.convert_seconds + row.uptrain_seconds:.0f} s",
                flush=True,
            )
    plot(list(finished(args.out).values()), args.plot)


class Lab:
    """The texts as files, and each conversion made once."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        import hf_attn_patch  # noqa: F401  registers the attention

        self.args, self.folder, self.source = args, folder, args.source
        self.text, self.held_out = folder / "train.txt", folder / "eval.txt"
        self.text.write_text(read_plain(args.text), encoding="utf-8")
        self.held_out.write_text(read_plain(args.eval_text), encoding="utf-8")
        self.seen: int = json.loads((args.source / "training.json").read_text())["tokens"]

    def measure(self, cell: Cell) -> Row:
        from hf_attn_converters.uptrain import UptrainOptions, uptrain

        student, convert_seconds = self.student(cell)
        output = self.folder / "uptrained"
        trained = cell.percent > 0
        result = uptrain(
            UptrainOptions(
                student=student,
                teacher=self.source,
                text=(str(self.text),),
                eval_text=str(self.held_out),
                output=output,
                # without training: one row at a rate that changes nothing, to measure the same
                tokens=self.seen * cell.percent // 100 if trained else 1,
                learning_rate=self.args.learning_rate if trained else 1e-12,
                loss=cell.loss or "kl",
                sequence_length=LENGTH,
                evaluations=1,
                eval_tokens=self.args.eval_tokens,
                patience=0,
                attn_implementation="triton_fa2",
                device=self.args.device,
            )
        )
        shutil.rmtree(output)
        last = result.record["steps"][-1 if trained else 0]
        return Row(
            **asdict(cell),
            learning_rate=self.args.learning_rate if trained else 0.0,
            tokens=last["tokens"],
            ppl=last["ppl"],
            kl=last["kl"],
            source_ppl=last["source_ppl"],
            eval_tokens=self.args.eval_tokens,
            convert_seconds=convert_seconds,
            uptrain_seconds=result.seconds,
        )

    def student(self, cell: Cell) -> tuple[Path, float]:
        """(the converted source, the seconds that it took now)"""
        from hf_attn_converters import METHODS as KNOWN
        from hf_attn_converters import convert
        from hf_attn_converters.calibration import Calibration
        from hf_attn_converters.calibration.fit import FitSettings

        if cell.method == CONTROL:
            return self.source, 0.0
        folder = self.folder / f"{cell.method}-{cell.kv_heads}"
        if folder.exists():
            return folder, 0.0
        calibration = Calibration(
            text=self.text,
            tokens=CALIBRATION_TOKENS,
            sequence_length=LENGTH,
            fit=FitSettings(steps=FIT_STEPS),
        )
        calibrated = KNOWN[cell.method].calibrated
        begin = time.perf_counter()
        convert(
            self.source,
            folder,
            num_key_value_heads=cell.kv_heads,
            method=cell.method,
            calibration=calibration if calibrated else None,
        )
        return folder, time.perf_counter() - begin


def finished(path: Path) -> dict[str, Row]:
    """The rows of a CSV by the names of their cells. Raises ValueError for other columns."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(f.name for f in fields(Row)):
            raise ValueError(f"{path} has other columns: name another file")
        rows = [Row(**{k: _KINDS[k](v) for k, v in line.items()}) for line in reader]
    kinds = ("method", "kv_heads", "percent", "loss")
    return {Cell(**{k: getattr(row, k) for k in kinds}).name: row for row in rows}


_KINDS: dict[str, Any] = {
    f.name: {"str": str, "int": int, "float": float}[str(f.type)] for f in fields(Row)
}


def append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        if fresh:
            writer.writeheader()
        writer.writerow(
            {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
        )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Perplexity by uptraining, one panel per number of KV heads and loss."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from measure.plots import plain_log

    figure, axes = pyplot.subplots(
        len(LOSSES), len(KV_HEADS), figsize=(11, 6.5), sharex=True, sharey="col", squeeze=False
    )
    for i, loss in enumerate(LOSSES):
        for axis, kv_heads in zip(axes[i], KV_HEADS, strict=True):
            for number, method in enumerate((*METHODS, CONTROL)):
                line = sorted(
                    (row.percent, row.ppl)
                    for row in rows
                    if row.method == method
                    and row.kv_heads == (0 if method == CONTROL else kv_heads)
                    and row.loss in ("", loss)
                )
                style = {"color": f"C{number}"}
                if method == CONTROL:
                    style = {"color": "black", "linestyle": "--"}
                if line:
                    axis.plot(*zip(*line, strict=True), marker="o", label=method, **style)
            plain_log(axis)
            axis.set(xticks=SHARES, title=f"8 → {kv_heads} KV heads, {loss}")
            axis.grid(alpha=0.3, which="both")
        axes[i][0].set_ylabel("perplexity, held out")
    for axis in axes[-1]:
        axis.set_xlabel("uptraining, % of the training's tokens")
    # a method may be missing from some of the axes as long as not all cells are done
    found: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        figure.legend(
            list(found.values()), list(found), loc="outside lower center", ncols=len(found)
        )
    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
