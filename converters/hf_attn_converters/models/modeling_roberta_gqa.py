"""RoBERTa with grouped KV heads: transformers' own classes, their self-attention exchanged."""

from typing import Any

from transformers.models.roberta import modeling_roberta as stock

from .configuration_roberta_gqa import RobertaGqaConfig
from .gqa_encoder import GqaModel, GqaSelfAttention


class RobertaGqaSelfAttention(GqaSelfAttention, stock.RobertaSelfAttention):  # type: ignore[misc]
    pass


def _exchange(module: Any, config: Any) -> RobertaGqaSelfAttention:
    return RobertaGqaSelfAttention(config, module.is_causal, module.layer_idx)


class _Gqa(GqaModel):
    config_class: Any = RobertaGqaConfig
    stock_attention = stock.RobertaSelfAttention
    exchange = staticmethod(_exchange)


class RobertaGqaModel(_Gqa, stock.RobertaModel):
    pass


class RobertaGqaForMaskedLM(_Gqa, stock.RobertaForMaskedLM):
    pass


class RobertaGqaForSequenceClassification(_Gqa, stock.RobertaForSequenceClassification):
    pass


class RobertaGqaForTokenClassification(_Gqa, stock.RobertaForTokenClassification):
    pass


class RobertaGqaForQuestionAnswering(_Gqa, stock.RobertaForQuestionAnswering):
    pass


class RobertaGqaForMultipleChoice(_Gqa, stock.RobertaForMultipleChoice):
    pass
