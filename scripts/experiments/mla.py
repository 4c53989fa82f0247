"""Quality against cache: a checkpoint with latents of many sizes, beside fewer KV heads.

    python scripts/experiments/mla.py --text corpus.txt --sizes 192+192,128+64 --methods mla,mla+fit

A size is R+P: columns of the latent and of the rotated key. Texts and scores are those of
measure_conversion.py; its rows for fewer KV heads stand in the plot too. Rows that --out holds
already are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from measure.subjects import Subject, Texts

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, for its packages

ROOT = Path(__file__).resolve().parents[2]
OUT, PLOT = ROOT / "results" / "mla_quality.csv", ROOT / "docs" / "mla_quality.png"
HEADS = ROOT / "results" / "convert_quality.csv"
METHODS = ("mla", "mla+fit")
TOKENS, STEPS = 12_288, 96  # as in measure_conversion.py's rows for csvd+fit


@dataclass(frozen=True)
class Size:
    rank: int
    rope: int

    @classmethod
    def of(cls, text: str) -> Size:
        try:
            rank, rope = map(int, text.split("+"))
        except ValueError:
            raise ValueError(f"a size is R+P, such as 128+64, got {text!r}") from None
        return cls(rank, rope)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversion on one text: CSV text throughout. `values`: cached per token and layer."""

    subject: str
    values_before: str
    values: str
    kv_lora_rank: str
    qk_rope_head_dim: str
    method: str
    calibration_tokens: str
    steps: str
    text: str
    tokens: str
    source_ppl: str
    ppl: str
    ratio: str
    kl: str
    top1: str
    seconds: str
    device: str
    threads: str
    torch: str
    transformers: str
    commit: str
    date: str


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    try:
        run(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--subject", default="smollm2", choices=("smollm2", "fixture"))
    add("--checkpoint", type=Path, help="its folder, by default where it is fetched to")
    add("--text", type=Path, help="to calibrate on, .xz or plain; a tenth is held out")
    add("--sizes", default="", help="R+P, separated by commas; none: only the plot")
    add("--methods", default=",".join(METHODS), help="separated by commas")
    add("--tokens", type=int, default=TOKENS, help="to calibrate on")
    add("--steps", type=int, default=STEPS, help="of the fit, per layer")
    add("--eval-size", type=int, help="tokens of each evaluation")
    add("--folder", type=Path, help="where to write conversions meanwhile (the temporary folder)")
    add("--out", type=Path, default=OUT, help="CSV to append to")
    add("--heads", type=Path, default=HEADS, help="CSV of measure_conversion.py, for the plot")
    add("--plot", type=Path, default=PLOT)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    sizes = [Size.of(text) for text in args.sizes.split(",") if text]
    methods = args.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f"--methods are {', '.join(METHODS)}, got {', '.join(sorted(unknown))}")
    rows = read(args.out)
    if sizes:
        from measure.subjects import SUBJECTS
        from transformers.utils import logging

        logging.disable_progress_bar()
        subject: Subject = SUBJECTS[args.subject]
        source = args.checkpoint or subject.checkpoint
        if not (source / "config.json").exists():
            raise ValueError(f"there is no checkpoint in {source}; run: {subject.fetch} {source}")
        texts = subject.texts(args.text, source)
        for method in methods:
            for size in sizes:
                known = {key(row) for row in rows}
                steps = str(args.steps) if method.endswith("fit") else ""
                if (args.subject, size, method, str(args.tokens), steps) in known:
                    continue
                fresh = measure(args, subject, source, texts, size, method)
                append(args.out, fresh)
                rows += fresh
                for row in fresh:
                    what = f"{size.rank}+{size.rope} {method}, {row.text}"
                    print(f"{what}: {row.ratio} x, KL {row.kl}, {row.seconds} s", flush=True)
    plot([row for row in rows if row.subject == args.subject], args)


def key(row: Row) -> tuple[str, Size, str, str, str]:
    size = Size(int(row.kv_lora_rank), int(row.qk_rope_head_dim))
    return row.subject, size, row.method, row.calibration_tokens, row.steps


def measure(
    args: argparse.Namespace, subject: Subject, source: Path, texts: Texts, size: Size, method: str
) -> list[Row]:
    """One conversion, a row for each text."""
    from hf_attn_converters import convert
    from hf_attn_converters.calibration import Calibration
    from hf_attn_patch.bench.results import environment

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        text = None
        if texts.calibration is not None:
            text = Path(folder) / "calibration.txt"
            text.write_text(texts.calibration, encoding="utf-8")
        calibration = Calibration(
            text=text,
            tokens=args.tokens,
            sequence_length=subject.sequence_length,
            fit=replace(subject.fit, steps=args.steps),
        )
        result = convert(
            source,
            Path(folder) / "result",
            to="mla",
            kv_lora_rank=size.rank,
            qk_rope_head_dim=size.rope,
            method=method,
            calibration=calibration,
        )
        output, count = [Path(result.plan.target)], args.eval_size or subject.size
        found = {
            name: subject.score(source, output, words, count, lambda done, total: None)[0]
            for name, words in texts.evaluations.items()
        }
    plan, record = result.plan, result.calibration or {}
    stamp = {
        name: str(getattr(environment(), name))
        for name in ("device", "threads", "torch", "transformers", "commit", "date")
    }
    rows = []
    for name, scores in found.items():
        assert scores.ppl is not None and scores.source_ppl is not None
        rows.append(
            Row(
                subject=args.subject,
                values_before=str(2 * plan.kv_heads_before * plan.head_dim),
                values=str(size.rank + size.rope),
                kv_lora_rank=str(size.rank),
                qk_rope_head_dim=str(size.rope),
                method=method,
                calibration_tokens=str(record["tokens"]),
                steps=str(record["fit"]["steps"]) if "fit" in record else "",
                text=name,
                tokens=str(scores.tokens),
                source_ppl=f"{scores.source_ppl:.5g}",
                ppl=f"{scores.ppl:.5g}",
                ratio=f"{scores.ppl / scores.source_ppl:.5g}",
                kl=f"{scores.kl:.5g}",
                top1=f"{scores.top1:.5g}",
                seconds=f"{result.seconds:.5g}",
                **stamp,
            )
        )
    return rows


def read(path: Path) -> list[Row]:
    """The rows of a CSV. Raises ValueError for other columns."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(f.name for f in fields(Row)):
            raise ValueError(f"{path} has other columns: name another file")
        return [Row(**line) for line in reader]


def append(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def best(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """The smallest ratio at each number of cached values."""
    found: dict[int, float] = {}
    for row in rows:
        values, ratio = int(row["values"]), float(row["ratio"])
        found[values] = min(ratio, found.get(values, ratio))
    return dict(sorted(found.items()))


def fewer_heads(path: Path, subject: str, width: int) -> list[dict[str, Any]]:
    """Rows of measure_conversion.py at the same budget; `width`: cached values of a KV head."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {**line, "values": int(line["kv_after"]) * width}
            for line in csv.DictReader(file)
            if line["subject"] == subject
            and line["method"] in ("csvd", "csvd+fit")
            and line["calibration_tokens"] == str(TOKENS)
            and line["steps"] in ("", str(STEPS))
            and "model-generated" not in line["calibration"]
        ]


def plot(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Perplexity, as a multiple of the source's, by cached values: a panel for each text."""
    if not rows:
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from measure.plots import plain_log

    names = list(dict.fromkeys(row.text for row in rows))
    before = int(rows[0].values_before)
    others = fewer_heads(args.heads, args.subject, head_width(args))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    lines: tuple[tuple[str, str, str], ...] = (
        ("mla", "C0", "o"), ("mla+fit", "C1", "o"), ("csvd", "C0", "s"), ("csvd+fit", "C1", "s"),
    )  # fmt: skip
    for axis, name in zip(axes[0], names, strict=True):
        for method, color, marker in lines:
            mine = [asdict(r) for r in rows] if "mla" in method else others
            found = best([r for r in mine if r["method"] == method and r["text"] == name])
            what = "latents" if "mla" in method else "fewer KV heads"
            axis.plot(
                [*found], [*found.values()], color=color, marker=marker, label=f"{what}, {method}"
            )
        axis.axvline(before, color="black", linestyle="--", linewidth=1, label="the source")
        axis.set(title=name, xlabel="cached values per token and layer")
        plain_log(axis)
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("perplexity, × the source's")
    axes[0][-1].legend()
    figure.set_layout_engine("constrained")
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.plot, dpi=110)


def head_width(args: argparse.Namespace) -> int:
    """What one KV head keeps of a token: K and V."""
    from measure.subjects import SUBJECTS

    from hf_attn_converters import family_of
    from hf_attn_converters.io.checkpoint import open_checkpoint

    config = open_checkpoint(args.checkpoint or SUBJECTS[args.subject].checkpoint).config
    return 2 * family_of(config).head_dim(config)


if __name__ == "__main__":
    sys.exit(main())
