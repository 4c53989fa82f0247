"""ALBERT with grouped KV heads: transformers' own classes, the shared attention exchanged."""

from typing import Any

from torch import Tensor
from transformers.models.albert import modeling_albert as stock

from .configuration_albert_gqa import AlbertGqaConfig
from .gqa_encoder import GqaModel, attend, narrow_kv


class AlbertGqaAttention(stock.AlbertAttention):
    """The attention of ALBERT's shared layer, with its output projection and norm."""

    def __init__(self, config: AlbertGqaConfig) -> None:
        super().__init__(config)
        narrow_kv(self, config)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """[B, S, hidden] to (the same, the attention weights if they were computed)."""
        output, weights = attend(
            self, hidden_states, attention_mask, self.attention_dropout.p, **kwargs
        )
        output = self.output_dropout(self.dense(output))
        return self.LayerNorm(hidden_states + output), weights


def _exchange(module: Any, config: Any) -> AlbertGqaAttention:
    return AlbertGqaAttention(config)


class _Gqa(GqaModel):
    config_class: Any = AlbertGqaConfig
    stock_attention = stock.AlbertAttention
    exchange = staticmethod(_exchange)


class AlbertGqaModel(_Gqa, stock.AlbertModel):
    pass


class AlbertGqaForMaskedLM(_Gqa, stock.AlbertForMaskedLM):
    pass


class AlbertGqaForPreTraining(_Gqa, stock.AlbertForPreTraining):
    pass


class AlbertGqaForSequenceClassification(_Gqa, stock.AlbertForSequenceClassification):
    pass


class AlbertGqaForTokenClassification(_Gqa, stock.AlbertForTokenClassification):
    pass


class AlbertGqaForQuestionAnswering(_Gqa, stock.AlbertForQuestionAnswering):
    pass


class AlbertGqaForMultipleChoice(_Gqa, stock.AlbertForMultipleChoice):
    pass
