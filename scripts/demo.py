"""The main job on a real checkpoint: `make demo`. Writes report.md; about five minutes.

1. Fetches SmolLM2-135M-Instruct (once) and runs it with sdpa, triton_fa2 and triton_swa: the
   tokens must be the same.
2. Expands its 3 KV heads to 9 (MHA) and pools them back: the difference must be 0.0.
3. Converts 3 KV heads to 1 (MQA), by mean pooling and by csvd, and measures what each costs.

Exit code 1 when something must be and is not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hf_attn_converters import convert
from hf_attn_converters.calibration import Calibration
from hf_attn_converters.checkpoint import open_checkpoint
from hf_attn_patch.cli.common import print_table, progress_bar
from hf_attn_patch.compare import (
    CompareOptions,
    Comparison,
    compare,
    markdown,
    table,
    verdicts,
)

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples" / "text" / "state_of_the_union.txt"
PROMPTS = ROOT / "examples" / "text" / "prompts.txt"
EVALUATED = 2048  # tokens of the text's beginning on which conversions are judged

# Wider than any text here: every token is seen, so the tokens must be those of full attention.
WIDE = "triton_swa:window=8192"
LEAN = "triton_swa:window=128:sinks=4"


class DemoFailed(Exception):
    """Something that must hold does not."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The main job on a real checkpoint.")
    parser.add_argument("--model", type=Path, help="another Llama checkpoint than SmolLM2-135M")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="downloads and outputs")
    parser.add_argument("--report", type=Path, default=ROOT / "report.md")
    parser.add_argument("--new-tokens", type=int, default=24, help="greedy tokens per prompt")
    parser.add_argument("--context", type=int, default=512, help="prompt tokens when timing")
    parser.add_argument(
        "--threads", type=int, default=idle_cores(), help="by default the cores that are idle now"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    sections: list[str] = []
    try:
        source = options.model or fetch(options.cache)
        implementations(source, options, sections)
        conversions(source, options, sections)
    except DemoFailed as error:
        sections.append(f"## Failed\n\n{error}\n")
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if sections:
            options.report.write_text("\n".join(["# Demo report\n", *sections]), encoding="utf-8")
            print(f"wrote {options.report} after {time.perf_counter() - start:.0f} s")
    return 0


def idle_cores() -> int:
    """At least 1. Threads that share a core wait for each other: far slower than fewer of them."""
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, (os.cpu_count() or 1) - round(busy))


def fetch(cache: Path) -> Path:
    """SmolLM2's folder. In a process of its own, which gives its memory back."""
    target = cache / "smollm2-135m"
    script = Path(__file__).with_name("fetch_checkpoint.py")
    command = [sys.executable, str(script), "smollm2", str(target)]
    if subprocess.run(command, check=False).returncode:
        raise DemoFailed("the demo needs SmolLM2-135M; see above for what is missing")
    return target


def implementations(source: Path, options: argparse.Namespace, sections: list[str]) -> None:
    heading("1. The same checkpoint with other attention implementations")
    candidates = [f"{source}@{name}" for name in ("triton_fa2", WIDE, LEAN)]
    result = run(f"{source}@sdpa", candidates, options, max_tokens=1024)
    sections.append(markdown(result, "Attention implementations"))
    for found in result.generation[1:3]:
        if found.exact < 1:
            first = next(i for i, d in enumerate(found.diverged_at) if d is not None)
            raise DemoFailed(
                f"{found.label} and {result.source} must write the same tokens, and part at token "
                f"{found.diverged_at[first]} of the prompt {found.prompts[first]!r}"
            )
    print("The tokens of sdpa, triton_fa2 and triton_swa are the same.")


def conversions(source: Path, options: argparse.Namespace, sections: list[str]) -> None:
    config = json.loads((source / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    work = options.cache / "demo"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    mha, back, mean, csvd = (
        work / f"{source.name}-{name}" for name in ("mha", "back", "mqa-mean", "mqa-csvd")
    )

    heading(f"2. {kv_heads} KV heads to {heads} (MHA), and pooled back")
    convert_shown(source, mha, heads)
    convert_shown(mha, back, kv_heads, method="mean")
    count, difference = largest_difference(source, back)
    shutil.rmtree(back)
    line = f"{count} tensors, expanded and pooled back: largest difference {difference}"
    print(line)
    sections.append(f"## There and back\n\n{line}.\n")
    if difference != 0.0:
        raise DemoFailed("expanding and pooling back must give the source's tensors")

    heading(f"3. {kv_heads} KV heads to 1 (MQA), without any training")
    convert_shown(source, mean, 1, method="mean")
    convert_shown(source, csvd, 1, method="csvd", calibration=calibration(work))
    result = run(str(source), [str(mha), str(mean), str(csvd)], options, max_tokens=EVALUATED)
    sections.append(markdown(result, "Conversions"))
    shutil.rmtree(mha)


def run(
    source: str, candidates: list[str], options: argparse.Namespace, *, max_tokens: int
) -> Comparison:
    settings = CompareOptions(
        text=TEXT,
        prompts=PROMPTS,
        max_tokens=max_tokens,
        new_tokens=options.new_tokens,
        context=options.context,
        rounds=2,
    )
    with progress_bar() as update:
        result = compare(source, candidates, settings, progress=update)
    for line in verdicts(result):
        print(f"- {line}")
    print_table(*table(result))
    return result


def calibration(folder: Path) -> Calibration:
    """The end of the text whose beginning is evaluated."""
    text = TEXT.read_text(encoding="utf-8")
    rest = folder / "calibration.txt"
    rest.write_text(text[len(text) // 4 :], encoding="utf-8")
    return Calibration(text=rest, tokens=8192, sequence_length=128)


def convert_shown(source: Path, target: Path, kv_heads: int, **how: Any) -> None:
    with progress_bar() as update:
        result = convert(
            source,
            target,
            num_key_value_heads=kv_heads,
            progress=lambda done, all, what: update(target.name, done, all, in_bytes=True),
            layer_progress=lambda done, all, what: update(f"{target.name}, layers", done, all),
            **how,
        )
    plan = result.plan
    print(
        f"{target.name}: {plan.kv_heads_before} -> {plan.kv_heads_after} KV heads ({plan.method}), "
        f"{plan.kv_bytes_per_token_before:,} -> {plan.kv_bytes_per_token_after:,} KV bytes per "
        f"token, {result.seconds:.1f} s"
    )


def largest_difference(one: Path, other: Path) -> tuple[int, float]:
    """(tensors, largest absolute difference) of two checkpoints, tensor by tensor."""
    a, b = open_checkpoint(one), open_checkpoint(other)
    infos = {info.name: info for info in a}
    if infos != {info.name: info for info in b}:
        raise DemoFailed(f"{one.name} and {other.name} hold different tensors, shapes or dtypes")
    gaps = [(a.read(name).double() - b.read(name).double()).abs().max() for name in infos]
    return len(gaps), torch.stack(gaps).max().item()  # NaN, should there be one, stays NaN


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
