"""Compile every shipped kernel configuration ahead of time and write what each one uses, as CSV.

    PYTHONPATH=kernels python scripts/aot_report.py --out results/aot.csv --jobs 2

Needs Triton, no GPU. Exits 1 if a configuration exceeds its chip's shared memory, or spills.
"""

from __future__ import annotations

import argparse
import csv
import functools
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aot.aot import AotCase, AotResult


@functools.cache
def _cases(arch: str) -> list[AotCase]:
    from aot.aot import aot_cases

    return aot_cases(arch)


def _compile(task: tuple[str, int]) -> AotResult:
    # cases hold jit functions, which do not pickle: a worker finds its own by number
    from aot.aot import compile_case

    arch, number = task
    return compile_case(_cases(arch)[number], arch)


def results(
    archs: Sequence[str], patterns: Sequence[str] = ("",), jobs: int = 1
) -> Iterator[AotResult]:
    """Compile the cases of `archs` whose "kernel name" contains one of `patterns`, in order."""
    tasks = [
        (arch, number)
        for arch in archs
        for number, case in enumerate(_cases(arch))
        if any(pattern in f"{case.kernel} {case.name}" for pattern in patterns)
    ]
    if jobs == 1:
        yield from map(_compile, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(_compile, tasks, chunksize=8)


def complaint(result: AotResult) -> str | None:
    """What is wrong with a configuration, or None."""
    where = f"{result.arch} {result.kernel} {result.name}"
    if not result.fits:
        return (
            f"{where}: {result.shared} bytes of shared memory, the chip has {result.shared_limit}"
        )
    if result.spilled:
        return f"{where}: {result.spilled} spilled"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    from aot.aot import CHIPS, AotResult

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="CSV to write; standard output by default")
    parser.add_argument("--arch", nargs="+", choices=tuple(CHIPS), default=tuple(CHIPS))
    parser.add_argument(
        "--only", nargs="+", default=("",), help='cases whose "kernel name" contains one of these'
    )
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args(argv)
    # seconds depend on the machine and its cache, not on the kernels
    columns = [field.name for field in fields(AotResult) if field.name != "seconds"]
    rows: list[dict[str, object]] = []
    complaints: list[str] = []
    for count, result in enumerate(results(args.arch, args.only, args.jobs), 1):
        print(
            f"\r{count}: {result.arch} {result.kernel} {result.name}\033[K", end="", file=sys.stderr
        )
        rows.append({name: value for name, value in asdict(result).items() if name in columns})
        complaints += filter(None, [complaint(result)])
    print(file=sys.stderr)
    file = args.out.open("w", newline="") if args.out else sys.stdout
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if args.out:
        file.close()
    print(*complaints, sep="\n", file=sys.stderr)
    return 1 if complaints or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
