"""Write README.md's tables from the code and from results/*.csv, between their markers.

    python scripts/readme_tables.py            # rewrite
    python scripts/readme_tables.py --check    # exit 1 if README.md is stale

A table stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`. What has no CSV yet is
shown as not measured yet.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from hf_attn_converters import METHODS
from hf_attn_patch.bench.rows import OURS, read_rows
from hf_attn_patch.registry import Capabilities, list_implementations

ROOT = Path(__file__).resolve().parents[1]
CPU_CSV, GPU_CSV, AOT_CSV = "attention_cpu.csv", "attention_gpu.csv", "aot.csv"
CONVERT_CSV = "convert_quality.csv"
OWN_TEXT = "own text too"
Row = dict[str, str]

# --- implementations x features x backends --------------------------------------------------------

FEATURES = {
    "dtypes": "dtypes",
    "head_dim_forward": "head_dim, forward up to",
    "head_dim_backward": "head_dim, backward up to",
    "causal": "causal",
    "full": "bidirectional and cross-attention",
    "gqa": "GQA and MQA without repeating K/V",
    "latents": "decode over cached latents (MLA), never expanded",
    "window": "sliding window (the model's own)",
    "sink_tokens": "window on any causal model, first tokens kept",
    "rolling_cache": "KV cache that stays O(window)",
    "softcap": "softcap (gemma2)",
    "sink_logits": "sink logits `s_aux` (gpt_oss)",
    "bias": "position bias, arbitrary 4D masks",
    "padding": "left and right padding",
    "packed": "packed sequences",
    "dropout": "dropout",
    "backward": "backward",
    "paged": "keys and values in pages (`PagedCache`)",
    "continuous_batching": "continuous batching (`generate_batch`, `transformers serve`)",
}


def implementations_table(results: Path) -> str:
    """Features down, implementations across; the backend of each device at the foot."""
    impls = list_implementations()
    lines = [_line(["", *(f"`{impl.name}`" for impl in impls)]), _rule(1 + len(impls))]
    for field in fields(Capabilities):
        values = [getattr(impl.supports, field.name) for impl in impls]
        if any(value is not False for value in values):
            lines.append(_line([FEATURES[field.name], *(_feature(value) for value in values)]))
    devices = {need.device for impl in impls for need in impl.requires.devices}
    for device in sorted(devices, key=("cuda", "xpu", "cpu").index):
        cells = []
        for impl in impls:
            found = [need for need in impl.requires.devices if need.device == device]
            cells.append(found[0].backend.replace("triton", "Triton") if found else "–")
        lines.append(_line([f"backend on {DEVICES[device]}", *cells]))
    return "\n".join(lines)


DEVICES = {"cuda": "NVIDIA and AMD GPUs", "xpu": "Intel GPUs", "cpu": "CPU"}


def _feature(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "–"
    if isinstance(value, tuple):
        return ", ".join(str(part) for part in value)
    return str(value)


# --- results --------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What rows of one comparison have in common."""

    pass_: str
    extra: str
    heads: str
    head_dim: str
    sizes: str
    window: str
    causal: str
    batch: str
    dtype: str
    device: str


def _problem(row: Row) -> Problem:
    same = row["seq_q"] == row["seq_k"]
    return Problem(
        pass_=row["pass"],
        extra=row["extra"],
        heads=f"{row['heads_q']}/{row['heads_kv']}",
        head_dim=row["head_dim"],
        sizes=row["seq_k"] if same else f"{row['seq_q']}x{row['seq_k']}",
        window=row["window"],
        causal="causal" if row["causal"] == "1" else "full",
        batch=row["batch"],
        dtype=row["dtype"],
        device=row["device"],
    )


def _grouped(rows: Iterable[Row]) -> dict[Problem, dict[str, Row]]:
    """Rows by problem and contender; the newest of a contender's rows counts."""
    groups: dict[Problem, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        groups.setdefault(_problem(row), {})[row["impl"]] = row
    return groups


def _is_ours(impl: str) -> bool:
    return impl == OURS or impl.startswith(f"{OURS}:")


def cpu_table(results: Path) -> str:
    """One line per problem: this package's time, and every peer's as a multiple of it."""
    rows = read_rows(results / CPU_CSV)
    if not rows:
        return _unmeasured("CPU", "make bench")
    lines = [_line(["work", "dtype", "hf_attn_patch", "the others, × its time"]), _rule(4)]
    for problem, contenders in _grouped(rows).items():
        ours = [row for impl, row in contenders.items() if _is_ours(impl)]
        if not ours:
            continue
        best = min(ours, key=lambda row: float(row["p50_ms"]))
        mine = float(best["p50_ms"])
        peers = sorted(
            (float(row["p50_ms"]), impl) for impl, row in contenders.items() if not _is_ours(impl)
        )
        ratios = " · ".join(f"{impl} {_short(ms / mine)}×" for ms, impl in peers)
        lines.append(_line([_describe(problem), problem.dtype, _milliseconds(best), ratios]))
    return "\n".join([*lines, "", _measured_on(rows)])


def _describe(problem: Problem) -> str:
    window = f", W {problem.window}" if problem.window else ""
    extra = f", {problem.extra}" if problem.extra else ""
    return (
        f"{problem.pass_} {problem.causal} {problem.sizes}{window}{extra}, "
        f"B {problem.batch}, H {problem.heads}, D {problem.head_dim}"
    )


def gpu_table(pass_: str) -> Callable[[Path], str]:
    """Contenders across, problems down; TFLOP/s, for decode GB/s of K and V."""

    def table(results: Path) -> str:
        every = read_rows(results / GPU_CSV)
        rows = [row for row in every if row["pass"] == pass_ and row["extra"] != "launch"]
        if not rows:
            return _unmeasured(f"GPU {pass_}", f"make gpu SLICE={pass_}")
        rate, unit = ("gbytes_s", "GB/s") if pass_ == "decode" else ("tflops", "TFLOP/s")
        groups = _grouped(rows)
        names = list(dict.fromkeys(impl for contenders in groups.values() for impl in contenders))
        lines = [_line([unit, "dtype", *names]), _rule(2 + len(names))]
        for problem, contenders in groups.items():
            cells = [_short(float(contenders[n][rate])) if n in contenders else "–" for n in names]
            lines.append(_line([_describe(problem), problem.dtype, *cells]))
        limits = [row for row in every if row["pass"] == "ceiling"]
        limit = " · ".join(
            f"{row['extra']} {float(row[rate]):.0f} {unit}" for row in limits if row[rate]
        )
        note = _measured_on(rows) + (f" The device's own ceiling: {limit}." if limit else "")
        return "\n".join([*lines, "", note])

    return table


def aot_table(results: Path) -> str:
    """Per chip and kernel: how many shipped configurations compile, and the most that one uses."""
    path = results / AOT_CSV
    if not path.exists():
        return "*Not compiled yet: `python scripts/aot_report.py --out results/aot.csv`.*"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_chip: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_chip.setdefault((row["arch"], row["kernel"]), []).append(row)
    head = ["chip", "kernel", "configs", "shared memory, at most", "of", "spilling configs"]
    lines = [_line(head), _rule(len(head))]
    for (arch, kernel), members in by_chip.items():
        shared = max(int(row["shared"]) for row in members)
        spills = [int(row["spilled"]) for row in members]
        spilling = "not known" if min(spills) < 0 else str(sum(s > 0 for s in spills))
        limit = members[0]["shared_limit"]
        cells = [arch, f"`{kernel}`", str(len(members)), str(shared), limit, spilling]
        lines.append(_line(cells))
    return "\n".join(lines)


def convert_table(results: Path) -> str:
    """Checkpoints, KV heads and texts down, merge methods across; the newest of equal rows."""
    path = results / CONVERT_CSV
    if not path.exists():
        return _unmeasured("Conversion", "python scripts/measure_conversion.py")
    with path.open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["date"])
    columns = [column for name in METHODS for column in (name, f"{name}, {OWN_TEXT}")]
    methods = [name for name in columns if any(_column(row) == name for row in rows)]
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: -int(row["kv_after"])):
        heads = f"{row['kv_before']} → {row['kv_after']}"
        found.setdefault((row["subject"], row["text"], heads), {})[_column(row)] = row
    lines = [_line(["checkpoint", "text", "KV heads", *methods]), _rule(3 + len(methods))]
    for place, by_method in sorted(found.items(), key=lambda item: item[0][:2]):
        cells = [_quality(by_method[name]) if name in by_method else "–" for name in methods]
        lines.append(_line([*place, *cells]))
    about = "".join(f" {meaning}" for meaning in QUALITY.values())
    return "\n".join([*lines, "", about.strip() + " " + _converted_with(rows)])


# Which of a row's measures is shown -> what the note says of it.
QUALITY = {
    "accuracy": "%: masked tokens that the converted model finds.",
    "cosine": "Numbers below 1 alone: cosine between sentence embeddings and the source's.",
    "ratio": "×: perplexity as a multiple of the source's, KL from the source in brackets.",
}


def _column(row: Row) -> str:
    """A row's method, and whether the model wrote a share of its calibration text itself."""
    mixed = "model-generated" in row["calibration"] and "," in row["calibration"]
    return f"{row['method']}, {OWN_TEXT}" if mixed else row["method"]


def _quality(row: Row) -> str:
    if row["accuracy"]:
        return f"{float(row['accuracy']):.1%}"
    if row["cosine"]:
        return f"{float(row['cosine']):.3f}"
    ratio = float(row["ratio"])
    return f"{f'{ratio:,.0f}' if ratio >= 100 else _short(ratio)}× ({_short(float(row['kl']))})"


def _converted_with(rows: Sequence[Row]) -> str:
    sources = {
        (row["subject"], row["text"], row["accuracy_source"])
        for row in rows
        if row["accuracy_source"]
    }
    found = ", ".join(f"{float(share):.1%} on {text}" for _, text, share in sorted(sources))
    newest = max(rows, key=lambda row: row["date"])
    return (f"The source finds {found}. " if found else "") + (
        f"No training of the whole model. transformers {newest['transformers']}, torch "
        f"{newest['torch']}, {newest['date']}."
    )


# --- Markdown -------------------------------------------------------------------------------------


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _milliseconds(row: Row) -> str:
    p20, p50, p80 = (_short(float(row[f"{p}_ms"])) for p in ("p20", "p50", "p80"))
    return f"{p50} ms ({p20} to {p80})"


def _unmeasured(what: str, command: str) -> str:
    return f"*{what} rows are not measured yet (`{command}`).*"


def _measured_on(rows: Sequence[Row]) -> str:
    newest = max(rows, key=lambda row: row["date"])
    threads = f", {newest['threads']} thread" + ("s" if newest["threads"] != "1" else "")
    return (
        f"Medians (20th to 80th percentile), interleaved, on {newest['device']}{threads}; torch "
        f"{newest['torch']}, triton {newest['triton'] or 'absent'}, transformers "
        f"{newest['transformers']}, {newest['date']}."
    )


# --- README.md ------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[Path], str]] = {
    "implementations": implementations_table,
    "cpu": cpu_table,
    "gpu-forward": gpu_table("forward"),
    "gpu-backward": gpu_table("backward"),
    "gpu-decode": gpu_table("decode"),
    "convert": convert_table,
    "aot": aot_table,
}
MARKED = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table:(?P=name) -->)", re.DOTALL)


def render(readme: str, results: Path) -> str:
    """`readme` with every marked table written anew; ValueError for an unknown or missing one."""
    names = [match["name"] for match in MARKED.finditer(readme)]
    if sorted(names) != sorted(TABLES):
        raise ValueError(
            f"README.md has the tables {', '.join(names) or 'none'}; it must have each of "
            f"{', '.join(TABLES)} once, between <!-- table:NAME --> and <!-- /table:NAME -->"
        )
    return MARKED.sub(lambda m: f"{m[1]}{TABLES[m['name']](results)}\n{m[3]}", readme)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if stale")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    args = parser.parse_args(argv)
    before = args.readme.read_text()
    try:
        after = render(before, args.results)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if not args.check:
        args.readme.write_text(after)
    elif before != after:
        print(f"{args.readme.name} is stale: make results", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
