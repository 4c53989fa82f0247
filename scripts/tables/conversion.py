"""What fewer KV heads cost in quality, by itself and after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hf_attn_converters import METHODS

from .markdown import Row, csv_rows, short, table, unmeasured

CONVERT_CSV = "convert_quality.csv"
GQA_CSV, LATENTS_CSV = "gqa_experiment.csv", "mla_quality.csv"
OWN_TEXT = "own text too"


def convert_table(*subjects: str) -> Callable[[Path], str]:
    """Checkpoints, KV heads and texts down, methods across; all checkpoints, or some of them."""

    def write(results: Path) -> str:
        every = csv_rows(results / CONVERT_CSV)
        chosen = [row for row in every if not subjects or row["subject"] in subjects]
        if not chosen:
            return unmeasured("Conversion", "python scripts/experiments/measure_conversion.py")
        rows = sorted(chosen, key=lambda row: row["date"])  # the newest of equal ones counts
        columns = [column for name in METHODS for column in (name, f"{name}, {OWN_TEXT}")]
        methods = [name for name in columns if any(_column(row) == name for row in rows)]
        found: dict[tuple[str, str, str], dict[str, Row]] = {}
        for row in sorted(rows, key=lambda row: -int(row["kv_after"])):
            heads = f"{row['kv_before']} → {row['kv_after']}"
            found.setdefault((row["subject"], row["text"], heads), {})[_column(row)] = row
        cells = [
            [*place, *(_quality(by[name]) if name in by else "–" for name in methods)]
            for place, by in sorted(found.items(), key=lambda item: item[0][:2])
        ]
        text = table(["checkpoint", "text", "KV heads", *methods], cells)
        about = [meaning for measure, meaning in QUALITY.items() if any(r[measure] for r in rows)]
        return f"{text}\n\n{' '.join(about)} {_converted_with(rows)}"

    return write


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
    return _ratio(row)


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


# The GQA paper's experiment: share of the training in %, loss.
TRAININGS = (("0", ""), ("5", "kl"), ("10", "kl"), ("5", "ce"), ("10", "ce"))


def gqa_table(results: Path) -> str:
    """KV heads and methods down, uptraining across; perplexity, KL from the source in brackets."""
    rows = csv_rows(results / GQA_CSV)
    if not rows:
        return unmeasured("The GQA paper's experiment's", "python scripts/experiments/gqa.py")
    found: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    for row in rows:
        cell = found.setdefault((row["kv_heads"], row["method"]), {})
        cell[row["percent"], row["loss"]] = row
    order = ["control", *METHODS]
    places = sorted(found, key=lambda key: (int(key[0] != "0"), -int(key[0]), order.index(key[1])))
    cells = [
        [
            heads if heads != "0" else "source's",
            method if method != "control" else "none (control)",
            *(_perplexity(found[heads, method].get(training)) for training in TRAININGS),
        ]
        for heads, method in places
    ]
    head = ["no training", "5%, KL", "10%, KL", "5%, cross-entropy", "10%, cross-entropy"]
    return table(["KV heads", "merged by", *head], cells)


def _perplexity(row: Row | None) -> str:
    return f"{float(row['ppl']):.1f} ({float(row['kl']):.3f})" if row else "–"


def latents_table(results: Path) -> str:
    """Sizes of the latent down, texts and methods across; the same of fewer KV heads beside it."""
    rows = sorted(csv_rows(results / LATENTS_CSV), key=lambda row: row["date"])
    if not rows:
        return unmeasured("Latents'", "python scripts/experiments/mla.py")
    subject, before = rows[0]["subject"], int(rows[0]["values_before"])
    found: dict[tuple[int, str], dict[tuple[str, str], Row]] = {}
    for row in rows:
        size = f"latent {row['kv_lora_rank']}, rotated key {row['qk_rope_head_dim']}"
        cell = found.setdefault((int(row["values"]), size), {})
        cell[row["text"], "fitted" if row["method"].endswith("fit") else "closed form"] = row
    for row in csv_rows(results / CONVERT_CSV):
        kind = {"csvd": "closed form", "csvd+fit": "fitted"}.get(_column(row))
        if row["subject"] == subject and kind:
            size, values = f"{row['kv_after']} KV head", before * int(row["kv_after"])
            place = (values // int(row["kv_before"]), size)
            found.setdefault(place, {})[row["text"], kind] = row
    texts = list(dict.fromkeys(row["text"] for row in rows))
    columns = [(text, kind) for text in texts for kind in ("closed form", "fitted")]
    cells = [
        [f"{values}", size, *(_quality_of(by.get(column)) for column in columns)]
        for (values, size), by in sorted(found.items(), key=lambda item: -item[0][0])
    ]
    head = ["values", "kept", *(f"{text}, {kind}" for text, kind in columns)]
    steps = ", ".join(sorted({row["steps"] for row in rows if row["steps"]}))
    about = (
        f"{subject}, whose KV heads keep {before} values per token and layer. ×: perplexity as a "
        f"multiple of the source's, KL from the source in brackets; latents fitted in {steps} "
        "steps."
    )
    return f"{table(head, cells)}\n\n{about}"


def _quality_of(row: Row | None) -> str:
    if row is None:
        return "–"
    ratio = float(row["ratio"])
    return f"{ratio:.3f}× ({float(row['kl']):.1e})" if ratio < 1.01 else _ratio(row)


def _ratio(row: Row) -> str:
    ratio = float(row["ratio"])
    return f"{f'{ratio:,.0f}' if ratio >= 100 else short(ratio)}× ({short(float(row['kl']))})"
