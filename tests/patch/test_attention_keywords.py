"""What a model says to its attention arrives, or is refused by name: never swallowed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny_models import LLAMA_LIKE, _fill, assert_close, build, having, tokens, worst

import hf_attn_patch
from hf_attn_patch.attention import dense as forward
from hf_attn_patch.attention import keywords
from hf_attn_patch.registration.functions import (
    fa2_forward,
    mla_forward,
    paged_forward,
    swa_forward,
)
from hf_attn_patch.transformers_compat.model_code import (
    ModelCode,
    attention_classes,
    model_code,
    parts,
)

ROOT = Path(inspect.getfile(hf_attn_patch)).parents[1]
LLAMA = having(lambda spec: spec.id == "llama")[0].values[0]
FORWARDS = {
    "triton_fa2": fa2_forward,
    "triton_swa": swa_forward,
    "triton_paged_flash2": paged_forward,
    "triton_mla": mla_forward,
}
SPARSE = LLAMA_LIKE | {
    "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "index_topk": 4, "index_n_heads": 4,
    "index_head_dim": 32,
}  # fmt: skip
del SPARSE["head_dim"]


def model(config: Any, name: str, implementation: str) -> Any:
    """A small random model whose scores differ enough for a wrong key to show."""
    torch.manual_seed(0)
    made = getattr(transformers, name)._from_config(config, attn_implementation=implementation)
    _fill(made)
    return made.eval()


def call(implementation: str, **extra: Any) -> Any:
    config = transformers.MistralConfig(**LLAMA_LIKE | {"sliding_window": 5})
    module: Any = SimpleNamespace(config=config, is_causal=True)
    q, k, v = (torch.randn(2, heads, 6, 16) for heads in (4, 2, 2))
    return FORWARDS[implementation](module, q, k, v, None, scaling=0.25, **extra)


@pytest.mark.parametrize("implementation", FORWARDS)
def test_an_unknown_keyword_is_refused_by_name(implementation: str) -> None:
    with pytest.raises(ValueError, match=r"tree_indices.*may not ignore.*Instead"):
        call(implementation, tree_indices=torch.zeros(2, 6, 3))


@pytest.mark.parametrize("implementation", [i for i in FORWARDS if i != "triton_mla"])
def test_a_keyword_that_is_none_or_harmless_is_not(implementation: str) -> None:
    plain, _ = call(implementation, tree_indices=None)
    harmless = dict.fromkeys(keywords.HARMLESS, torch.ones(()))
    assert call(implementation, **harmless)[0].shape == plain.shape


@pytest.mark.parametrize("name", sorted(keywords.INSTEAD))
def test_what_models_pass_and_is_not_served_has_a_way_out(name: str) -> None:
    assert keywords.unserved([name]) == name
    with pytest.raises(ValueError, match=f"'{name}'.*Instead: ") as error:
        call("triton_fa2", **{name: torch.zeros(1)})
    assert keywords.INSTEAD[name] in str(error.value)


def test_the_table_of_served_keywords_is_the_functions_own() -> None:
    parameters = inspect.signature(forward.attend).parameters.values()
    named = {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    positional = {"name", "settings", "module", "query", "key", "value"}
    assert named - positional == keywords.SERVED
    assert not keywords.SERVED & keywords.HARMLESS.keys()


@pytest.mark.parametrize("name", ["DeepseekV32", "GlmMoeDsa"])
def test_sparse_attention_by_indices(name: str) -> None:
    """`indices=` picks the keys of each query; eager and sdpa get them in their mask."""
    config = getattr(transformers, f"{name}Config")(**SPARSE)
    ids = tokens(2, 24)
    with torch.no_grad():
        theirs, ours, dense = (
            model(config, f"{name}ForCausalLM", implementation)(ids).logits
            for implementation in ("eager", "triton_fa2", "triton_paged_flash2")
        )
        config.index_topk = 24
        everything = model(config, f"{name}ForCausalLM", "eager")(ids).logits
    assert_close(ours, theirs)
    assert_close(dense, theirs)
    assert worst(everything, theirs) > 0.01  # dense attention would be seen


def test_block_indices_are_refused_at_load_and_in_check() -> None:
    config = transformers.MiniMaxM3VLConfig()
    verdict = hf_attn_patch.check(config, "cpu", "triton_fa2")
    assert isinstance(verdict, hf_attn_patch.Rejected)
    assert "block_indices" in verdict.reason and "sdpa" in verdict.fix


def test_the_contracts_page_names_them_and_tests_that_exist() -> None:
    page = (ROOT / "docs" / "contract.md").read_text()
    for name in keywords.SERVED - {"attention_mask"}:  # which has a table of its own
        assert f"`{name}`" in page, name
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", page))
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k"])
def test_half_of_what_tells_packed_sequences_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="got only one"):
        call("triton_fa2", **{name: torch.tensor([0, 4, 12], dtype=torch.int32)})


def test_every_keyword_of_transformers_models_is_known() -> None:
    """Of the families that this release has: what their layers pass by name to attention."""
    names = ("llama", "gemma3", "gpt_oss", "t5", "modernbert", "qwen2_vl", "whisper", "deepseek_v3")
    for name in names:
        module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["_"])
        passed = frozenset().union(*(layer.keywords for layer in attention_classes(module)))
        assert passed and keywords.unserved(passed) is None, name


def test_a_models_code_is_read_part_by_part() -> None:
    code = model_code(transformers.LlamaModel)
    assert [layer.name for layer in code.attention] == ["LlamaAttention"]
    assert code.attention[0].always_causal and code.attention[0].caches and code.builds_masks
    assert transformers.LlamaModel in parts(transformers.LlamaForCausalLM)
    assert not model_code(transformers.AutoModel).attention  # no model: nothing to read
    assert ModelCode().keywords == frozenset()


def test_weights_are_given_where_they_are_asked_for() -> None:
    ids = tokens(2, 9)
    with torch.no_grad():
        theirs = build(LLAMA, "eager")(ids, output_attentions=True)
        ours = build(LLAMA, "triton_fa2")(ids, output_attentions=True)
        without = build(LLAMA, "triton_fa2")(ids)
    assert not without.attentions
    assert_close(ours.logits, theirs.logits)
    assert len(ours.attentions) == len(theirs.attentions) == 2
    for mine, eagers in zip(ours.attentions, theirs.attentions, strict=True):
        torch.testing.assert_close(mine, eagers, atol=1e-5, rtol=1e-4)


def test_weights_from_pages_are_refused() -> None:
    made = build(LLAMA, "triton_fa2")
    cache = hf_attn_patch.PagedCache(made)
    with torch.no_grad(), pytest.raises(ValueError, match=r"output_attentions.*PagedCache"):
        made(tokens(1, 5), past_key_values=cache, output_attentions=True)


def test_a_dynamic_mask_and_packed_sequences_both_apply() -> None:
    """Doge adds a mask of its own in each layer; cu_seq_lens must not push it out."""
    config = transformers.DogeConfig(**LLAMA_LIKE | {"keep_window_size": 32})
    ids, lengths = tokens(1, 16), (9, 7)
    offsets = torch.tensor([0, 9, 16], dtype=torch.int32)
    packed: dict[str, Any] = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    packed |= {"max_length_q": 9, "max_length_k": 9}
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    eager = model(config, "DogeForCausalLM", "eager")
    ours = model(config, "DogeForCausalLM", "triton_fa2")
    with torch.no_grad():
        for layer in eager.model.layers:
            layer.self_attn.A.copy_(torch.tensor([1.0, 1.5]))
        ours.load_state_dict(eager.state_dict())
        alone = torch.cat([eager(part).logits for part in ids.split(lengths, dim=1)], dim=1)
        assert_close(ours(ids, **packed).logits, alone)
        for layer in eager.model.layers:  # exp(0) is the same for every key: no mask
            layer.self_attn.A.zero_()
        ours.load_state_dict(eager.state_dict())
        assert worst(ours(ids, **packed).logits, alone) > 0.01
