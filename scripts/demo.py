"""The main job on a real checkpoint: `make demo`. Writes report.html; four minutes on two cores.

1. Fetches SmolLM2-135M-Instruct (once) and runs it with sdpa, triton_fa2 and triton_swa: the
   tokens must be the same.
2. Continues all prompts at once from a cache in pages: the tokens must be the same.
3. Expands its 3 KV heads to 9 (MHA) and pools them back: the difference must be 0.0.
4. Converts 3 KV heads to 1 (MQA), by mean pooling and by csvd, trains the attention of the latter
   for a moment on the source's distributions, and puts what each costs on one page.

It ends with the time of each part. Exit code 1 when something must be and is not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measure.cores import usable_cores

from hf_attn_converters import convert
from hf_attn_converters.calibration import Calibration
from hf_attn_converters.io.checkpoint import open_checkpoint
from hf_attn_converters.precision import products
from hf_attn_converters.uptrain import Hooks, UptrainOptions, uptrain
from hf_attn_patch.cli.common import print_table, progress_bar, say
from hf_attn_patch.cli.uptrain import announcement
from hf_attn_patch.compare import (
    CompareOptions,
    Comparison,
    compare,
    table,
    verdicts,
)
from hf_attn_patch.compare.page import write_report

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples" / "text" / "state_of_the_union.txt"
PROMPTS = ROOT / "examples" / "text" / "prompts.txt"
EVALUATED = 1536  # tokens of the text's beginning on which conversions are judged
CALIBRATED = 8192  # tokens of the rest: csvd comes nearly as far as with six times as many

# Wider than any text here: every token is seen, so the tokens must be those of full attention.
WIDE = "triton_swa:window=8192"
LEAN = "triton_swa:window=128:sinks=4"


class DemoFailed(Exception):
    """Something that must hold does not."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The main job on a real checkpoint.")
    parser.add_argument("--model", type=Path, help="another Llama checkpoint than SmolLM2-135M")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="downloads and outputs")
    parser.add_argument("--report", type=Path, default=ROOT / "report.html")
    parser.add_argument("--new-tokens", type=int, default=16, help="greedy tokens per prompt")
    parser.add_argument("--uptrain-tokens", type=int, default=6144)
    parser.add_argument("--context", type=int, default=512, help="prompt tokens when timing")
    threads, why = usable_cores()
    parser.add_argument("--threads", type=int, default=threads, help=f"{threads} here: {why}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    show(f"{options.threads} threads; {products(torch.bfloat16).why}")
    times = Times()
    try:
        with times.of("the checkpoint"):
            source = options.model or fetch(options.cache)
        with times.of("implementations"):
            implementations(source, options)
        with times.of("pages"):
            in_pages(source, options)
        work = options.cache / "demo"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        with times.of("there and back"):
            there_and_back(source, work)
        comparison = conversions(source, work, options, times)
    except DemoFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_report(options.report, comparison)
    heading("What took how long")
    print_table(["", "seconds", "CPU seconds"], times.rows())
    show(f"wrote {options.report} after {times.total:.0f} s")
    return 0


class Times:
    """How long each part took, by the clock and on the processor."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        clock, cpu = time.perf_counter(), time.process_time()
        yield
        self.found[part] = time.perf_counter() - clock, time.process_time() - cpu

    @property
    def total(self) -> float:
        return sum(clock for clock, _ in self.found.values())

    def rows(self) -> list[list[str]]:
        return [[part, f"{clock:.1f}", f"{cpu:.1f}"] for part, (clock, cpu) in self.found.items()]


def fetch(cache: Path) -> Path:
    """SmolLM2's folder. In a process of its own, which gives its memory back."""
    target = cache / "smollm2-135m"
    script = Path(__file__).with_name("fetch_checkpoint.py")
    command = [sys.executable, str(script), "smollm2", str(target)]
    if subprocess.run(command, check=False).returncode:
        raise DemoFailed("the demo needs SmolLM2-135M; see above for what is missing")
    return target


def implementations(source: Path, options: argparse.Namespace) -> None:
    heading("1. The same checkpoint with other attention implementations")
    candidates = [f"{source}@{name}" for name in ("triton_fa2", WIDE, LEAN)]
    result = run(f"{source}@sdpa", candidates, options, max_tokens=768)
    for found in result.generation[1:3]:
        if found.exact < 1:
            first = next(i for i, d in enumerate(found.diverged_at) if d is not None)
            raise DemoFailed(
                f"{found.label} and {result.source} must write the same tokens, and part at token "
                f"{found.diverged_at[first]} of the prompt {found.prompts[first]!r}"
            )
    show("The tokens of sdpa, triton_fa2 and triton_swa are the same.")


def in_pages(source: Path, options: argparse.Namespace) -> None:
    """All prompts as one padded batch: what they have in common is stored once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_attn_patch import PagedCache

    heading("2. All prompts at once, from a cache in pages")
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    inputs: Any
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
    else:
        inputs = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    how: dict[str, Any] = {"max_new_tokens": options.new_tokens, "do_sample": False}
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, attn_implementation="sdpa", dtype=torch.float32, trust_remote_code=False
    )
    expected = model.generate(**inputs, **how)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        attn_implementation="triton_paged_flash2",
        dtype=torch.float32,
        trust_remote_code=False,
    )
    cache = PagedCache(model)
    found = model.generate(**inputs, **how, past_key_values=cache)
    stats = cache.stats()
    reused = cache.start(**inputs)
    show(
        f"{len(found)} prompts of up to {inputs['input_ids'].shape[1]} tokens: {stats.used} pages "
        f"of {stats.page_size} tokens, {stats.shared} of them shared, {stats.internal_waste:.1f}% "
        f"of their places empty. Asked again, {reused} columns would not be computed again."
    )
    if not torch.equal(found, expected):
        raise DemoFailed("pages and sdpa's cache must give the same tokens")
    show("The tokens are those of sdpa.")


def there_and_back(source: Path, work: Path) -> None:
    heads, kv_heads = head_counts(source)
    mha, back = (work / f"{source.name}-{name}" for name in ("mha", "back"))
    heading(f"3. {kv_heads} KV heads to {heads} (MHA), and pooled back")
    convert_shown(source, mha, heads)
    convert_shown(mha, back, kv_heads, method="mean")
    count, difference = largest_difference(source, back)
    for folder in (mha, back):
        shutil.rmtree(folder)
    show(f"{count} tensors, expanded and pooled back: largest difference {difference}")
    if difference != 0.0:
        raise DemoFailed("expanding and pooling back must give the source's tensors")


def conversions(source: Path, work: Path, options: argparse.Namespace, times: Times) -> Comparison:
    heading(f"4. {head_counts(source)[1]} KV heads to 1 (MQA), and a moment of training")
    rest = rest_of_text(work)
    calibration = Calibration(text=rest, tokens=CALIBRATED, sequence_length=128)
    mean, csvd = (work / f"{source.name}-mqa-{name}" for name in ("mean", "csvd"))
    with times.of("conversion by mean"):
        convert_shown(source, mean, 1, method="mean")
    with times.of("conversion by csvd"):
        convert_shown(source, csvd, 1, method="csvd", calibration=calibration)
    with times.of("uptraining"):
        trained = uptrained(source, csvd, rest, options.uptrain_tokens)
    found = [str(path) for path in (mean, csvd, trained)]
    with times.of("comparison"):
        return run(str(source), found, options, max_tokens=EVALUATED)


def uptrained(source: Path, student: Path, text: Path, tokens: int) -> Path:
    """Attention alone, on the source's distributions."""
    output = student.with_name(student.name + "-uptrained")
    with progress_bar() as update:
        result = uptrain(
            UptrainOptions(
                student=student, teacher=source, text=(str(text),), output=output, tokens=tokens,
                train="attention", sequence_length=128, batch_size=4, evaluations=1,
                eval_tokens=512, attn_implementation="triton_fa2",
            ),
            Hooks(
                progress=lambda done, total, what: update(output.name, done, total), say=say,
                announce=lambda estimate: say(announcement(estimate)),
            ),
        )  # fmt: skip
    show(f"{output.name}: {tokens:,} tokens, {result.seconds:.1f} s")
    return output


def head_counts(source: Path) -> tuple[int, int]:
    config = json.loads((source / "config.json").read_text())
    return config["num_attention_heads"], config["num_key_value_heads"]


def run(
    source: str, candidates: list[str], options: argparse.Namespace, *, max_tokens: int
) -> Comparison:
    settings = CompareOptions(
        text=TEXT,
        prompts=PROMPTS,
        max_tokens=max_tokens,
        new_tokens=options.new_tokens,
        context=options.context,
        decode_tokens=16,
        rounds=2,
    )
    with progress_bar() as update:
        result = compare(source, candidates, settings, progress=update)
    for line in verdicts(result):
        show(f"- {line}")
    print_table(*table(result))
    return result


def rest_of_text(folder: Path) -> Path:
    """The end of the text whose beginning is evaluated: to calibrate and to train on."""
    text = TEXT.read_text(encoding="utf-8")
    rest = folder / "rest.txt"
    rest.write_text(text[len(text) // 4 :], encoding="utf-8")
    return rest


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
    show(
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
    show(f"\n{text}\n{'-' * len(text)}")


def show(line: str) -> None:
    print(line, flush=True)  # into a pipe too


if __name__ == "__main__":
    sys.exit(main())
