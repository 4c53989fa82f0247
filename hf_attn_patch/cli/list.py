"""`hf-attn list`: the implementations and what each can do."""

from __future__ import annotations

from dataclasses import asdict

from .common import JsonOption, print_json, print_table


def list_command(json: JsonOption = False) -> None:
    """List the attention implementations with their features and backends."""
    from hf_attn_patch import list_implementations

    found = list_implementations()
    if json:
        print_json(
            [
                {
                    "name": impl.name,
                    "summary": impl.summary,
                    "supports": asdict(impl.supports),
                    "requires": asdict(impl.requires),
                }
                for impl in found
            ]
        )
        return
    features = {impl.name: asdict(impl.supports) for impl in found}
    backends = {
        impl.name: ", ".join(f"{d.device}: {d.backend}" for d in impl.requires.devices)
        for impl in found
    }
    rows = [
        [feature.replace("_", " "), *(_cell(features[impl.name][feature]) for impl in found)]
        for feature in asdict(found[0].supports)
    ]
    rows.append(["backends", *backends.values()])
    print_table(["feature", *features], rows)
    for impl in found:
        print(f"{impl.name}: {impl.summary}")


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "–"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
