"""Everything that needs a GPU: the kernel tests natively, and the GPU rows of results/.

    PYTHONPATH=.:kernels:converters python3 scripts/gpu.py --slice correctness
    make gpu SLICE=forward

Needs torch, triton, transformers, pytest and hypothesis, no virtual environment. A slice of timings
stops at its budget and goes on when it is started again. Exits 1 without a GPU, when a test fails,
or when this package was wrong or could not run somewhere.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMED = ("forward", "backward", "decode")
SLICES = ("correctness", *TIMED, "generate", "all")


def correctness() -> int:
    """Run the kernel tests on the GPU; the exit code is pytest's."""
    tests = sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_kernel_*.py")
    )
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu or not slow", *tests]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def timings(slices: Sequence[str], out: Path, budget_s: float) -> int:
    """Measure what is missing of `slices`; 1 when this package was wrong anywhere."""
    import torch

    from hf_attn_patch.bench import gpu
    from hf_attn_patch.bench.rows import OURS

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
    options = "--shape llama3-8b --device cuda --dtype bfloat16 --requests 128 --longest 1024"
    command = [
        sys.executable,
        str(script),
        *options.split(),
        "--new-tokens",
        "128",
        "--rounds",
        "2",
    ]
    return subprocess.run([*command, "--out", str(out)], cwd=ROOT, check=False).returncode


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
    chosen = ("correctness", *TIMED) if args.slice == "all" else (args.slice,)
    code = correctness() if "correctness" in chosen else 0
    timed = [name for name in chosen if name in TIMED]
    # a speedup is never reported on a red gate
    if code == 0 and timed:
        code = timings(timed, args.out, args.budget)
    if code == 0 and args.slice in ("generate", "all"):
        code = generate(args.out.with_name("generate_gpu.csv"))
    return code


if __name__ == "__main__":
    sys.exit(main())
