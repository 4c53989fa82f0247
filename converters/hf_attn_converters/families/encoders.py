"""Encoders: transformers has no fewer KV heads for them, so the result takes a class of ours along.

`bert` becomes `bert_gqa` and comes back as `bert` when it has all its KV heads again. The class
loads with `trust_remote_code=True` from the folder alone, or without where hf_attn_patch is
installed, see ../models. An encoder keeps no KV cache: fewer heads mean fewer parameters and less
work in the projections, and nothing else.
"""

from __future__ import annotations

from dataclasses import replace

from ..models import ENCODERS
from .layouts import Layout, separate
from .spec import Condition, FamilySpec, Target

_INNER = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
_BERT_SLOTS = separate(*_INNER, "attention.output.dense")
_ALBERT_SLOTS = separate(*(f"attention.{name}" for name in ("query", "key", "value", "dense")))

_BERT = FamilySpec(
    model_type="bert",
    layout=Layout(slots=_BERT_SLOTS, layer=("encoder.layer.{}",), prefixes=("bert.",)),
    kv_heads_key=None,
    head_dim_key=None,
    tied=(("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),),
    layers_path="bert.encoder.layer",
    attention_path="attention.self",
    auto_class="AutoModelForMaskedLM",
    rotary=None,
    kv_cache=False,
)
_ROBERTA = replace(
    _BERT,
    model_type="roberta",
    layout=replace(_BERT.layout, prefixes=("roberta.",)),
    tied=(("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),),
    layers_path="roberta.encoder.layer",
)
_ALBERT = replace(
    _BERT,
    model_type="albert",
    layout=Layout(
        slots=_ALBERT_SLOTS,
        layer=("encoder.albert_layer_groups.0.albert_layers.{}",),
        prefixes=("albert.",),
    ),
    needs=(Condition("num_hidden_groups", 1, 1),),
    layers_key="inner_group_num",
    absent_layers=1,
    tied=(("predictions.decoder.weight", "albert.embeddings.word_embeddings.weight"),),
    layers_path="albert.encoder.albert_layer_groups.0.albert_layers",
    attention_path="attention",
)


def _with_ours(stock: FamilySpec, tokenizer: str) -> tuple[FamilySpec, FamilySpec]:
    """The stock family, and ours, which has the same tensors under the same names."""
    encoder = ENCODERS[stock.model_type]
    to_ours = Target(
        model_type=encoder.ours,
        head_dim_key=None,
        config={"auto_map": encoder.auto_map},
        # without it transformers picks a tokenizer by model_type, and knows only its own
        defaults={"tokenizer_class": tokenizer},
        architectures=encoder.architectures,
        code=encoder.files,
    )
    to_stock = Target(
        holds="all",
        as_is=True,
        model_type=stock.model_type,
        kv_heads_key=None,
        head_dim_key=None,
        drops=("num_key_value_heads", "auto_map"),
        architectures={ours: theirs for theirs, ours in encoder.architectures.items()},
    )
    ours = replace(
        stock,
        model_type=encoder.ours,
        kv_heads_key="num_key_value_heads",
        targets=(to_stock, replace(to_ours, architectures=None)),
        code=encoder.files,
    )
    return replace(stock, targets=(to_ours,)), ours


SPECS = (
    *_with_ours(_BERT, "BertTokenizer"),
    *_with_ours(_ROBERTA, "RobertaTokenizer"),
    *_with_ours(_ALBERT, "AlbertTokenizer"),
)
