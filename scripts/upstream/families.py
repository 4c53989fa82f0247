"""The tiny models that their tests are run on: one literal each, and their inputs.

Sizes keep to the limits of the tests (two layers, under a million parameters), and ask of the
attention what the family can ask: fewer KV heads than query heads, windows shorter than the inputs,
softcap, sinks, position bias, cross-attention, rows of different lengths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY, BATCH, LENGTH = 99, 7, 9
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = IDS | {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model type with the classes to test, by the ends of their names."""

    prefix: str
    classes: tuple[str, ...]
    config: str = ""  # "": the prefix and Config
    arguments: dict[str, Any] = field(default_factory=dict)
    kind: str = "decoder"  # or "encoder", "seq2seq"
    traits: dict[str, Any] = field(default_factory=dict)  # of their test class

    def get_config(self) -> Any:
        import transformers

        return getattr(transformers, self.config or f"{self.prefix}Config")(**self.arguments)

    def model_classes(self) -> tuple[Any, ...]:
        import transformers

        return tuple(getattr(transformers, self.prefix + end) for end in self.classes)


FAMILIES: dict[str, Family] = {
    "llama": Family(
        prefix="Llama",
        classes=("Model", "ForCausalLM", *HEADS),
        arguments=DECODER | {"head_dim": 8},
    ),
    "mistral": Family(
        prefix="Mistral",
        classes=("Model", "ForCausalLM", *HEADS),
        arguments=DECODER | {"head_dim": 8, "sliding_window": 4},
    ),
    "qwen3": Family(
        prefix="Qwen3",
        classes=("Model", "ForCausalLM", *HEADS),
        arguments=DECODER | {"head_dim": 8},
    ),
    "gemma2": Family(
        prefix="Gemma2",
        classes=("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"),
        arguments=DECODER | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    ),
    "gemma3": Family(
        prefix="Gemma3",
        classes=("TextModel", "ForCausalLM"),
        config="Gemma3TextConfig",
        arguments=DECODER
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt_oss": Family(
        prefix="GptOss",
        classes=("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"),
        arguments=DECODER
        | {
            "head_dim": 8,
            "intermediate_size": 48,  # torch multiplies experts in multiples of 16 bytes
            "sliding_window": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        traits={"test_all_params_have_gradient": False},  # experts that no token chose
    ),
    "falcon": Family(
        prefix="Falcon",
        classes=("Model", "ForCausalLM", *HEADS),
        arguments=IDS
        | {
            "hidden_size": 32,
            "ffn_hidden_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "alibi": False,
            "max_position_embeddings": 512,
        },
    ),
    "bert": Family(
        prefix="Bert",
        classes=("Model", "ForMaskedLM", "ForMultipleChoice", *HEADS),
        kind="encoder",
        arguments=IDS
        | {
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "bart": Family(
        prefix="Bart",
        classes=("Model", "ForConditionalGeneration", "ForSequenceClassification"),
        kind="seq2seq",
        arguments=IDS
        | {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 37,
            "decoder_ffn_dim": 37,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
        traits={"is_encoder_decoder": True, "test_missing_keys": False},
    ),
    "t5": Family(
        prefix="T5",
        classes=("Model", "ForConditionalGeneration"),
        kind="seq2seq",
        arguments=IDS
        | {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 37,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        traits={"is_encoder_decoder": True},
    ),
}


class Tester:
    """What their test class asks about a family, under the names that it asks by."""

    batch_size, seq_length = BATCH, LENGTH
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    num_choices = 3
    is_training = True
    pad_token_id = 0

    def __init__(self, family: Family) -> None:
        self.family = family
        self.get_config = family.get_config
        causal = [c for c in family.model_classes() if c.__name__.endswith("ForCausalLM")]
        self.causal_lm_class = causal[0] if causal else None

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Tensor]]:
        """A config and inputs ``[BATCH, LENGTH]``, the rows padded on the right."""
        return self.get_config(), inputs(self.family)


def inputs(family: Family) -> dict[str, Tensor]:
    """Ids without a special token among them, and rows of different lengths, none empty."""
    import torch

    def ids() -> Tensor:
        return torch.randint(3, VOCABULARY, (BATCH, LENGTH))

    lengths = LENGTH - torch.arange(BATCH)[:, None]  # [BATCH, 1]
    mask = (torch.arange(LENGTH) < lengths).long()
    found = {"input_ids": ids(), "attention_mask": mask}
    if family.kind == "encoder":
        found["token_type_ids"] = torch.randint(0, 2, (BATCH, LENGTH))
    if family.kind == "seq2seq":
        if family.prefix == "Bart":  # its classifier wants one end of text in each row
            found["input_ids"][:, -1] = 2
        found |= {"decoder_input_ids": ids(), "decoder_attention_mask": mask.clone()}
    return found
