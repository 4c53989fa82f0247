"""transformers' own modelling tests, with this package in the place of `sdpa`.

    python scripts/upstream_tests.py
    python scripts/upstream_tests.py --families llama,bert -k "eager_matches or batching" --json

Fetches the source distribution of the pinned release by pip (its hash is checked), takes the
tests that it carries and runs them offline on tiny models: once with ours under the name `sdpa`,
and what did not pass once more with transformers' own, so that what fails anyhow is told apart.
Exit 0: every other failure is listed with its reason in upstream/differences.py, and every listed
one still fails.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from upstream.families import FAMILIES
from upstream.fetch import fetch, pinned_version
from upstream.judge import Run, Verdict, judge

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT / "scripts" / "upstream" / "cases.py"
CACHE = ROOT / ".cache" / "their_tests"
# fmt: off
COLUMNS = (
    "family", "implementation", "passed", "failed", "skipped", "stock_failed", "known", "calls",
    "seconds", "torch", "transformers", "date",
)
# fmt: on


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    installed = metadata.version("transformers")
    if installed != pinned_version():
        print(
            f"error: transformers {installed} is installed, but the tests are those of "
            f"{pinned_version()}; pip install transformers=={pinned_version()}",
            file=sys.stderr,
        )
        return 2
    try:
        tests, wheel = fetch(args.cache)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    verdicts = []
    for family in args.families:
        began = time.monotonic()
        common = (family, tests, wheel, args)
        ours = run(*common, in_place=args.attn, chosen=None)
        stock = run(*common, in_place="", chosen=ours.not_passed())
        verdict = judge(family, ours, stock)
        if args.k:  # a choice of tests says nothing about the others
            verdict = replace(verdict, outdated=[])
        verdicts.append((verdict, time.monotonic() - began))
        if not args.json:
            print(line(verdict), flush=True)
    good = all(verdict.good is not args.control for verdict, _ in verdicts)
    if args.json:
        print(json.dumps([verdict.to_dict() for verdict, _ in verdicts], indent=2))
    if args.out is not None:
        append(args.out, args.attn, verdicts)
    return 0 if good else 1


def run(
    family: str,
    tests: Path,
    wheel: Path,
    args: argparse.Namespace,
    *,
    in_place: str,
    chosen: Iterable[str] | None,
) -> Run:
    """One pytest process over one family: all of its tests, or the `chosen`.

    Raises:
        RuntimeError: pytest itself failed; the message ends with what it said.
    """
    names = None if chosen is None else list(chosen)
    if names == []:
        return Run({})
    with tempfile.TemporaryDirectory() as name:
        outcomes = Path(name) / "outcomes.json"
        command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", name]
        command += ["-p", "upstream.plugin", "-p", "no:cacheprovider", "-p", "no:warnings"]
        command += ["--import-mode=importlib"]
        command += ["--family", family, "--in-place", in_place, "--outcomes", str(outcomes)]
        command += ["--their-tests", str(tests), "--their-wheel", str(wheel)]
        command += ["--maskless"] if args.control else []
        if names is None:
            command += [str(CASES), *(("-k", args.k) if args.k else ())]
        else:
            there = Path(name) / "chosen"
            there.write_text("".join(f"{CASES}::Collected::{test}\n" for test in names))
            command += [f"@{there}"]
        done = subprocess.run(
            command, cwd=name, env=_environment(), capture_output=True, text=True, check=False
        )
        if not outcomes.exists() or done.returncode not in (0, 1):
            said = (done.stdout + done.stderr)[-4000:]
            raise RuntimeError(f"pytest on {family} ended with {done.returncode}:\n{said}")
        return Run(**json.loads(outcomes.read_text()))


def line(verdict: Verdict) -> str:
    """The verdict in words: counts, and what must be looked at."""
    v = verdict
    text = (
        f"{'ok  ' if v.good else 'FAIL'} {v.family:8} {v.passed} passed, {v.failed} failed "
        f"({len(v.stock_too)} with stock sdpa too), {v.skipped} skipped; {v.calls} calls of ours"
    )
    for test, reason in v.known.items():
        text += f"\n     known: {test}: {reason}"
    for test, said in v.unexplained.items():
        text += f"\n     UNEXPLAINED: {test}: {said.strip()[:600]}"
    for test in v.outdated:
        text += f"\n     OUTDATED: {test} passes; take it out of differences.py"
    return text


def append(path: Path, implementation: str, verdicts: list[tuple[Verdict, float]]) -> None:
    """Rows of `COLUMNS` to a CSV, which gets its header when it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for v, seconds in verdicts:
            counts = (v.passed, v.failed, v.skipped, len(v.stock_too), len(v.known), v.calls)
            versions = (metadata.version("torch"), metadata.version("transformers"))
            date = datetime.now(timezone.utc).date().isoformat()
            row = (v.family, implementation, *counts, f"{seconds:.0f}", *versions, date)
            writer.writerow(row)


def _environment() -> dict[str, str]:
    roots = (ROOT / "scripts", ROOT, ROOT / "kernels", ROOT / "converters")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, roots)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RUN_TRAINING_TESTS": "1",
        "_INSIDE_SUB_PROCESS": "1",  # their own word for: run it here, not in a pytest of its own
    }


def _families(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        possible = ", ".join(FAMILIES)
        raise argparse.ArgumentTypeError(f"no family {', '.join(unknown)}; possible: {possible}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", type=_families, default=list(FAMILIES), help="a,b,c")
    parser.add_argument("--attn", default="triton_fa2", help="implementation (%(default)s)")
    parser.add_argument("-k", help="only these tests, as pytest's -k")
    parser.add_argument(
        "--control", action="store_true", help="break ours (no masks): exit 0 if it is noticed"
    )
    parser.add_argument("--out", type=Path, help="append a row per family to this CSV")
    parser.add_argument("--json", action="store_true", help="JSON and nothing else")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the tests are kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
