"""Everything that needs a GPU: the kernel tests natively, and the GPU rows of results/.

    PYTHONPATH=.:kernels:converters python3 scripts/gpu.py --slice correctness
    make gpu SLICE=forward
    make gpu SLICE=model

Needs torch, triton, transformers, pytest and hypothesis, no virtual environment. A slice of timings
stops at its budget and goes on when it is started again. Exits 1 without a GPU, when a test fails,
or when this package was wrong or could not run somewhere.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TIMED = ("forward", "backward", "decode")


class Whole(NamedTuple):
    """One of hf_attn_patch.bench.model's runs: every context with every number of sequences."""

    shape: str
    phase: str
    batches: tuple[int, ...]
    contexts: tuple[int, ...]


# Whole models with random weights, in the order of what is worth knowing first: a slice may end
# after any of them.
WHOLE = {
    "model": (
        Whole(shape="llama3-8b", phase="prefill", batches=(1,), contexts=(8192, 32768)),
        Whole(shape="llama3-8b", phase="decode", batches=(1, 8, 64), contexts=(1024, 8192)),
        Whole(shape="mistral-7b", phase="prefill", batches=(1,), contexts=(8192, 32768)),
        Whole(shape="mistral-7b", phase="decode", batches=(1, 8, 64), contexts=(8192,)),
        Whole(shape="gpt-oss-20b-4-experts", phase="decode", batches=(1, 64), contexts=(8192,)),
        Whole(shape="gpt-oss-20b-4-experts", phase="prefill", batches=(1,), contexts=(8192,)),
        Whole(shape="gemma3-4b", phase="prefill", batches=(1,), contexts=(8192, 32768)),
        Whole(shape="gemma3-4b", phase="decode", batches=(1, 8), contexts=(8192, 32768)),
        Whole(shape="gemma3-1b", phase="decode", batches=(1, 64), contexts=(8192,)),
        Whole(shape="llama3-8b", phase="decode", batches=(1,), contexts=(32768, 131072)),
        Whole(shape="mistral-7b", phase="prefill", batches=(1,), contexts=(131072,)),
        Whole(shape="llama3-8b", phase="prefill", batches=(1,), contexts=(131072,)),
    ),
    "training": (
        Whole(shape="llama3-8b", phase="training", batches=(1,), contexts=(8192, 16384)),
        Whole(shape="gemma3-1b", phase="training", batches=(1,), contexts=(8192, 32768)),
        Whole(shape="mistral-7b", phase="training", batches=(1,), contexts=(8192, 16384)),
        Whole(shape="llama3-8b", phase="training", batches=(1,), contexts=(2048, 32768)),
    ),
}
SLICES = ("correctness", *TIMED, *WHOLE, "generate", "all")


def correctness() -> int:
    """Run the kernel tests on the GPU; the exit code is pytest's."""
    tests = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests" / "kernels").glob("test_kernel_*.py")
    )
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu or not slow", *tests]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def timings(slices: Sequence[str], out: Path, budget_s: float) -> int:
    """Measure what is missing of `slices`; 1 when this package was wrong anywhere."""
    import torch
    from bench import gpu

    from hf_attn_patch.bench.results import OURS

    report = gpu.run(slices, out=out, device=torch.device("cuda"), budget_s=budget_s)
    for title, lines in (("left out", report.left_out), ("WRONG, not timed", report.wrong)):
        for line in lines:
            print(f"{title}: {line}")
    print(f"{len(report.rows)} rows added to {out}")
    if report.shapes_left:
        print(f"out of time with {report.shapes_left} shapes left: run the same command again")
    ours_failed = [line for line in report.wrong + report.left_out if f" {OURS}:" in line]
    return 1 if ours_failed else 0


def generate(out: Path) -> int:
    """`generate_batch` of a Llama-3-8B's shape with random weights, beside transformers' own."""
    script = ROOT / "scripts" / "bench_generate.py"
    options = (
        "--shape llama3-8b --device cuda --dtype bfloat16 --requests 128 --longest 1024 "
        "--new-tokens 128 --rounds 2"
    )
    command = [sys.executable, str(script), *options.split()]
    return subprocess.run([*command, "--out", str(out)], cwd=ROOT, check=False).returncode


def whole(name: str, out: Path, budget_s: float, device: str = "cuda") -> int:
    """Measure what is missing of a slice of whole models; 1 when this package was wrong."""
    from hf_attn_patch.bench import model

    end, code = time.monotonic() + budget_s, 0
    for run in WHOLE[name]:
        print(f"{run.shape}: {run.phase}", flush=True)
        try:
            model.run(
                shape=run.shape,
                phases=[run.phase],
                batches=run.batches,
                contexts=run.contexts,
                dtype="bfloat16",
                device=device,
                budget_s=end - time.monotonic(),
                out=out,
                say=print,
            )
        except RuntimeError as error:  # the others go on
            print(f"FAILED: {error}", flush=True)
            code = 1
    return code


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slice", choices=SLICES, default="all", help="what to run (all)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results" / "attention_gpu.csv", help="CSV to append to"
    )
    parser.add_argument(
        "--budget", type=float, default=450.0, help="seconds after which no new shape starts"
    )
    args = parser.parse_args(argv)
    if args.budget <= 0:
        parser.error(f"--budget must be positive, got {args.budget:g}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    import torch

    if not torch.cuda.is_available():
        print(
            f"no GPU: torch {torch.__version__} sees no CUDA or ROCm device here. On a CPU the "
            "same tests run in Triton's interpreter: make test",
            file=sys.stderr,
        )
        return 1
    chosen = SLICES if args.slice == "all" else (args.slice,)
    code = correctness() if "correctness" in chosen else 0
    timed = [name for name in chosen if name in TIMED]
    # a speedup is never reported on a red gate
    if code == 0 and timed:
        code = timings(timed, args.out, args.budget)
    for name in (name for name in chosen if name in WHOLE and code == 0):
        code = whole(name, args.out.with_name("model_gpu.csv"), args.budget)
    if code == 0 and "generate" in chosen:
        code = generate(args.out.with_name("generate_gpu.csv"))
    return code


if __name__ == "__main__":
    sys.exit(main())
