"""Student and teacher: do they belong together, what of the student is trained, loading."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..io.reading import load_config, reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Words, numbers, signs, another script: tokenizers that read these alike are taken for the same.
SAMPLE = "The 1st of May, 1897: \"Naïve?\" he said —\n\n\tx[12] += f(α, 'ß');  日本語 🙂 Zürich.\n"


def outline(folder: Path) -> PreTrainedModel:
    """The model without its weights (on the meta device).

    Raises ValueError for one that is no causal language model, or cannot tell documents apart.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    with torch.device("meta"), reading(folder):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{folder.name} is a {type(model).__name__}, which takes no position_ids: documents "
            "packed into one row could not be told apart"
        )
    return model


def load_model(
    folder: Path, dtype: torch.dtype | str, attn_implementation: str | None, shards: int = 1
) -> PreTrainedModel:
    """A causal language model in `dtype` (``auto``: as it is stored), sharded over processes.

    Raises ValueError for a checkpoint that lacks weights: those of its head would be random.
    """
    from transformers import AutoModelForCausalLM

    choice: dict[str, Any] = {}
    if attn_implementation:
        choice["attn_implementation"] = attn_implementation
    if shards > 1:
        from transformers.distributed.configuration_utils import DistributedConfig

        choice["distributed_config"] = DistributedConfig(fsdp_size=shards)
    with reading(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, **choice, trust_remote_code=False, output_loading_info=True
        )
    model: PreTrainedModel = loaded[0]
    if lacking := sorted(map(str, loaded[1]["missing_keys"])):
        raise ValueError(
            f"{folder.name} lacks {', '.join(lacking[:3])}, which a {type(model).__name__} has: "
            "only a whole causal language model can be trained or teach"
        )
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises ValueError where there is none."""
    from transformers import AutoTokenizer

    from ..io.checkpoint import has_tokenizer

    if not has_tokenizer(folder):
        raise ValueError(f"{folder} holds no tokenizer; put the source's tokenizer files there")
    with reading(folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    return tokenizer


def check_same_words(student: Path, teacher: Path) -> None:
    """Raises ValueError unless both have the same vocabulary and read text as the same tokens."""
    from ..io.checkpoint import has_tokenizer

    sizes = [load_config(f).get_text_config().vocab_size for f in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{student.name} has {sizes[0]} tokens in its vocabulary, its teacher {teacher.name} "
            f"{sizes[1]}: only the checkpoint that a student was converted from can teach it"
        )
    if has_tokenizer(teacher):
        mine, theirs = (
            load_tokenizer(folder)(SAMPLE)["input_ids"] for folder in (student, teacher)
        )
        if mine != theirs:
            raise ValueError(
                f"{student.name} and its teacher {teacher.name} tokenize differently: only the "
                "checkpoint that a student was converted from can teach it"
            )


def choose_trained(model: nn.Module, train: str) -> None:
    """Only these weights keep their gradients. Raises ValueError where there are none."""
    if train == "attention":
        model.requires_grad_(False)
        for module in attention_modules(model):
            module.requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no attention modules to train; use all")


def attention_modules(model: nn.Module) -> Iterator[nn.Module]:
    """What transformers calls an attention, in every family, by the name of its class."""
    return (module for module in model.modules() if "Attention" in type(module).__name__)


def count(model: nn.Module) -> tuple[int, int]:
    """(weights, weights trained)"""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def positions_of(model: PreTrainedModel) -> int | None:
    """The longest sequence that the model takes, if it has a limit."""
    config: Any = model.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 1 else None
