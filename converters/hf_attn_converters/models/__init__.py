"""Encoders with fewer KV heads than query heads, which transformers itself does not have.

This file is data: which classes there are. The files beside it that import transformers are never
imported by this package. A converter copies them into the folder it writes, where
`trust_remote_code=True` finds them; `hf_attn_patch` registers the same classes, so that where it
is installed no remote code is needed. They therefore import nothing but transformers, torch and
each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SHARED = "gqa_encoder.py"


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """One family: the classes that its modeling file defines."""

    model_type: str  # transformers' own
    prefix: str  # of its class names
    heads: tuple[str, ...]  # the end of a class's name; "AutoModel" + head loads it, see `auto`

    @property
    def ours(self) -> str:
        """The model_type of our variant."""
        return f"{self.model_type}_gqa"

    @property
    def config_class(self) -> str:
        return f"{self.prefix}GqaConfig"

    @property
    def architectures(self) -> dict[str, str]:
        """transformers' class -> ours."""
        return {f"{self.prefix}{head}": f"{self.prefix}Gqa{head}" for head in self.heads}

    @property
    def auto_classes(self) -> dict[str, str]:
        """Auto class -> ours."""
        return {f"AutoModel{h.removeprefix('Model')}": f"{self.prefix}Gqa{h}" for h in self.heads}

    @property
    def auto_map(self) -> dict[str, str]:
        """What config.json says, for `trust_remote_code=True`."""
        models = {auto: f"modeling_{self.ours}.{name}" for auto, name in self.auto_classes.items()}
        return {"AutoConfig": f"configuration_{self.ours}.{self.config_class}"} | models

    @property
    def files(self) -> tuple[str, ...]:
        """What travels with a checkpoint."""
        return (f"configuration_{self.ours}.py", f"modeling_{self.ours}.py", SHARED)


_HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
ENCODERS: Mapping[str, Encoder] = {
    entry.model_type: entry
    for entry in (
        Encoder(model_type="bert", prefix="Bert", heads=(*_HEADS, "ForPreTraining")),
        Encoder(model_type="roberta", prefix="Roberta", heads=_HEADS),
        Encoder(model_type="albert", prefix="Albert", heads=(*_HEADS, "ForPreTraining")),
    )
}


def source_of(file: str) -> str:
    """The text of one of the files that travel along."""
    return (Path(__file__).parent / file).read_text(encoding="utf-8")
