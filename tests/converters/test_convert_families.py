"""Every family: exact where it must be, in transformers' own class, refused with the reason."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from family_cases import (
    CASES,
    REFUSED,
    WEIGHTS,
    Case,
    config_of,
    each_case,
    low_checkpoint,
    merge,
    read,
)
from safetensors.torch import save_file
from tiny_checkpoints import (
    assert_same_logits,
    edit_config,
    load,
    logits_of,
    some_tokens,
    tiny_checkpoint,
)
from transformers import AutoConfig

import hf_attn_patch  # noqa: F401  (Falcon outputs are tried with our adapter)
from hf_attn_converters import FAMILIES, convert, family_of, plan_conversion
from hf_attn_converters.families.layouts import Part


def test_no_family_is_left_out() -> None:
    tried = {family_of(config_of(case.tiny)).model_type for case in CASES} | set(REFUSED)
    ours = {f"{name}_gqa" for name in ("bert", "roberta", "albert")}  # their `low` checkpoints
    assert tried | ours == {spec.model_type for spec in FAMILIES.values()}


@each_case
def test_expand_and_back(case: Case, tmp_path: Path) -> None:
    """Logits stay equal; the mean of what was repeated is the source, bit by bit."""
    low = low_checkpoint(case, tmp_path)
    result = convert(low, tmp_path / "high", num_key_value_heads=case.high)
    assert result.plan.method == "exact"
    assert_same_logits(logits_of(tmp_path / "high"), logits_of(low))
    if case.after:
        assert result.plan.model_type_after == case.after

    merge(tmp_path / "high", tmp_path / "back", num_key_value_heads=case.low)
    before, after = read(low), read(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert_same_logits(logits_of(tmp_path / "back"), logits_of(low))


@each_case
def test_control_k_turned_by_a_head(case: Case, tmp_path: Path) -> None:
    """The comparison can fail: K's heads one place off give other logits, in every layout."""
    low = low_checkpoint(case, tmp_path)
    source = low if case.low > 1 else tmp_path / "high"
    if case.low == 1:  # with one KV head there is nothing to turn
        convert(low, source, num_key_value_heads=case.high)
    before = logits_of(source)
    work = plan_conversion(low, tmp_path / "none", num_key_value_heads=case.high)
    heads = work.heads_before if source is low else work.heads_after
    layout = family_of(json.loads((source / "config.json").read_text())).layout
    tensors = read(source)
    turned = 0
    for name, tensor in tensors.items():
        place = layout.locate(name)
        if place and place.kind == "weight" and "k" in place.slot.roles and not place.slot.norm:
            parts = place.slot.split(tensor, place.kind, heads)
            key = Part("k", "weight")
            parts[key] = parts[key].roll(
                1, dims=1
            )  # by one dimension: MQA expanded has equal heads
            tensors[name] = place.slot.join(parts, place.kind)
            turned += 1
    assert turned
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    after = logits_of(source)
    with pytest.raises(AssertionError):
        assert_same_logits(after, before)
    assert (after - before).abs().max() > 1e-3 * before.abs().max()


@each_case
def test_merged_runs_in_its_class(case: Case, tmp_path: Path) -> None:
    """The result loads without a missing or unexpected tensor, computes, and caches N heads."""
    source = tiny_checkpoint(tmp_path / "a", family=case.tiny, kv_heads=4)
    heads = 1 if not case.tiny.startswith("falcon_mqa") else 2
    if case.tiny == "falcon_mqa_serial" or case.tiny == "gpt_bigcode":
        convert(source, tmp_path / "mha", num_key_value_heads=4)
        source, heads = tmp_path / "mha", 1
    plan = merge(source, tmp_path / "b", num_key_value_heads=heads).plan
    model, info = load(tmp_path / "b", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = not type(model).__module__.startswith("transformers.models.")
    assert ours == plan.model_type_after.endswith("_gqa")
    with torch.inference_mode():
        output = model(some_tokens(), **({"use_cache": True} if case.cache else {}))
    assert output.logits.isfinite().all()
    if not case.cache:
        assert plan.kv_bytes_per_token_before == plan.kv_bytes_per_token_after == 0
    elif not (case.tiny.startswith("falcon") and model.config.new_decoder_architecture):
        # transformers' Falcon repeats the heads of the new architecture before it caches them
        assert output.past_key_values.layers[0].keys.shape == (2, heads, 24, 8)
        assert plan.kv_bytes_per_token_after == 2 * 2 * heads * 8 * 4  # layers, K V, heads, dim


@each_case
def test_config_round_trip(case: Case, tmp_path: Path) -> None:
    """Head counts stand in config.json, and transformers keeps them when it saves it again."""
    low = low_checkpoint(case, tmp_path)
    convert(low, tmp_path / "b", num_key_value_heads=case.high)
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    spec = family_of(written)
    assert spec.kv_heads(written) == case.high
    if spec.kv_heads_key is not None:
        assert spec.settings(written)[spec.kv_heads_key] == case.high
    AutoConfig.from_pretrained(tmp_path / "b", trust_remote_code=True).save_pretrained(
        tmp_path / "c"
    )
    again = json.loads((tmp_path / "c" / "config.json").read_text())
    assert family_of(again).name == spec.name
    assert spec.kv_heads(again) == case.high
    for size in (spec.query_heads, spec.head_dim, spec.hidden, spec.layers):
        assert size(again) == size(written)


def test_olmo2_norm_goes_with_its_heads(tmp_path: Path) -> None:
    """k_norm has a scale for each head: pooled with K, q_norm left."""
    source = tiny_checkpoint(tmp_path / "a", family="olmo2", kv_heads=4)
    merge(source, tmp_path / "b", num_key_value_heads=2)
    before, after = read(source), read(tmp_path / "b")
    name = "model.layers.1.self_attn.{}_norm.weight"
    pooled = before[name.format("k")].double().view(2, 2, 8).mean(1).flatten().float()
    torch.testing.assert_close(after[name.format("k")], pooled)
    assert torch.equal(after[name.format("q")], before[name.format("q")])


# --- forms that transformers cannot hold ----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Refusal:
    tiny: str
    heads: int
    says: str
    kv_heads: int = 4


REFUSALS = [
    Refusal(tiny="gpt_neox", heads=2, says=r"gpt_neox cannot hold 2 KV heads: .* possible: 4$"),
    Refusal(tiny="opt", heads=1, says=r"opt cannot hold 1 KV heads: .* possible: 4$"),
    Refusal(tiny="t5", heads=2, says=r"t5 cannot hold 2 KV heads: .* possible: 4$"),
    Refusal(tiny="gpt2", heads=2, says=r"gpt2 cannot hold 2 KV heads: .*GPT-BigCode.* 1, 4$"),
    Refusal(tiny="gpt_bigcode", heads=2, says=r"cannot hold 2 .* possible: 1, 4$"),
    Refusal(tiny="falcon_mha", heads=2, says=r"falcon cannot hold 2 .*parallel_attn.* 1, 4$"),
    Refusal(tiny="falcon_mqa_serial", heads=2, says=r"falcon cannot hold 2 KV heads.* 1, 4$"),
    Refusal(tiny="bert", heads=4, says="already has 4"),
    Refusal(tiny="falcon_mqa", heads=3, says="possible: 1, 2, 4"),
]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: f"{case.tiny}-{case.heads}")
def test_refusals_say_what_is_possible(case: Refusal, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", family=case.tiny, kv_heads=case.kv_heads)
    with pytest.raises(ValueError, match=case.says):
        convert(source, tmp_path / "b", num_key_value_heads=case.heads)
    assert not (tmp_path / "b").exists()


def test_configs_that_cannot_be_brought_over(tmp_path: Path) -> None:
    for tiny, change, says in (
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "possible: False"),
        ("gpt2", {"architectures": ["GPT2DoubleHeadsModel"]}, "GPT2LMHeadModel"),
        ("albert", {"num_hidden_groups": 2}, "possible: 1"),
        ("bert", {"architectures": ["BertLMHeadModel"]}, "BertForMaskedLM"),
        ("gemma3", {"text_config": None}, "text_config must be an object"),
        ("gpt_bigcode", {"multi_query": 3}, "multi_query=3"),
    ):
        folder = tmp_path / f"{tiny}-{next(iter(change))}"
        edit_config(tiny_checkpoint(folder, family=tiny, kv_heads=4), **change)
        with pytest.raises(ValueError, match=says):
            convert(folder, tmp_path / "b", num_key_value_heads=1)


class TestTensorParallel:
    @pytest.mark.parametrize(("heads", "devices"), [(1, 2), (2, 4), (2, 3)])
    def test_heads_that_devices_do_not_divide(
        self, heads: int, devices: int, tmp_path: Path
    ) -> None:
        source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
        with pytest.raises(ValueError, match=f"over {devices} devices") as caught:
            plan_conversion(
                source,
                tmp_path / "b",
                num_key_value_heads=heads,
                method="mean",
                tensor_parallel_size=devices,
            )
        possible = [n for n in (1, 2, 4) if n % devices == 0]
        assert all(str(n) in str(caught.value).split(";")[1] for n in possible)
        assert possible or "no number" in str(caught.value)

    def test_heads_that_fit(self, tmp_path: Path) -> None:
        source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
        for devices in (None, 1, 2):
            plan_conversion(
                source,
                tmp_path / "b",
                num_key_value_heads=2,
                method="mean",
                tensor_parallel_size=devices,
            )


# --- GPT-2 and Falcon -----------------------------------------------------------------------------


class TestGpt2:
    def test_all_heads_as_gpt_bigcode(self, tmp_path: Path) -> None:
        """Nothing is merged: Conv1D turns into Linear, [Q | K | V] into heads of q, k, v."""
        source = tiny_checkpoint(tmp_path / "a", family="gpt2", kv_heads=4)
        plan = convert(source, tmp_path / "b", num_key_value_heads=4).plan
        assert (plan.method, plan.model_type_after) == ("exact", "gpt_bigcode")
        model = load(tmp_path / "b")
        assert type(model).__name__ == "GPTBigCodeForCausalLM"
        assert model.config.multi_query is False
        assert_same_logits(logits_of(tmp_path / "b"), logits_of(source))

    def test_a_silent_activation_and_old_buffers(self, tmp_path: Path) -> None:
        """gpt2 takes gelu_new where config.json is silent, GPT-BigCode another."""
        source = tiny_checkpoint(tmp_path / "a", family="gpt2", kv_heads=4)
        edit_config(source, drop=("activation_function",))
        tensors = read(source)
        mask = torch.tril(torch.ones(1, 1, 512, 512))
        tensors |= {f"transformer.h.{n}.attn.bias": mask.clone() for n in range(2)}
        save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
        plan = convert(source, tmp_path / "b", num_key_value_heads=4).plan
        assert plan.tensors_dropped == 2
        assert not any(name.endswith(".attn.bias") for name in read(tmp_path / "b"))
        assert load(tmp_path / "b").config.activation_function == "gelu_new"
        assert_same_logits(logits_of(tmp_path / "b"), logits_of(source))


FALCON_OUTPUTS = [
    pytest.param("falcon", 4, 2, id="new-to-GQA2"),
    pytest.param("falcon", 2, 1, id="new-to-MQA"),
    pytest.param("falcon_mqa", 1, 2, id="7b-to-GQA2"),
    pytest.param("falcon_mqa_serial", 1, 4, id="serial-MQA-to-MHA"),
    pytest.param("falcon_mha", 4, 1, id="rw-to-MQA"),
    pytest.param("falcon_mha_parallel", 4, 2, id="parallel-MHA-to-GQA2"),
]


@pytest.mark.parametrize(("tiny", "before", "after"), FALCON_OUTPUTS)
def test_falcon_through_our_adapter(tiny: str, before: int, after: int, tmp_path: Path) -> None:
    """The same logits as transformers' own attention, and only the KV heads in the cache."""
    source = tiny_checkpoint(tmp_path / "a", family=tiny, kv_heads=before)
    merge(source, tmp_path / "b", num_key_value_heads=after)
    stock = logits_of(tmp_path / "b", attn_implementation="sdpa")
    ours = load(tmp_path / "b", attn_implementation="triton_fa2")
    with torch.inference_mode():
        output = ours(some_tokens(), use_cache=True)
    torch.testing.assert_close(output.logits, stock, atol=2e-5, rtol=1e-4)
    assert output.past_key_values.layers[0].keys.shape == (2, after, 24, 8)


def test_code_of_an_older_falcon_is_not_named_any_more(tmp_path: Path) -> None:
    """falcon-7b's folder brings its own modeling file, which knows the old architecture only."""
    source = tiny_checkpoint(tmp_path / "a", family="falcon_mqa")
    edit_config(source, auto_map={"AutoConfig": "configuration_falcon.FalconConfig"})
    convert(source, tmp_path / "b", num_key_value_heads=2)
    assert "auto_map" not in json.loads((tmp_path / "b" / "config.json").read_text())
