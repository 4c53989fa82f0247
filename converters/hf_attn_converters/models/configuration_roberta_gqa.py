"""RoBERTa's configuration with `num_key_value_heads`."""

from typing import Any

from transformers.models.roberta.configuration_roberta import RobertaConfig

from .gqa_encoder import check_kv_heads


class RobertaGqaConfig(RobertaConfig):
    model_type = "roberta_gqa"

    num_key_value_heads: int | None = None  # None: as many as query heads

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        check_kv_heads(self.num_attention_heads, self.num_key_value_heads)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
