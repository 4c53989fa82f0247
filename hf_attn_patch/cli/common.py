"""What every command shares: exit codes, JSON, tables and progress bars."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

FAILED, MISUSE = 1, 2

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")
]
DtypeOption = Annotated[
    str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, xpu; by default an accelerator if there is one.")
]
ChatOption = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Prompts through the chat template; by default if the tokenizer has one.",
    ),
]


class CommandGroup(TyperGroup):
    """Turns exceptions into one line on stderr and an exit code: ValueError means misuse.

    HF_ATTN_DEBUG=1 in the environment keeps the traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # the first two are RuntimeErrors
            raise
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            if os.environ.get("HF_ATTN_DEBUG"):
                raise
            typer.echo(f"error: {_told(error)}", err=True)
            raise typer.Exit(MISUSE if isinstance(error, ValueError) else FAILED) from None


def _told(error: Exception) -> str:
    """An error's words; transformers' own, that code must be trusted, in one line for a command."""
    words = str(error)
    if isinstance(error, ValueError) and "trust_remote_code" in words:
        first = words.splitlines()[0].strip().rstrip(".")
        return f"{first}; hf-attn runs no code that lies in a checkpoint"
    return words


def print_json(value: Any) -> None:
    """`value` as JSON on stdout; infinities and NaN, which JSON lacks, become null."""
    typer.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table on stdout. The first column is text, columns of numbers are set to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for i, name in enumerate(header):
        numeric = i > 0 and all(row[i][:1] in "0123456789–-<" for row in rows if row[i])
        table.add_column(
            name, justify="right" if numeric else "left", overflow="fold", no_wrap=i == 0
        )
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no edge to wrap at
    console.print(table)


@contextmanager
def progress_bar(*, quiet: bool = False, in_bytes: bool = False) -> Iterator[Callable[..., None]]:
    """Progress on stderr; gives `update(what, done, total)`. A new `what` begins a new bar.

    Without a terminal there are lines in the place of bars, see `hf_attn_patch.progress`.
    `in_bytes` shows amounts as bytes and bytes/s; `update(..., in_bytes=...)` says so of one bar.
    """
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if quiet:
        yield lambda what, done, total, in_bytes=False: None
        return
    if not console.is_terminal:
        from hf_attn_patch.progress import Lines

        with Lines(say) as lines:
            yield lines.update
        return

    class Amount(progress.ProgressColumn):
        """Done of total, as a count or as bytes with their rate."""

        count = progress.MofNCompleteColumn()
        size, rate = progress.DownloadColumn(), progress.TransferSpeedColumn()

        def render(self, task: progress.Task) -> Any:
            if not task.fields["in_bytes"]:
                return self.count.render(task)
            return self.size.render(task) + " " + self.rate.render(task)

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        Amount(),
        progress.TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, progress.TaskID] = {}

    def update(what: str, done: int, total: int, in_bytes: bool = in_bytes) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total, in_bytes=in_bytes)
        bar.update(tasks[what], completed=done, total=total)

    with bar:
        yield update


def say(line: str) -> None:
    """A line on stderr, at once."""
    typer.echo(line, err=True)
