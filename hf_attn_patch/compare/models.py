"""What is compared: a checkpoint, the attention implementation it runs, and the loaded model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """`PATH`, `PATH@implementation`, `PATH@triton_swa:window=256:sinks=4`"""

    path: str
    implementation: str | None = None  # None: the model's own choice
    window: int | None = None
    sinks: int = 0

    @property
    def label(self) -> str:
        name = Path(self.path).name or self.path
        if self.implementation:
            name += f"@{self.implementation}"
        if self.window is not None:
            name += f":window={self.window}"
        return name + (f":sinks={self.sinks}" if self.sinks else "")


def parse_spec(text: str) -> ModelSpec:
    """Read `PATH[@implementation[:window=N][:sinks=N]]`. Raises ValueError for anything else."""
    path, at, rest = text.rpartition("@")
    if not at or Path(text).exists():  # a folder may have an @ in its name
        return ModelSpec(path=text)
    implementation, *options = rest.split(":")
    values: dict[str, int] = {}
    for option in options:
        key, _, number = option.partition("=")
        if key not in ("window", "sinks") or not number.isdecimal():
            raise ValueError(
                f"{text!r}: {option!r} is no option; possible: window=N and sinks=N, "
                "as in model@triton_swa:window=256:sinks=4"
            )
        values[key] = int(number)
    if not path or not implementation:
        raise ValueError(f"{text!r} is neither PATH nor PATH@implementation")
    if values and implementation != "triton_swa":
        raise ValueError(f"{text!r}: window and sinks belong to triton_swa, not {implementation}")
    if "sinks" in values and "window" not in values:
        raise ValueError(f"{text!r}: sinks need a window=N beside them")
    return ModelSpec(path=path, implementation=implementation, **values)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    spec: ModelSpec
    label: str
    model: Any  # PreTrainedModel; transformers is imported only when one is loaded
    tokenizer: Any
    load_seconds: float
    weight_bytes: int

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)


def load(
    spec: ModelSpec, *, dtype: str = "auto", device: str | None = None, label: str | None = None
) -> LoadedModel:
    """Load a causal language model and its tokenizer (None when the folder has none).

    `device` None: the accelerator if there is one. Raises ValueError for a checkpoint that cannot
    be found or used, and whatever the implementation raises for a model that it cannot serve.
    """
    import transformers.modeling_utils  # noqa: F401  seconds, which are not the checkpoint's
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import hf_attn_patch

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; possible: {', '.join(DTYPES)}")
    logging.disable_progress_bar()
    choice = {"attn_implementation": spec.implementation} if spec.implementation else {}
    start = time.perf_counter()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(spec.path, dtype=DTYPES[dtype], **choice)
    except OSError as error:
        raise ValueError(f"cannot load {spec.path!r}: {str(error).splitlines()[0]}") from error
    model.to(device or best_device())
    model.eval()
    seconds = time.perf_counter() - start
    if spec.window is not None:
        hf_attn_patch.configure_swa(model, window=spec.window, sinks=spec.sinks)
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.path)
    except (OSError, ValueError):  # none in the folder
        tokenizer = None
    return LoadedModel(
        spec=spec,
        label=label or spec.label,
        model=model,
        tokenizer=tokenizer,
        load_seconds=seconds,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
    )


def best_device() -> str:
    for kind in ("cuda", "xpu"):
        backend = getattr(torch, kind, None)
        if backend is not None and backend.is_available():
            return kind
    return "cpu"


def labels(specs: list[ModelSpec]) -> list[str]:
    """One label per spec, different from each other."""
    found: list[str] = []
    for spec in specs:
        label, n = spec.label, 2
        while label in found:
            label, n = f"{spec.label} #{n}", n + 1
        found.append(label)
    return found


def check_same_tokens(models: list[LoadedModel], text: str) -> None:
    """Raises ValueError unless all models read `text` as the same tokens: else KL means nothing."""
    source = models[0]
    if source.tokenizer is None:
        raise ValueError(f"{source.spec.path} has no tokenizer, which the comparison needs")
    sample = text[:20_000]
    expected = source.tokenizer(sample)["input_ids"]
    width = source.model.config.get_text_config().vocab_size
    for other in models[1:]:
        if other.tokenizer is not None and other.tokenizer(sample)["input_ids"] != expected:
            raise ValueError(
                f"{other.label} and {source.label} tokenize differently; only models "
                "with the same tokenizer can be compared"
            )
        if (found := other.model.config.get_text_config().vocab_size) != width:
            raise ValueError(
                f"{other.label} has {found} tokens in its vocabulary, {source.label} has {width}; "
                "only models with the same vocabulary can be compared"
            )
