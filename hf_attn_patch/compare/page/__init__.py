"""The comparison as a file: one self-contained HTML page, or Markdown.

The page loads nothing: styles and plots are inside it, there is no script, and its content security
policy forbids both. Whatever comes from models, prompts and folders is escaped by Jinja2.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from ..measures import Row, rows
from ..options import CompareOptions, Comparison
from ..report import folded, legend, markdown, split_text
from ..verdict import verdicts
from .key import Model, model_key
from .plots import plots

FORMS = (".html", ".md")
SHOWN_PROMPTS = 4  # the others are folded


def check_report(path: Path) -> None:
    """Raises ValueError when nothing could be written to `path`, before anything is measured."""
    if path.suffix not in FORMS:
        raise ValueError(f"--report {path}: the name must end in {' or '.join(FORMS)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--report {path}: the folder does not exist")
    if path.suffix == ".html":
        _libraries()


def write_report(path: Path, comparison: Comparison) -> None:
    """Write the page (`.html`) or Markdown (`.md`)."""
    text = html(comparison) if path.suffix == ".html" else "# Report\n\n" + markdown(comparison)
    path.write_text(text, encoding="utf-8")


def _libraries() -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the page needs {error.name}, which is not installed: pip install "
            "'hf-attn-patch[compare]', or write Markdown: --report report.md"
        ) from None


@dataclass(frozen=True)
class Passage:
    """What one model wrote for a prompt, cut where it leaves the source's text."""

    model: Model
    common: str
    rest: str
    at: int | None  # first other token; None: the whole is the source's


def html(comparison: Comparison) -> str:
    """The page. Raises ValueError when Jinja2 or matplotlib is not installed."""
    _libraries()
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    models = model_key(comparison)
    drawn = plots(comparison, models)
    return environment.from_string(template).render(
        comparison=comparison,
        models=models,
        verdicts=verdicts(comparison),
        groups=_groups(comparison),
        legend=legend(comparison),
        # the only text that is not escaped: drawn by us, with letters in place of names
        plots=[(plot, Markup(plot.svg)) for plot in drawn],
        passages=_passages(comparison, models),
        shown=SHOWN_PROMPTS,
        command=command(comparison),
        style=Markup(resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")),
    )


def _groups(comparison: Comparison) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows(comparison):
        found.setdefault(row.group, []).append(row)
    return found


def _passages(comparison: Comparison, models: list[Model]) -> list[tuple[str, list[Passage]]]:
    """(prompt, a passage for each model) of every prompt."""
    found = comparison.generation
    if not found:
        return []
    source, listed = found[0], []
    for i, prompt in enumerate(source.prompts):
        passages = []
        for model, g in zip(models, found, strict=True):
            common, rest = split_text(source.texts[i], g.texts[i])
            if g.diverged_at[i] is not None and not rest:  # it ends before the source's does
                rest = "[ends here]"
            passages.append(Passage(model, folded(common), folded(rest), g.diverged_at[i]))
        listed.append((prompt, passages))
    return listed


def command(comparison: Comparison) -> str:
    """The command line that measures this again; folders and files by their name only."""
    options = comparison.options
    words = ["hf-attn", "compare", *comparison.specs]
    default = {f.name: f.default for f in fields(CompareOptions)}
    for name in default:
        value = getattr(options, name)
        if value != default[name] and name not in ("chat", "context", "more_contexts"):
            words += _option(_SPELLED.get(name, name), value)
    if (options.context, *options.more_contexts) != (default["context"],):
        words += _option("context", (options.context, *options.more_contexts))
    if options.chat is not None:
        words.append("--chat" if options.chat else "--no-chat")
    return shlex.join(words)


_SPELLED = {"batches": "batch", "tasks": "task"}


def _option(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, tuple) else (value,)
    spelled = "--" + name.replace("_", "-")
    return [
        word
        for one in values
        for word in (spelled, one.name if isinstance(one, Path) else str(one))
    ]
