"""What converting a real checkpoint costs in quality, by merge method: rows for a CSV.

    python scripts/experiments/measure_conversion.py smollm2 --text corpus.txt \
        --out results/convert_quality.csv

A tenth of --text is held out: the methods calibrate on the rest. Every conversion is scored on the
held-out part, on a text of another domain, and on each --eval text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from measure.scores import Measured
    from measure.subjects import Subject, Texts

    from hf_attn_converters import ConvertResult, MergeMethod
    from hf_attn_converters.calibration import Calibration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, for its packages

CALIBRATION = "calibration.txt"
SUBJECTS = ("smollm2", "minilm", "rxnmapper", "fixture")


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    try:
        rows = run(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if args.json:
        print(json.dumps([row.cells() for row in rows], indent=2))
        return 0
    shown = ("kv_after", "method", "text", "ratio", "kl", "top1", "cosine", "accuracy", "seconds")
    from hf_attn_patch.cli.common import print_table

    print_table(["kv", *shown[1:]], [[row.cells()[name] for name in shown] for row in rows])
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("subject", choices=SUBJECTS)
    add("--checkpoint", type=Path, help="its folder, by default where it is fetched to")
    add("--methods", help="separated by commas (all)")
    add("--kv", help="KV heads afterwards, separated by commas")
    add("--text", type=Path, help="to calibrate on, .xz or plain; a tenth is held out")
    add("--eval", action="append", default=[], metavar="NAME=FILE", help="one more text; repeat")
    add("--tokens", type=int, help="to calibrate on, at most")
    add("--sequence-length", type=int, help="tokens of a calibration sequence")
    add("--steps", type=int, help="of the fit, per layer")
    add("--own-text", type=float, default=0.0, help="share of the tokens that the model writes")
    add("--eval-size", type=int, help="tokens, sentences or reactions of each evaluation")
    add("--folder", type=Path, help="where to write conversions meanwhile (the temporary folder)")
    add("--out", type=Path, help="CSV to append to")
    add("--json", action="store_true", help="print JSON and nothing else")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Measured]:
    """Convert and score; each KV head count's rows are kept as soon as they are there."""
    from measure.scores import append
    from measure.subjects import SUBJECTS as KNOWN
    from measure.texts import read_plain
    from transformers.utils import logging

    from hf_attn_converters import METHODS
    from hf_attn_converters.merge import method_named
    from hf_attn_patch.cli.common import progress_bar

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # else a table of the heads that an encoder was saved without
    subject = KNOWN[args.subject]
    source = args.checkpoint or subject.checkpoint
    if not (source / "config.json").exists():
        raise ValueError(f"there is no checkpoint in {source}; run: {subject.fetch} {source}")
    methods = [method_named(n) for n in (args.methods.split(",") if args.methods else METHODS)]
    texts = subject.texts(args.text, source)
    evaluations = dict(texts.evaluations)
    for named in args.eval:
        name, equals, file = named.partition("=")
        if not equals:
            raise ValueError(f"--eval takes NAME=FILE, got {named!r}")
        evaluations[name] = read_plain(Path(file))
    rows: list[Measured] = []
    for kv in heads(args.kv) or subject.kv_heads:
        with (
            tempfile.TemporaryDirectory(dir=args.folder) as work,
            progress_bar(quiet=args.json) as update,
        ):
            job = Job(args.subject, subject, source, texts, Path(work), kv, update)
            calibration = job.calibration(
                args.tokens, args.sequence_length, args.steps, args.own_text
            )
            results = [job.convert(method, calibration) for method in methods]
            fresh = [
                row
                for name, text in evaluations.items()
                for row in job.score(results, name, text, args.eval_size or subject.size)
            ]
        rows += fresh
        if args.out is not None:
            append(args.out, fresh)
    return rows


def heads(listed: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in listed.split(",")) if listed else ()
    except ValueError:
        raise ValueError(f"--kv takes numbers separated by commas, got {listed!r}") from None


@dataclass(frozen=True)
class Job:
    """A subject's conversions to one number of KV heads."""

    name: str
    subject: Subject
    source: Path
    texts: Texts
    work: Path  # an empty folder
    kv: int
    update: Callable[[str, int, int], None]  # (what, done, of how many)

    def calibration(
        self,
        tokens: int | None,
        sequence_length: int | None,
        steps: int | None,
        own_text: float = 0.0,
    ) -> Calibration:
        """The subject's where None; without text, what the model does without."""
        from hf_attn_converters.calibration import Calibration

        text = None
        if self.texts.calibration is not None:
            text = self.work / CALIBRATION
            text.write_text(self.texts.calibration, encoding="utf-8")
        given: dict[str, Any] = {} if tokens is None else {"tokens": tokens}
        return Calibration(
            text=text,
            own_text=own_text,
            sequence_length=sequence_length or self.subject.sequence_length,
            fit=self.subject.fit if steps is None else replace(self.subject.fit, steps=steps),
            **given,
        )

    def convert(self, method: MergeMethod, calibration: Calibration) -> ConvertResult:
        from hf_attn_converters import convert

        return convert(
            self.source,
            self.work / method.name,
            num_key_value_heads=self.kv,
            method=method.name,
            calibration=calibration if method.calibrated else None,
            layer_progress=lambda done, total, what: self.update(
                f"{self.kv} KV heads, {method.name}", done, total
            ),
        )

    def origin(self, record: Mapping[str, Any]) -> str:
        """What a conversion was calibrated on; the temporary file's name says nothing."""
        named = self.texts.origin or CALIBRATION
        return str(record.get("origin", "")).replace(f"text of {CALIBRATION}", named)

    def score(
        self, results: Sequence[ConvertResult], name: str, text: str, size: int
    ) -> list[Measured]:
        """One row for each conversion, on one text."""
        from measure.scores import Measured

        def progress(done: int, total: int) -> None:
            self.update(f"{self.kv} KV heads, scored on {name}", done, total)

        outputs = [Path(result.plan.target) for result in results]
        scores = self.subject.score(self.source, outputs, text, size, progress)
        rows = []
        for result, found in zip(results, scores, strict=True):
            record = result.calibration or {}
            fit = record.get("fit", {})
            rows.append(
                Measured(
                    subject=self.name,
                    kv_before=result.plan.kv_heads_before,
                    kv_after=self.kv,
                    method=result.plan.method,
                    calibration=self.origin(record),
                    calibration_tokens=record.get("tokens"),
                    sequence_length=record.get("sequence_length"),
                    steps=fit.get("steps"),
                    attention_lr=fit.get("attention_lr"),
                    other_lr=fit.get("other_lr"),
                    text=name,
                    scores=found,
                    seconds=result.seconds,
                )
            )
        return rows


if __name__ == "__main__":
    sys.exit(main())
