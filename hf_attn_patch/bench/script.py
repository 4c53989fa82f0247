"""A benchmark as a script: argparse and plain text, where `hf-attn bench` has typer and rich."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ..progress import Lines
from . import options
from .options import Option


def parser_of(benchmark: str) -> argparse.ArgumentParser:
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(description=options.BENCHMARKS[benchmark].__doc__)
    for option in options.options_of(benchmark):
        _add(parser, option)
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    return parser


def _add(parser: argparse.ArgumentParser, option: Option) -> None:
    if option.positional:
        count = None if option.required else "?"
        parser.add_argument(option.name, type=option.kind, nargs=count, help=option.help)
        return
    if option.kind is bool:
        parser.add_argument(option.flag, dest=option.name, action="store_true", help=option.help)
        return
    default = option.default
    shown = "" if default is None else f" ({_words(default)})"
    parser.add_argument(
        option.flag,
        dest=option.name,
        type=option.kind,
        nargs="+" if option.many else None,
        default=default,
        help=option.help + shown,
    )


def _words(default: object) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def main(benchmark: str, argv: Sequence[str] | None = None) -> int:
    """Run the script of a benchmark; its exit code: 2 for misuse, 1 for a failure."""
    given = vars(parser_of(benchmark).parse_args(argv))
    as_json = given.pop("json")
    try:
        with Lines(lambda line: print(line, file=sys.stderr, flush=True)) as lines:
            found = options.run(benchmark, given, say=lines.begin)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(json.dumps(found, indent=2) if as_json else text_of(*options.summary(found)))
    return 0


def text_of(same: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Columns set to the left, below what all rows share."""
    lines = [header, *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rows = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join([same, *(row.rstrip() for row in rows)])
