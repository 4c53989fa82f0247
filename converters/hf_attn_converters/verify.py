"""Does an output load, and is it what it should be? Asked of transformers, on a small text."""

from __future__ import annotations

import gc
import importlib.util
import zlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .conversion import EXACT, Work
from .heads.layer import convert_layer
from .heads.plan import plan_conversion
from .io.checkpoint import Checkpoint, has_tokenizer, open_checkpoint
from .io.reading import load_config, reading

EXACT_KL = 1e-6  # above this, a conversion that should lose nothing lost something
TOKENS = 256  # of the text at most

# The opening of Jane Austen's Pride and Prejudice (1813).
BUILT_IN = """\
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be \
in want of a wife. However little known the feelings or views of such a man may be on his first \
entering a neighbourhood, this truth is so well fixed in the minds of the surrounding families, \
that he is considered as the rightful property of some one or other of their daughters.

"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is let \
at last?" Mr. Bennet replied that he had not. "But it is," returned she; "for Mrs. Long has just \
been here, and she told me all about it." Mr. Bennet made no answer. "Do not you want to know who \
has taken it?" cried his wife, impatiently. "You want to tell me, and I have no objection to \
hearing it." This was invitation enough.
"""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found. `kl` (nats per token, source against output) and `top1` (share of equal
    first choices) are None for a model without logits of its own, `cosine` (of hidden states) for
    others."""

    text: str  # what it was measured on
    source_lacks: tuple[str, ...]  # tensors that transformers drew at random: no logits then
    tokens: int
    kl: float | None
    top1: float | None
    cosine: float | None
    round_trip: str  # of an exact expansion

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Text:
    """What to verify on, and what the record calls it."""

    words: str
    name: str


def verify_output(work: Work, folder: Path, text: Text | None = None) -> Verification:
    """Load the output in `folder`, compare it with its source, and say what was found.

    Loads the two models one after the other, in float32. Raises RuntimeError when weights are
    missing, unexpected or of another shape, when an exact conversion is not exact, or when the
    output's numbers are not finite. `text` is a short built-in one by default; without a
    tokenizer random tokens take its place. Where the source lacks tensors that its class has,
    hidden states are compared: logits would be those of a random head.
    """
    output = open_checkpoint(folder)
    ours_trusted, theirs_trusted = bool(work.extra_files), work.is_our_code
    if importlib.util.find_spec("accelerate") is not None:  # on the meta device: no weights yet
        known = _load(work.source, trusted=theirs_trusted, device_map="meta")[1]
        _check_faults(_load(output, trusted=ours_trusted, device_map="meta")[1], known)
    back = _round_trip(work, folder)
    settings = load_config(work.source.folder, trust_remote_code=theirs_trusted)
    tokens, name = _tokens(work, text, settings.get_text_config())
    theirs, are_logits, known = _run(work.source, tokens, trusted=theirs_trusted)
    lacking = known["missing_keys"]
    ours, _, faults = _run(output, tokens, trusted=ours_trusted, lacking=lacking)
    _check_faults(faults, known)
    if theirs.shape != ours.shape:
        raise RuntimeError(
            f"verification failed: the output gives {list(ours.shape)} numbers, "
            f"the source {list(theirs.shape)}"
        )
    if not ours.isfinite().all():
        raise RuntimeError("verification failed: the output's numbers are not finite")
    result = Verification(
        text=name,
        source_lacks=tuple(sorted(lacking)),
        tokens=tokens.numel(),
        kl=_kl(theirs, ours) if are_logits else None,
        top1=(theirs.argmax(-1) == ours.argmax(-1)).float().mean().item() if are_logits else None,
        cosine=None if are_logits else _cosine(theirs, ours),
        round_trip=back,
    )
    distance = result.kl if result.cosine is None else 1 - result.cosine
    assert distance is not None
    if work.plan.method == EXACT and not distance <= EXACT_KL:
        raise RuntimeError(
            f"verification failed: an exact conversion differs from its source by {distance:.3g} "
            f"({'KL' if are_logits else '1 - cosine'}; at most {EXACT_KL:g})"
        )
    return result


def _kl(source: Tensor, output: Tensor) -> float:
    """Mean KL(source || output) in nats; logits [N, V]."""
    p, q = source.double().log_softmax(-1), output.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def _cosine(source: Tensor, output: Tensor) -> float:
    return torch.cosine_similarity(source.double(), output.double(), dim=-1).mean().item()


def _round_trip(work: Work, folder: Path) -> str:
    """Merge one layer of an exact expansion back and compare it with the source, bit by bit."""
    plan = work.plan
    if plan.kv_lora_rank is not None:
        return "none: heads became latents"
    if plan.method != EXACT:
        return "none: heads were merged"
    try:
        back = plan_conversion(
            folder,
            folder.with_name(folder.name + ".back"),
            num_key_value_heads=plan.kv_heads_before,
            method="mean",
        )
    except ValueError as error:
        return f"none: {error}"
    layer = plan.layers // 2
    for name, tensor in convert_layer(back, layer).items():
        if not torch.equal(tensor, work.source.read(name)):
            raise RuntimeError(f"verification failed: {name} does not come back from its expansion")
    return "bit-equal"


def _tokens(work: Work, text: Text | None, config: Any) -> tuple[Tensor, str]:
    """Token ids [1, T], and what they are: a text, or for lack of a tokenizer random numbers."""
    limit = min(TOKENS, int(vars(config).get("max_position_embeddings") or TOKENS))
    if not has_tokenizer(work.source.folder):
        generator = torch.Generator().manual_seed(0)
        size = int(config.vocab_size)
        return torch.randint(size, (1, limit), generator=generator), "random tokens"
    from transformers import AutoTokenizer

    text = text or Text(BUILT_IN, "built-in")
    with reading(work.source.folder):
        tokenizer = AutoTokenizer.from_pretrained(work.source.folder, trust_remote_code=False)
    found = tokenizer(text.words, return_tensors="pt", truncation=True, max_length=limit)
    return found["input_ids"].long(), text.name


@torch.inference_mode()
def _run(
    checkpoint: Checkpoint,
    tokens: Tensor,
    *,
    trusted: bool,
    lacking: Collection[str] = (),
) -> tuple[Tensor, bool, dict[str, set[str]]]:
    """What a model gives for the tokens, [N, V], whether that is logits, and loading faults.

    Hidden states where tensors are missing, here or in the source (`lacking`).
    """
    model, faults = _load(checkpoint, trusted=trusted)
    model.eval()
    if lacking := {*lacking, *faults["missing_keys"]}:
        _fill(model, lacking)
        model = model.base_model
    output = model(input_ids=tokens)
    are_logits = "logits" in output
    numbers = (output["logits"] if are_logits else output[0]).float()
    del model
    gc.collect()  # before the other model is loaded
    return numbers.reshape(-1, numbers.shape[-1]), are_logits, faults


def _fill(model: Any, lacking: Collection[str]) -> None:
    """Give missing tensors the same numbers in every model, by their names: what transformers
    drew would differ from one loading to the next."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in lacking:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)


def _load(
    checkpoint: Checkpoint, *, trusted: bool, **options: Any
) -> tuple[Any, dict[str, set[str]]]:
    """The model of a folder in float32, and what transformers found wrong with its tensors."""
    with reading(checkpoint.folder):
        model, found = _model_class(checkpoint.config).from_pretrained(
            checkpoint.folder,
            dtype=torch.float32,
            trust_remote_code=trusted,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else the same, as an exception of many lines
            **options,
        )
    return model, {kind: set(map(str, names)) for kind, names in found.items()}


def _check_faults(output: Mapping[str, set[str]], source: Mapping[str, set[str]]) -> None:
    """Raises RuntimeError for missing, unexpected or mismatched tensors that are ours alone."""
    for kind, names in output.items():
        if new := sorted(names - source.get(kind, set())):
            raise RuntimeError(
                f"verification failed: the output loads with {kind.replace('_', ' ')}: "
                f"{', '.join(new[:3])}"
            )


def _model_class(config: Mapping[str, Any]) -> Any:
    """The class that config.json names, or, for a class of ours, the auto class that finds it."""
    import transformers

    names = config.get("architectures") or ["AutoModelForCausalLM"]
    for auto, place in (config.get("auto_map") or {}).items():
        if str(place).rpartition(".")[2] == names[0] and hasattr(transformers, auto):
            return getattr(transformers, auto)
    if not hasattr(transformers, names[0]):
        raise ValueError(f"transformers has no {names[0]}, which config.json names: not verified")
    return getattr(transformers, names[0])
