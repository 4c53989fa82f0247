"""The checkpoints that conversions are measured on, and how each is calibrated and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_attn_converters.calibration.fit import FitSettings

from .encoders import embedding_scores, masked_scores
from .language import language_scores
from .reactions import as_trained, composed
from .scores import Progress, Scores
from .texts import python_prose, read_plain, sentences, split

ROOT = Path(__file__).resolve().parents[2]
SEED = 0


@dataclass(frozen=True)
class Texts:
    """`calibration` None: without text. No part of it is in one of the `evaluations`."""

    calibration: str | None
    origin: str | None  # of the calibration text
    evaluations: Mapping[str, str]


# (source, outputs, text, how much of it, told what is done) -> one for each output
Score = Callable[[Path, Sequence[Path], str, int, Progress], list[Scores]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    checkpoint: Path
    fetch: str  # the command that makes the checkpoint
    kv_heads: tuple[int, ...]
    # (the user's text or None, the checkpoint) -> texts
    texts: Callable[[Path | None, Path], Texts]
    score: Score
    size: int  # of an evaluation: tokens, sentences or lines, as `score` takes it
    sequence_length: int  # of the calibration
    fit: FitSettings = field(default_factory=FitSettings)


def prose(path: Path | None, checkpoint: Path) -> Texts:
    """A text's own held-out part, and technical prose as another domain."""
    other = {"python docs": python_prose()}
    if path is None:
        return Texts(None, None, other)
    calibration, held_out = split(read_plain(path))
    return Texts(calibration, path.name, {f"{path.name} held out": held_out} | other)


def sentence_prose(path: Path | None, checkpoint: Path) -> Texts:
    """As `prose`, but calibrated on what an embedding model is given: one sentence at a time."""
    texts = prose(path, checkpoint)
    if texts.calibration is None:
        return texts
    seen = "\n".join(f"[CLS] {s} [SEP]" for s in sentences(texts.calibration))
    return Texts(seen, f"sentences of {texts.origin}", texts.evaluations)


def reactions(path: Path | None, checkpoint: Path) -> Texts:
    """One reaction per line: the user's, or composed ones; and those of the package's tests."""
    if path is None:
        (kept, held_out), name = composed(2000, SEED), "composed reactions"
    else:
        kept, held_out = (part.splitlines() for part in split(read_plain(path)))
        name = path.name
    evaluations = {f"{name} held out": "\n".join(held_out)}
    tests = checkpoint / "reactions.txt"
    if tests.exists():
        evaluations["rxnmapper's own tests"] = tests.read_text()
    return Texts(as_trained(kept, SEED), name, evaluations)


SUBJECTS: Mapping[str, Subject] = {
    "smollm2": Subject(
        checkpoint=ROOT / ".cache" / "smollm2-135m",
        fetch="python scripts/fetch_checkpoint.py smollm2",
        kv_heads=(1,),
        texts=prose,
        score=language_scores,
        size=7 * 1024,
        sequence_length=512,
    ),
    "minilm": Subject(
        checkpoint=ROOT / ".cache" / "minilm",
        fetch="python scripts/fetch_checkpoint.py minilm",
        kv_heads=(6, 4, 2, 1),
        texts=sentence_prose,
        score=embedding_scores,
        size=500,
        sequence_length=64,
        fit=FitSettings(steps=768, step_tokens=128, attention_lr=5e-4, other_lr=1e-4),
    ),
    "rxnmapper": Subject(
        checkpoint=ROOT / ".cache" / "rxnmapper",
        fetch="python scripts/fetch_checkpoint.py rxnmapper",
        kv_heads=(4, 2, 1),
        texts=reactions,
        score=masked_scores,
        size=24,
        sequence_length=128,
    ),
    "fixture": Subject(
        checkpoint=ROOT / "tests" / "fixtures" / "tiny-llama-mha",
        fetch="python scripts/experiments/train_fixture.py --text TEXT --target",
        kv_heads=(4, 2, 1),
        texts=prose,
        score=language_scores,
        size=28 * 256,
        sequence_length=256,
    ),
}
