"""`hf-attn bench`: what makes the tables of results; its options are those of the scripts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from hf_attn_patch.bench import options
from hf_attn_patch.progress import Lines

from .common import JsonOption, print_json, print_table, say

bench_app = typer.Typer(no_args_is_help=True, help="Run a benchmark.")


@bench_app.callback()
def _subject() -> None:
    """Run a benchmark."""  # with a callback typer keeps the subject's name in the command


def command_of(benchmark: str) -> Callable[..., None]:
    """A benchmark as typer wants it: a function whose parameters are the options."""

    def command(json: bool, **given: Any) -> None:
        with Lines(say) as lines:
            found = options.run(benchmark, given, say=lines.begin)
        if json:
            print_json(found)
            return
        same, header, cells = options.summary(found)
        if same:
            typer.echo(same)
        if header:
            print_table(header, cells)
        if given["out"] is not None:
            typer.echo(f"appended {len(found)} rows to {given['out']}")

    parameters = [_parameter(option) for option in options.options_of(benchmark)]
    parameters.append(_keyword("json", JsonOption, default=False))
    command.__doc__ = options.BENCHMARKS[benchmark].__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _parameter(option: options.Option) -> inspect.Parameter:
    kind: Any = list[option.kind] if option.many else option.kind  # type: ignore[name-defined]
    if option.default is None:
        kind = kind | None
    if option.positional:
        how: Any = typer.Argument(help=option.help)
    else:
        text = f"{option.help} Repeatable." if option.many else option.help
        how = typer.Option(option.flag, help=text)
    default = inspect.Parameter.empty if option.required else option.default
    return _keyword(option.name, Annotated[kind, how], default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


for _name in options.BENCHMARKS:
    bench_app.command(_name)(command_of(_name))
