"""`hf-attn check`: what would run here, on which backend, and why; if not, what to do."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..capabilities import Rejected, Verdict
from ..transformers_compat.private_names import refusal as refusal_by_release
from .common import FAILED, DeviceOption, JsonOption, print_json, print_table

if TYPE_CHECKING:
    from ..registry import AttentionImpl


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
    from hf_attn_patch.loading import best_device
    from hf_attn_patch.transformers_compat import private_names, releases

    known = {impl.name: impl for impl in list_implementations()}
    names = attn or list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no implementation {unknown[0]!r}; possible: {', '.join(known)}")
    where = device or best_device()
    if build:
        build_cpu_extension()
    compiled = extension.status()
    looked_at, missing = private_names.look_at_all()
    found = releases.releases()
    if model is None:
        verdicts = {name: _on_this_machine(known[name], where) for name in names}
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
                "releases": [asdict(release) for release in found],
                "private_names": {
                    "looked_at": looked_at,
                    "missing": [
                        {"name": m.wanted.full_name, "wrong": m.wrong, "without": m.wanted.without}
                        for m in missing
                    ],
                },
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
        for release in found:
            version = f"{release.package} {release.version or ''}".strip()
            typer.echo(f"{version}: {release.remark}")
        as_wanted = f"{looked_at - len(missing)} of {looked_at}"
        typer.echo(f"private names of transformers that are as expected: {as_wanted}")
        for m in missing:
            typer.echo(f"  {m}")
    if not any(v.ok for v in verdicts.values()):
        raise typer.Exit(FAILED)


def _on_this_machine(impl: AttentionImpl, device: str) -> Verdict:
    refusal = refusal_by_release(impl.name)
    if refusal is not None:
        return Rejected(*refusal)
    return impl.requires.check(device.split(":")[0])
