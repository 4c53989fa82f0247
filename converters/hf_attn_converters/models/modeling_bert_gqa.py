"""BERT with grouped KV heads: transformers' own classes, their self-attention exchanged."""

from typing import Any

from transformers.models.bert import modeling_bert as stock

from .configuration_bert_gqa import BertGqaConfig
from .gqa_encoder import GqaModel, GqaSelfAttention


class BertGqaSelfAttention(GqaSelfAttention, stock.BertSelfAttention):  # type: ignore[misc]
    pass


def _exchange(module: Any, config: Any) -> BertGqaSelfAttention:
    return BertGqaSelfAttention(config, module.is_causal, module.layer_idx)


class _Gqa(GqaModel):
    config_class: Any = BertGqaConfig
    stock_attention = stock.BertSelfAttention
    exchange = staticmethod(_exchange)


class BertGqaModel(_Gqa, stock.BertModel):
    pass


class BertGqaForMaskedLM(_Gqa, stock.BertForMaskedLM):
    pass


class BertGqaForPreTraining(_Gqa, stock.BertForPreTraining):
    pass


class BertGqaForSequenceClassification(_Gqa, stock.BertForSequenceClassification):
    pass


class BertGqaForTokenClassification(_Gqa, stock.BertForTokenClassification):
    pass


class BertGqaForQuestionAnswering(_Gqa, stock.BertForQuestionAnswering):
    pass


class BertGqaForMultipleChoice(_Gqa, stock.BertForMultipleChoice):
    pass
