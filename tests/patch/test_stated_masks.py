"""A mask says all that it means, whichever layer reads it; and one that cannot is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from test_attention_keywords import model
from tiny_models import COMMON, EVERY, LLAMA_LIKE, TinyModel, assert_close, build, having, tokens
from tiny_models import worst as gap
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

import hf_attn_patch
from hf_attn_patch.masking import formats
from hf_attn_patch.masking.formats import Visible
from hf_attn_patch.registration.functions import fa2_mask
from hf_attn_patch.transformers_compat.compat import Traits, traits

LLAMA = EVERY[0]
AIMV2 = transformers.Aimv2TextConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=32, eos_token_id=2,
)  # fmt: skip
PEGASUS_X = transformers.PegasusXConfig(
    **COMMON, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
    max_position_embeddings=64, block_size=4, num_global_tokens=2,
)  # fmt: skip
GEMMA4 = LLAMA_LIKE | {
    "vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8, "num_hidden_layers": 4,
    "global_head_dim": 16, "num_kv_shared_layers": 2, "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "eos_token_id": 2,
}  # fmt: skip
RIGHT_PADDED = torch.tensor([[1] * 9, [1] * 7 + [0] * 2])
LEFT_PADDED = RIGHT_PADDED.flip(1)


@pytest.mark.parametrize("mask", [torch.ones(2, 9).long(), RIGHT_PADDED], ids=["whole", "right"])
@pytest.mark.parametrize("config", [AIMV2, PEGASUS_X], ids=["aimv2", "pegasus_x"])
def test_causal_masks_over_layers_that_call_themselves_bidirectional(
    config: Any, mask: Tensor
) -> None:
    ids = tokens(2, 9)
    name = type(config).__name__.replace("Config", "Model")
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if config is PEGASUS_X:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        theirs = model(config, name, "eager")(**inputs).last_hidden_state
        ours = model(config, name, "triton_fa2")(**inputs).last_hidden_state
        if config is AIMV2:  # without a mask it is bidirectional: what was lost would show
            both_ways = model(config, name, "triton_fa2")(input_ids=ids).last_hidden_state
            assert gap(both_ways, theirs, mask.bool()) > 0.01
    assert_close(ours, theirs, None if config is PEGASUS_X else mask.bool())


@pytest.mark.parametrize("cache", [None, "static"])
def test_an_encoder_that_generates(cache: str | None) -> None:
    """generate() asks for a causal mask, and the model then for a bidirectional one."""
    config = transformers.BertConfig(
        **COMMON, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    ids, options = tokens(2, 9), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    theirs, ours = (
        model(config, "BertLMHeadModel", name).generate(
            ids, attention_mask=LEFT_PADDED, cache_implementation=cache, **options
        )
        for name in ("eager", "triton_fa2")
    )
    assert torch.equal(ours, theirs)


def test_the_stated_form() -> None:
    padding = torch.tensor([[True, True, False], [True, True, True]])
    form = formats.stated(padding)
    assert form.dtype == formats.STATED
    assert torch.equal(formats.unstated(form), padding)  # type: ignore[arg-type]
    whole = formats.stated(formats.first_keys(2, 3, "cpu"))
    assert formats.read(formats.unstated(whole), 3) == Visible(keys=3, banded=True)
    # which layer may need it: one that can be told not to be causal
    for name in ("llama", "bart"):
        __import__(f"transformers.models.{name}.modeling_{name}")
    assert traits(transformers.LlamaConfig()).always_causal
    assert traits(transformers.BartConfig()).may_not_be_causal
    assert fa2_mask(2, 3, 3, config=transformers.LlamaConfig()) is None
    bart = fa2_mask(2, 3, 3, config=transformers.BartConfig())
    assert bart is not None and bart.dtype == formats.STATED
    assert fa2_mask(2, 1, 3, q_offset=2, config=transformers.BartConfig()) is None  # one query


@pytest.mark.parametrize("implementation", ["triton_fa2", "triton_paged_flash2"])
@pytest.mark.parametrize("mask", [None, LEFT_PADDED], ids=["whole", "left"])
def test_masks_that_a_model_slices_are_4d(mask: Tensor | None, implementation: str) -> None:
    config, ids = transformers.Gemma4TextConfig(**GEMMA4), tokens(2, 9)
    with torch.no_grad():
        theirs, ours = (
            model(config, "Gemma4ForCausalLM", name)(ids, attention_mask=mask, logits_to_keep=3)
            for name in ("eager", implementation)
        )
    assert_close(ours.logits, theirs.logits)
    assert traits(config) != Traits() and traits(config).slices_masks


@pytest.mark.parametrize("spec", having(lambda s: s.id in ("llama", "gpt2", "t5", "bert")))
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_one_column_is_broadcast(spec: TinyModel, kind: str) -> None:
    hidden = torch.zeros(2, 1, 10, 1)
    mask = hidden == 0 if kind == "bool" else hidden
    ids = tokens(2, 10)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if spec.kind == "seq2seq":
        inputs = {"input_ids": ids, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    with torch.no_grad():
        assert_close(
            build(spec, "triton_fa2")(**inputs).logits, build(spec, "eager")(**inputs).logits
        )


@pytest.mark.parametrize("columns", [2, 9, 11])
def test_other_widths_are_refused(columns: int) -> None:
    mask = torch.zeros(1, 1, 10, columns)
    with pytest.raises(ValueError, match=rf"{columns} key columns, but there are 10 keys; poss"):
        build(LLAMA, "triton_fa2")(tokens(1, 10), attention_mask=mask)


@pytest.mark.parametrize(
    ("config", "table"),
    [
        (transformers.SamVisionConfig(), "SAM_VISION_ATTENTION_CLASSES"),
        (transformers.SamHQConfig(), "SAM_HQ_VISION_ATTENTION_CLASSES"),
        (transformers.DeepseekOcr2Config(), "DEEPSEEK_OCR2_SAM_VISION_ATTENTION_CLASSES"),
        (transformers.Data2VecVisionConfig(), "DATA2VEC_VISION_SELF_ATTENTION_CLASSES"),
    ],
    ids=["sam", "sam_hq", "deepseek_ocr2", "data2vec_vision"],
)
def test_tables_of_classes_are_seen_by_check(config: Any, table: str) -> None:
    verdict = hf_attn_patch.check(config, "cpu", "triton_fa2")
    assert isinstance(verdict, hf_attn_patch.Rejected)
    assert table in verdict.reason and "sdpa" in verdict.fix


def test_and_at_load() -> None:
    config = transformers.SamVisionConfig(num_hidden_layers=1, hidden_size=24, image_size=32)
    with pytest.raises(ValueError, match=r"SAM_VISION_ATTENTION_CLASSES.*sdpa"):
        transformers.SamVisionModel._from_config(config, attn_implementation="triton_fa2")
    assert transformers.SamVisionModel._from_config(config, attn_implementation="sdpa")


def test_a_part_that_attends_by_itself_does_not_refuse_the_model() -> None:
    """granite_speech: its encoder knows no attention function, its language model does."""
    assert hf_attn_patch.check(transformers.GraniteSpeechConfig(), "cpu", "triton_fa2").ok
    bloom = hf_attn_patch.check(transformers.BloomConfig(), "cpu", "triton_fa2")
    assert not bloom.ok  # its masks would be lost


def test_a_config_whose_layers_differ_gets_a_verdict() -> None:
    verdict = hf_attn_patch.check(transformers.Gemma4TextConfig(), "cpu", "triton_fa2")
    assert verdict.ok and "head_dim 512" in verdict.reason


def counted(attention: Any, calls: list[int], *args: Any, **kwargs: Any) -> Any:
    calls.append(1)
    return attention(*args, **kwargs)


def test_a_packed_vision_tower_is_called_once_for_all_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as file

    config = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    config |= {"out_hidden_size": 32, "fullatt_block_indexes": [1], "patch_size": 4}
    grid = torch.tensor([[1, 32, 32], [1, 8, 32]])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4)
    vision = file.Qwen2_5_VLVisionConfig(**config)  # type: ignore[attr-defined]
    table, outputs = AttentionInterface._global_mapping, []
    for name in ("sdpa", "triton_fa2"):
        torch.manual_seed(0)
        tower = file.Qwen2_5_VisionTransformerPretrainedModel._from_config(
            vision, attn_implementation=name
        ).eval()
        used = tower.blocks[0].attn.config._attn_implementation
        attention = table[used]
        calls: list[int] = []
        monkeypatch.setitem(table, used, partial(counted, attention, calls))
        with torch.no_grad():
            outputs.append(tower(pixels, grid_thw=grid).last_hidden_state)
        monkeypatch.undo()
        assert (len(calls) == 2) == (name == "triton_fa2")
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-3)
