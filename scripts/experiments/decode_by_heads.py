"""Decode time and quality by number of KV heads and local window: the MQA paper's table in small.

    python scripts/experiments/decode_by_heads.py --text corpus.txt.xz \
        --out results/decode_by_heads.csv

Time: models of the fixture's shape with random weights, their MLPs widened until all have as many
parameters as the one with all KV heads (Shazeer 2019 does the same), in turns. Quality: the fixture
converted (csvd+fit, no training), on held-out text; a window wider than its 256 positions is full.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_attn_converters import convert
from hf_attn_converters.calibration import Calibration
from hf_attn_patch.bench.results import environment
from hf_attn_patch.cli.common import print_table, progress_bar
from hf_attn_patch.compare.divergence import Quality, measure_quality
from hf_attn_patch.compare.speed import Speed, measure_speed
from hf_attn_patch.loading import LoadedModel, ModelSpec, load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, for its packages

from measure.language import spread_windows
from measure.texts import read_plain, split

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "tiny-llama-mha"
WINDOWS = (None, 512, 31)  # Shazeer's local attention sees 31 tokens and the query's own
ENVIRONMENT = ("device", "threads", "torch", "transformers", "commit", "date")
# fmt: off
COLUMNS = (
    "variant", "kv_heads", "window", "parameters", "intermediate_size", "dtype", "batch",
    "context", "new_tokens", "rounds", "ms_per_step", "p20_ms", "p80_ms", "of_mha", "kv_bytes",
    "prefill_tok_s", "ppl", "ppl_ratio", "kl", "top1", "quality_tokens", *ENVIRONMENT,
)
# fmt: on


@dataclass(frozen=True)
class Variant:
    kv_heads: int
    window: int | None

    def name(self, heads: int) -> str:
        kind = {heads: "MHA", 1: "MQA"}.get(self.kv_heads, f"GQA-{self.kv_heads}")
        return kind if self.window is None else f"{kind}, window {self.window}"

    def spec(self, path: str) -> ModelSpec:
        name = "triton_fa2" if self.window is None else "triton_swa"
        return ModelSpec(path=path, implementation=name, window=self.window)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="plain text, .xz or not")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "decode_by_heads.csv")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "decode_by_heads",
                        help="converted fixtures; those that are there are used again")  # fmt: skip
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192, help="that quality is measured on")
    args = parser.parse_args(argv)
    try:
        calibration, held_out = split(read_plain(args.text))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    heads = _config().num_attention_heads
    counts = [n for n in (heads, 4, 2, 1) if heads % n == 0]
    variants = [Variant(n, window) for window in WINDOWS for n in counts]
    speeds, sizes = timed(variants, args)
    qualities = judged(variants, converted(counts, calibration, args.work), held_out, args.tokens)
    rows = [
        row(v, heads, speed, speeds[0], quality, qualities[0], size)
        for v, speed, quality, size in zip(variants, speeds, qualities, sizes, strict=True)
    ]
    write(args.out, rows)
    shown = ("variant", "ms_per_step", "of_mha", "kv_bytes", "ppl", "ppl_ratio", "kl", "top1")
    print_table(shown, [[r[name] for name in shown] for r in rows])
    print(f"wrote {args.out}")
    return 0


def _config() -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(FIXTURE, trust_remote_code=False)


def timed(
    variants: Sequence[Variant], args: argparse.Namespace
) -> tuple[list[Speed], list[tuple[int, int]]]:
    """Speeds, and (parameters, MLP width) of each."""
    models, sizes = [], []
    for variant in variants:
        config = _config()
        config.max_position_embeddings = args.context + args.new_tokens
        # k_proj and v_proj lose columns; three MLP matrices share what they lose
        lost = 2 * config.head_dim * (config.num_attention_heads - variant.kv_heads)
        config.intermediate_size += round(lost / 3)
        config.num_key_value_heads = variant.kv_heads
        models.append(random_model(config, variant))
        count = sum(p.numel() for p in models[-1].model.parameters())
        sizes.append((count, config.intermediate_size))
    assert max(n for n, _ in sizes) < 1.01 * min(n for n, _ in sizes)
    tokens = torch.arange(2, 2 + args.context) % _config().vocab_size
    with progress_bar() as update:
        done, total = 0, len(models) * (args.rounds + 1)

        def step(runs: int) -> None:
            nonlocal done
            done += runs
            update("decode", done, total)

        speeds = measure_speed(
            models, tokens, context=args.context, new_tokens=args.new_tokens, rounds=args.rounds,
            batch=args.batch, progress=step,
        )  # fmt: skip
    return speeds, sizes


def random_model(config: Any, variant: Variant) -> LoadedModel:
    """Weights as the class draws them: time does not depend on them."""
    from transformers import AutoModelForCausalLM

    import hf_attn_patch

    spec = variant.spec(str(FIXTURE))
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        config,
        attn_implementation=spec.implementation,
        dtype=torch.float32,
        trust_remote_code=False,
    )
    model.eval()
    if variant.window is not None:
        hf_attn_patch.configure_swa(model, window=variant.window)
    name = variant.name(config.num_attention_heads)
    return LoadedModel(
        spec=spec, label=name, model=model, tokenizer=None, load_seconds=0.0, weight_bytes=0
    )


def converted(counts: Sequence[int], calibration: str, work: Path) -> dict[int, Path]:
    """The fixture with each number of KV heads."""
    found = {counts[0]: FIXTURE}
    work.mkdir(parents=True, exist_ok=True)
    text = work / "calibration.txt"
    text.write_text(calibration, encoding="utf-8")
    for n in counts[1:]:
        found[n] = work / f"{FIXTURE.name}-kv{n}"
        if not found[n].exists():
            print(f"converting to {n} KV heads ...", file=sys.stderr)
            settings = Calibration(text=text, sequence_length=256)
            convert(FIXTURE, found[n], num_key_value_heads=n, method="csvd+fit",
                    calibration=settings)  # fmt: skip
    return found


def judged(
    variants: Sequence[Variant], folders: dict[int, Path], held_out: str, tokens: int
) -> list[Quality]:
    """The first variant is the source."""
    models = [load(v.spec(str(folders[v.kv_heads])), dtype="float32") for v in variants]
    length = models[0].model.config.max_position_embeddings
    windows = spread_windows(models[0].tokenizer, held_out, tokens, length)
    return measure_quality(models, windows)


def row(
    variant: Variant,
    heads: int,
    speed: Speed,
    first: Speed,
    quality: Quality,
    source: Quality,
    size: tuple[int, int],
) -> dict[str, str]:
    assert speed.decode_tokens_s and speed.decode_spread and first.decode_tokens_s
    low, high = speed.decode_spread  # of the rate: the quick end is the short time
    values = {
        "variant": variant.name(heads),
        "kv_heads": variant.kv_heads,
        "window": variant.window,
        "parameters": size[0],
        "intermediate_size": size[1],
        "dtype": "float32",
        "batch": speed.batch,
        "context": speed.context,
        "new_tokens": speed.new_tokens,
        "rounds": speed.rounds,
        "ms_per_step": 1e3 * speed.batch / speed.decode_tokens_s,
        "p20_ms": 1e3 * speed.batch / high,
        "p80_ms": 1e3 * speed.batch / low,
        "of_mha": first.decode_tokens_s / speed.decode_tokens_s,
        "kv_bytes": speed.kv_bytes,
        "prefill_tok_s": speed.prefill_tokens_s,
        "ppl": quality.perplexity,
        "ppl_ratio": quality.perplexity / source.perplexity,
        "kl": quality.kl_mean,
        "top1": quality.top1,
        "quality_tokens": quality.tokens,
    } | {name: getattr(environment(), name) for name in ENVIRONMENT}
    return {name: _text(values[name]) for name in COLUMNS}


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """The whole table anew: its rows were measured in turns and belong together."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
