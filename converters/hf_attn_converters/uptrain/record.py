"""`uptrain.json` beside the result's config.json, and its section in the model card.

``steps`` is one entry per evaluation, the first before the training: ``tokens`` seen, ``kl`` to
the source, ``ce`` and ``ppl`` on held-out text, ``loss`` (the one that is trained on). ``control``
has the same of the source trained likewise, ``recovered_percent`` what that makes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

UPTRAIN_RECORD = "uptrain.json"

_BEGIN, _END = "<!-- hf-attn-patch uptrain: begin -->", "<!-- hf-attn-patch uptrain: end -->"
_SECTION = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END) + r"\r?\n?", re.DOTALL)


def steps_of(
    log_history: Sequence[Mapping[str, Any]], tokens_per_step: int
) -> list[dict[str, Any]]:
    """The evaluations in the Trainer's log, one per step."""
    found: dict[int, dict[str, Any]] = {}
    for entry in log_history:
        if "eval_loss" in entry:
            step = int(entry["step"])
            names = ("loss", "kl", "ce", "ppl", "source_ppl")
            values = {n: entry[f"eval_{n}"] for n in names if f"eval_{n}" in entry}
            found[step] = {"step": step, "tokens": step * tokens_per_step, **values}
    return [found[step] for step in sorted(found)]


def recovered(before: float, after: float, control: float) -> float | None:
    """Per cent of what the conversion lost that uptraining gave back: losses in nats per token.

    (before - after) / (before - control); None where nothing was lost.
    """
    lost = before - control
    return 100 * (before - after) / lost if lost > 0 else None


def card_with(card: str | None, name: str, record: Mapping[str, Any]) -> str:
    """The card with the section of `record`, in place of an older one if there is one."""
    section = _section(record)
    if not card or not card.strip():
        return f"# {name}\n\n{section}"
    if _SECTION.search(card):
        return _SECTION.sub(lambda _: section, card, count=1)
    return card.rstrip() + "\n\n" + section


def _section(record: Mapping[str, Any]) -> str:
    recipe, first, last = record["recipe"], record["steps"][0], record["steps"][-1]
    rows = {
        "student": f"`{record['student']}`",
        "teacher": f"`{record['teacher']}`" if record["teacher"] else "none",
        "trained": f"{recipe['train']} weights on {record['tokens']:,} tokens of "
        + ", ".join(f"`{name}`" for name in record["text"]),
        "loss": recipe["loss"],
        "perplexity, held-out": f"{first['ppl']:.4g} → {last['ppl']:.4g}",
    }
    if "kl" in last:
        rows["KL to the teacher"] = f"{first['kl']:.4g} → {last['kl']:.4g}"
    if record.get("recovered_percent") is not None:
        rows["recovered"] = f"{record['recovered_percent']:.1f} % (against a control run)"
    rows["made by"] = f"{record['made_by']}; the same in `{UPTRAIN_RECORD}`"
    lines = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return f"{_BEGIN}\n## Uptraining\n\n" + "\n".join(["| | |", "|---|---|", *lines, _END, ""])
