"""`hf-attn`: one file per command. Heavy imports stay inside the commands, so --help is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from .bench import bench_app
from .check import check_command
from .common import CommandGroup
from .compare import compare_command
from .convert import convert_command
from .estimate import estimate_command
from .generate import generate_command
from .list import list_command
from .uptrain import uptrain_command


def _show_version(wanted: bool) -> None:
    if wanted:
        from hf_attn_patch import __version__

        typer.echo(f"hf-attn-patch {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Better attention layers for Hugging Face models. Exit codes: 0 done, 1 failed, 2 misuse.",
)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Say the version, and end."
        ),
    ] = False,
) -> None:
    pass


app.command("list")(list_command)
app.command("check")(check_command)
app.command("generate")(generate_command)
app.command("convert")(convert_command)
app.command("uptrain")(uptrain_command)
app.command("compare")(compare_command)
app.command("estimate")(estimate_command)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """The console script."""
    app(prog_name="hf-attn")


__all__ = ["app", "main"]
