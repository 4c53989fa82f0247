"""How an output was made: `conversion.json`, and the section that says it in the model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from .conversion import EXACT, Work

RECORD = "conversion.json"  # beside config.json
CARD = "README.md"

_BEGIN, _END = "<!-- hf-attn-patch: begin -->", "<!-- hf-attn-patch: end -->"
_SECTION = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END) + r"\r?\n?", re.DOTALL)


SPECIAL_TOKENS = {"windows_begin_with", "windows_end_with"}  # <s> would be read as markup


def version() -> str:
    """This program's version; "unknown" when it runs without being installed."""
    try:
        return metadata.version("hf-attn-patch")
    except metadata.PackageNotFoundError:
        return "unknown"


def make_record(
    work: Work,
    *,
    calibration: Mapping[str, Any] | None = None,
    verification: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Provenance without paths: a folder is passed on, its maker's file system is not.

    `source_headers_sha256` is over the headers of the source's weights files (names, dtypes,
    shapes, offsets), not over the values. `earlier` lists what the source itself went through.
    """
    plan = work.plan
    public = replace(plan, source=_name(plan.source), target=_name(plan.target))
    left_out = ("disk_needed", "disk_free")
    record = {k: v for k, v in public.to_json().items() if k not in left_out}
    record |= {
        "made_by": f"hf-attn-patch {version()}",
        "source_headers_sha256": work.source.headers_sha256(),
        "calibration": dict(calibration) if calibration else None,
        "verification": dict(verification) if verification else None,
        "earlier": _earlier(work.source.folder / RECORD),
    }
    return record


def card_text(card: str | None, record: Mapping[str, Any]) -> str:
    """The source's card with the section of `record`, in place of an older one if there is one."""
    section = _section(record)
    if card is None:
        return f"# {record['target']}\n\n{section}"
    if _SECTION.search(card):
        return _SECTION.sub(lambda _: section, card, count=1)
    return card.rstrip() + "\n\n" + section if card.strip() else section


def read_card(folder: Path) -> str | None:
    """The folder's model card, undecodable bytes kept; None when it has none."""
    try:
        return (folder / CARD).read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return None


def _section(record: Mapping[str, Any]) -> str:
    rows = {
        "source": f"`{record['source']}`",
        "sha256 of its weights' headers": f"`{record['source_headers_sha256']}`",
        "KV heads": f"{record['kv_heads_before']} → {_after(record)}",
        "query heads": record["query_heads"],
        "method": _method(record),
    }
    if record["model_type"] != record["model_type_after"]:
        rows["model type"] = f"`{record['model_type']}` → `{record['model_type_after']}`"
    if record["kv_bytes_per_token_before"]:
        before, after = record["kv_bytes_per_token_before"], record["kv_bytes_per_token_after"]
        rows["KV cache, bytes per token"] = f"{before:,} → {after:,}"
    if calibration := record["calibration"]:
        rows["calibration"] = _phrase(calibration)
    if verification := record["verification"]:
        rows["against the source"] = _phrase(verification)
    for step in reversed(record["earlier"]):
        rows[f"before that, from `{step['source']}`"] = (
            f"{step['kv_heads_before']} → {_after(step)} KV heads ({step['method']})"
        )
    rows["made by"] = f"{record['made_by']}; the same in `{RECORD}`"
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items()]
    table = "\n".join(["| | |", "|---|---|", *lines])
    return f"{_BEGIN}\n## How this checkpoint was made\n\n{table}\n{_END}\n"


def _method(record: Mapping[str, Any]) -> str:
    if record["method"] == EXACT:
        return "exact: nothing is lost, heads are repeated"
    if record["kv_lora_rank"] is not None:
        return f"{record['method']}: keys and values share latents; compare before use"
    return f"{record['method']}: heads are merged, which loses quality; compare before use"


def _after(record: Mapping[str, Any]) -> str:
    """What the source's KV heads became."""
    if record.get("kv_lora_rank") is None:
        return str(record["kv_heads_after"])
    return (
        f"latents of {record['kv_lora_rank']} and rotated keys of {record['qk_rope_head_dim']} "
        "columns, for all heads together"
    )


def _phrase(values: Mapping[str, Any]) -> str:
    """The plain values in one line; lists and tables stay in the record."""
    plain = {k: v for k, v in values.items() if isinstance(v, str | int | float)}
    for key in SPECIAL_TOKENS & plain.keys():
        plain[key] = f"`{plain[key]}`" if plain[key] else "no special token"
    return ", ".join(f"{k.replace('_', ' ')} {_number(v)}" for k, v in plain.items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(value: Any) -> str:
    return str(value).replace("|", r"\|").replace("\n", " ")


def _name(path: str) -> str:
    return Path(path).name or Path(path).resolve().name


def _earlier(path: Path) -> list[dict[str, Any]]:
    """The steps that made the source, oldest first; a record that is not ours counts for none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        steps = [*record.pop("earlier", []), record]
        wanted = ("source", "kv_heads_before", "kv_heads_after", "method")
        return [{key: step[key] for key in wanted} for step in steps]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
