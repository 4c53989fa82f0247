"""What is compared: a checkpoint, the attention implementation it runs, and the loaded model."""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

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
    decodes: bool = True  # False: an encoder

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)


@dataclass(frozen=True)
class Kind:
    """What a checkpoint is, which decides what can be measured."""

    name: str
    auto_class: str
    decodes: bool


DECODER = Kind("decoder", "AutoModelForCausalLM", True)
MASKED = Kind("encoder with a masked language model's head", "AutoModelForMaskedLM", False)
ENCODER = Kind("encoder", "AutoModel", False)


def kind_of(path: str) -> Kind:
    """Raises ValueError for a checkpoint that cannot be found, or is neither of the three."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    import hf_attn_patch  # noqa: F401  registers the encoder classes with fewer KV heads
    from hf_attn_converters.io.reading import load_config

    config = load_config(path)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{path}: {config.model_type} is an encoder-decoder; decoders and encoders can be "
            "compared"
        )
    head = (getattr(config, "architectures", None) or [""])[0]
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    if masked and not head.endswith(("ForCausalLM", "LMHeadModel")):
        return MASKED if head.endswith("ForMaskedLM") else ENCODER
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return DECODER
    raise ValueError(
        f"{path}: {config.model_type} is neither a causal language model nor an encoder with a "
        "masked one; only these can be compared"
    )


def load(
    spec: ModelSpec,
    *,
    dtype: str = "auto",
    device: str | None = None,
    label: str | None = None,
    kind: Kind = DECODER,
) -> LoadedModel:
    """Load a model and its tokenizer (None when the folder has none).

    `device` None: the accelerator if there is one. Raises ValueError for a checkpoint that cannot
    be found or used, and whatever the implementation raises for a model that it cannot serve.
    """
    import transformers
    import transformers.modeling_utils
    from transformers.utils.logging import disable_progress_bar

    import hf_attn_patch
    from hf_attn_converters.io.reading import check_config_file, reading

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; possible: {', '.join(DTYPES)}")
    disable_progress_bar()
    choice = {"attn_implementation": spec.implementation} if spec.implementation else {}
    auto: Any = getattr(transformers, kind.auto_class)
    start = time.perf_counter()
    check_config_file(spec.path)
    with reading(spec.path):
        try:
            model, found = auto.from_pretrained(
                spec.path,
                dtype=DTYPES[dtype],
                **choice,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except OSError as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"cannot read {spec.path}: {first}") from error
    if kind is not ENCODER and (lacking := sorted(map(str, found["missing_keys"]))):
        raise ValueError(
            f"{spec.path} lacks {', '.join(lacking[:3])}: a {type(model).__name__} would run with "
            "random numbers there; take a checkpoint that has its head"
        )
    model.to(device or best_device())
    _warn_if_slow(model)
    model.eval()
    seconds = time.perf_counter() - start
    if spec.window is not None:
        hf_attn_patch.configure_swa(model, window=spec.window, sinks=spec.sinks)
    with reading(spec.path):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                spec.path, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            if "trust_remote_code" in str(error):  # there is one, with code of its own
                raise
            tokenizer = None  # none in the folder
    return LoadedModel(
        spec=spec,
        label=label or spec.label,
        model=model,
        tokenizer=tokenizer,
        load_seconds=seconds,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        decodes=kind.decodes,
    )


def _warn_if_slow(model: Any) -> None:
    """A log line where the model's dtype is one that its device multiplies slowly."""
    from hf_attn_converters.precision import slow_note

    if note := slow_note(model.dtype, model.device, "choose dtype float32 (--dtype float32)"):
        _warn_once(note)


@functools.cache
def _warn_once(line: str) -> None:
    logger.warning("%s", line)


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

    def tokens(loaded: LoadedModel) -> list[int]:
        found: list[int] = loaded.tokenizer(sample, verbose=False)["input_ids"]
        return found

    expected = tokens(source)
    width = source.model.config.get_text_config().vocab_size
    for other in models[1:]:
        if other.tokenizer is not None and tokens(other) != expected:
            raise ValueError(
                f"{other.label} and {source.label} tokenize differently; only models "
                "with the same tokenizer can be compared"
            )
        if (found := other.model.config.get_text_config().vocab_size) != width:
            raise ValueError(
                f"{other.label} has {found} tokens in its vocabulary, {source.label} has {width}; "
                "only models with the same vocabulary can be compared"
            )
