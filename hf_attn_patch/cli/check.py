"""`hf-attn check`: what would run here, on which backend, and why; if not, what to do."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .common import FAILED, DeviceOption, JsonOption, print_json, print_table


def check_command(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub name; without it only this machine.")
    ] = None,
    attn: Annotated[
        list[str] | None, typer.Option(help="An implementation; repeatable. By default all.")
    ] = None,
    device: DeviceOption = None,
    build: Annotated[
        bool, typer.Option("--build", help="First compile the CPU extension; needs a C++ compiler.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Say which backend would run a model and why. Exit code 1 if none of those asked for would."""
    from hf_attn_kernels import build_cpu_extension
    from hf_attn_kernels.cpu import extension
    from hf_attn_patch import check, list_implementations
    from hf_attn_patch.compare.models import best_device

    known = {impl.name: impl for impl in list_implementations()}
    names = attn or list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no implementation {unknown[0]!r}; possible: {', '.join(known)}")
    where = device or best_device()
    if build:
        build_cpu_extension()
    compiled = extension.status()
    if model is None:
        verdicts = {name: known[name].requires.check(where.split(":")[0]) for name in names}
    else:
        from hf_attn_converters.io.reading import load_config, reading

        config = load_config(model)
        with reading(model):
            verdicts = {name: check(config, device=where, implementation=name) for name in names}
    if json:
        print_json(
            {
                "model": model,
                "device": where,
                "cpu_extension": asdict(compiled),
                "implementations": {name: v.to_dict() for name, v in verdicts.items()},
            }
        )
    else:
        rows = [
            [name, "yes" if v.ok else "no", v.reason, getattr(v, "fix", "")]
            for name, v in verdicts.items()
        ]
        print_table(["implementation", "runs", "because", "what to do"], rows, title=model or where)
        if where.startswith("cpu"):
            used = "used" if compiled.used else "not used"
            typer.echo(f"CPU extension: {used}, {compiled.reason}")
    if not any(v.ok for v in verdicts.values()):
        raise typer.Exit(FAILED)
