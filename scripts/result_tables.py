"""Write the tables of README.md and docs/*.md from the code and from results/*.csv.

    python scripts/result_tables.py            # rewrite
    python scripts/result_tables.py --check    # exit 1 if a file is stale

A table stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`, in one file only. What has
no CSV yet is shown as not measured yet. An attention row that is slower than PyTorch's best way
without a reason stops either (tables/slower.py).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tables.attention import cpu_table, default_table, gpu_table, growth_table, mla_table
from tables.compiled import aot_table, sass_table
from tables.conversion import convert_table, gqa_table, latents_table
from tables.implementations import implementations_table
from tables.models import generate_table, heads_table
from tables.slower import slower_table
from tables.whole import model_table, short_table

ROOT = Path(__file__).resolve().parents[1]
TABLES: dict[str, Callable[[Path], str]] = {
    "cpu-default": default_table(2),
    "implementations": implementations_table,
    "cpu": cpu_table(2),
    "cpu-1": cpu_table(1),
    "mla": mla_table,
    "growth": growth_table,
    "gpu-forward": gpu_table("forward"),
    "gpu-backward": gpu_table("backward"),
    "gpu-decode": gpu_table("decode"),
    "slower": slower_table,
    "model": model_table("prefill", "decode"),
    "training": model_table("training"),
    "short": short_table,
    "generate": generate_table,
    "heads": heads_table,
    "convert-smollm2": convert_table("smollm2"),
    "convert": convert_table(),
    "gqa": gqa_table,
    "latents": latents_table,
    "aot": aot_table,
    "sass": sass_table,
}
MARKED = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table:(?P=name) -->)", re.DOTALL)


def render(texts: Mapping[Path, str], results: Path) -> dict[Path, str]:
    """Files with their marked tables written anew; ValueError for a table unknown or missing."""
    found = Counter(match["name"] for text in texts.values() for match in MARKED.finditer(text))
    if found != Counter(TABLES.keys()):
        wrong = sorted(name for name in {*found, *TABLES} if found[name] != (name in TABLES))
        raise ValueError(
            f"wrong tables: {', '.join(f'{name} ({found[name]} times)' for name in wrong)}; "
            f"README.md and docs/*.md together must have each of {', '.join(TABLES)} once, between "
            "<!-- table:NAME --> and <!-- /table:NAME -->"
        )
    return {
        path: MARKED.sub(lambda m: f"{m[1]}{TABLES[m['name']](results)}\n{m[3]}", text)
        for path, text in texts.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="of README.md and docs/")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    args = parser.parse_args(argv)
    files = [args.root / "README.md", *sorted((args.root / "docs").rglob("*.md"))]
    before = {path: path.read_text() for path in files}
    try:
        after = render(before, args.results)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    stale = [path for path in files if before[path] != after[path]]
    if not args.check:
        for path in stale:
            path.write_text(after[path])
    elif stale:
        names = ", ".join(str(path.relative_to(args.root)) for path in stale)
        print(f"stale: {names}: make results", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
