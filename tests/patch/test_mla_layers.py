"""``triton_mla``: its cost rule, getting in and out of a model, what it refuses, its benchmark."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mla_specs import LATENTS, OURS, V3, Expanding, batch, decode_logits
from tiny_models import (
    COMMON,
    LLAMA_LIKE,
    TOLERANCE,
    assert_close,
    build,
    generate,
    tokens,
    worst,
)
from torch import Tensor, nn

import hf_attn_patch
from hf_attn_patch import PagedCache, Rejected, check
from hf_attn_patch.attention import mla
from hf_attn_patch.bench import mla as bench
from hf_attn_patch.bench.results import read_rows
from hf_attn_patch.transformers_compat import latent_layers as adapter

# -- the cost rule --------------------------------------------------------------------------------

DEEPSEEK = mla.Sizes(nope=128, rope=64, value=128, rank=512)


@pytest.mark.parametrize(
    ("queries", "keys", "absorbed"),
    [
        (1, 1, False),
        (1, 2, True),
        (1, 4096, True),
        (16, 1024, True),
        (16, 16, False),
        (128, 4096, True),
        (170, 1 << 20, True),
        (171, 1 << 20, False),
        (4096, 4096, False),
    ],
)
def test_cost_rule(queries: int, keys: int, absorbed: bool) -> None:
    assert DEEPSEEK.absorbs(queries, keys) == absorbed


def test_cost_rule_counts_multiplications() -> None:
    """The rule's two sides, counted in the matrix products of both ways themselves."""
    s, heads = mla.Sizes(nope=16, rope=8, value=12, rank=16), 4

    def multiplications(queries: int, keys: int) -> tuple[int, int]:
        up = heads * s.rank * (s.nope + s.value)
        per_score = heads * queries * keys
        absorbed = queries * up + per_score * (s.rank + s.rope) + per_score * s.rank
        expanded = keys * up + per_score * (s.nope + s.rope) + per_score * s.value
        return absorbed, expanded

    for queries in (1, 2, 5, 9, 16, 40):
        for keys in (q for q in (1, 2, 7, 33, 400, 5000) if q >= queries):
            absorbed, expanded = multiplications(queries, keys)
            assert s.absorbs(queries, keys) == (absorbed <= expanded)


# -- getting in and out ---------------------------------------------------------------------------


def test_weights_are_saved_as_ever(tmp_path: Path) -> None:
    model = build(V3, OURS)
    generate(V3, OURS, batch("unpadded"))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    )
    assert again.state_dict().keys() == build(V3, "eager").state_dict().keys()
    inputs = batch("padded")
    assert_close(decode_logits(again.eval(), inputs), decode_logits(build(V3, "eager"), inputs))
    assert OURS not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_absorb_with_their_own_weights(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch("padded")
    theirs = decode_logits(build(V3, "eager"), inputs)
    copied = how(build(V3, OURS))
    assert_close(decode_logits(copied, inputs), theirs)
    assert all(adapter.hands_over(layer.self_attn) for layer in copied.model.layers)
    expanding = Expanding(monkeypatch)
    assert_close(decode_logits(copied, inputs), theirs)
    assert expanding.count == 2
    with torch.no_grad():
        copied.model.layers[0].self_attn.kv_b_proj.weight.mul_(2)
    assert worst(decode_logits(copied, inputs), theirs) > 100 * TOLERANCE
    assert_close(decode_logits(build(V3, OURS), inputs), theirs)


def test_switching_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch("padded")
    theirs = decode_logits(build(V3, "eager"), inputs)
    model = copy.deepcopy(build(V3, "eager"))
    for name in (OURS, "eager", OURS, "triton_fa2"):
        model.set_attn_implementation(name)
        assert_close(decode_logits(model, inputs), theirs)
    model.set_attn_implementation(OURS)
    expanding = Expanding(monkeypatch)
    decode_logits(model, inputs)
    assert expanding.count == 2


def test_a_paged_cache_after_switching() -> None:
    inputs = batch("padded")
    model = copy.deepcopy(build(V3, "eager"))
    model.set_attn_implementation(OURS)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    ours = model.generate(**inputs, past_key_values=PagedCache(model), **options)
    assert torch.equal(ours, build(V3, "eager").generate(**inputs, **options))


def test_compiles() -> None:
    model = copy.deepcopy(build(V3, OURS))
    attention = torch.compile(model.model.layers[0].self_attn, fullgraph=True, backend="aot_eager")
    hidden = torch.randn(2, 1, 48)
    embeddings = model.model.rotary_emb(hidden, torch.zeros(1, 1, dtype=torch.long))
    with torch.no_grad():
        eager, _ = model.model.layers[0].self_attn(hidden, embeddings, None)
        compiled, _ = attention(hidden, embeddings, None)
    torch.testing.assert_close(compiled, eager)


# -- refusals -------------------------------------------------------------------------------------


def test_models_without_latents_are_refused() -> None:
    config = transformers.LlamaConfig(**LLAMA_LIKE)
    with pytest.raises(ValueError, match=r"kv_lora_rank.*Instead: .*triton_fa2"):
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation=OURS)
    verdict = check(config, "cpu", OURS)
    assert isinstance(verdict, Rejected) and "kv_lora_rank" in verdict.reason
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.set_attn_implementation(OURS)
    with pytest.raises(ValueError, match="LlamaAttention is none"):
        model(tokens(1, 4))
    falcon = transformers.FalconConfig(**COMMON, hidden_size=64, num_attention_heads=8)
    assert not check(falcon, "cpu", OURS).ok
    assert check(build(V3, "eager"), "cpu", OURS).ok


def test_sparse_latent_attention_is_refused() -> None:
    verdict = check(transformers.DeepseekV32Config(), "cpu", OURS)
    assert isinstance(verdict, Rejected)
    assert "indexer" in verdict.reason and "sdpa" in verdict.fix


class Halved(nn.Linear):
    """Stands for what quantisation or an adapter makes of a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def halved_class(attention: Any) -> None:
    attention.kv_b_proj.__class__ = Halved


def with_bias(attention: Any) -> None:
    linear = attention.kv_b_proj
    linear.bias = nn.Parameter(torch.arange(linear.out_features).cos())


def forward_hook(attention: Any) -> None:
    attention.kv_b_proj.register_forward_hook(lambda module, args, out: out * 1.5)


def pre_hook(attention: Any) -> None:
    attention.kv_b_proj.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def parametrized(attention: Any) -> None:
    nn.utils.parametrize.register_parametrization(attention.kv_b_proj, "weight", Half())


def old_weight_norm(attention: Any) -> None:
    nn.utils.weight_norm(attention.kv_b_proj)
    with torch.no_grad():
        attention.kv_b_proj.weight_g.mul_(2)


def own_forward(attention: Any) -> None:
    linear = attention.kv_b_proj
    linear.forward = lambda x: nn.functional.linear(x, linear.weight) * 1.5


def offloaded(attention: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    weights = {"weight": attention.kv_b_proj.weight.detach() * 1.5}
    hook = hooks.AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
    hooks.add_hook_to_module(attention.kv_b_proj, hook)


def quantised(attention: Any) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(attention.kv_b_proj, torchao.Int8WeightOnlyConfig())


MORE_THAN_A_PRODUCT = (
    halved_class, with_bias, forward_hook, pre_hook, parametrized, old_weight_norm, own_forward,
    offloaded, quantised,
)  # fmt: skip


@pytest.mark.parametrize("change", MORE_THAN_A_PRODUCT, ids=lambda change: change.__name__)
def test_a_layer_that_does_more_than_to_multiply_is_called(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager's numbers, over growing caches and pages, padded; that it matters is the control."""
    inputs, expanding = batch("padded"), Expanding(monkeypatch)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    models = {}
    for name in (OURS, "eager"):
        models[name] = copy.deepcopy(build(V3, name))
        for layer in models[name].model.layers:
            change(layer.self_attn)
    if change is not quantised:  # which should hardly matter
        plain = decode_logits(build(V3, "eager"), inputs)
        assert worst(decode_logits(models["eager"], inputs), plain) > 100 * TOLERANCE
    with torch.no_grad():
        expected = models["eager"].generate(**inputs, **options)
        assert torch.equal(models[OURS].generate(**inputs, **options), expected)
        expanding.count = 0
        for dtype in (None, "fp8"):
            cache = PagedCache(models[OURS], dtype=dtype)
            found = models[OURS].generate(**inputs, past_key_values=cache, **options)
            if dtype is None:
                assert torch.equal(found, expected)
    assert expanding.count == 2 * 2 * 6  # caches, layers, steps


def test_a_layer_that_cannot_run_is_refused() -> None:
    model = copy.deepcopy(build(V3, OURS))
    linear = model.model.layers[1].self_attn.kv_b_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"kv_b_proj, which must be floating-point.*torch.int8"):
        decode_logits(model, batch("unpadded"))


def test_continuous_batching_cache_is_refused() -> None:
    module = build(V3, OURS).model.layers[0].self_attn
    q, latent, rope = torch.randn(1, 4, 1, 24), torch.randn(1, 1, 5, 16), torch.randn(1, 1, 5, 8)
    with pytest.raises(ValueError, match=r"continuous batching.*triton_paged_flash2"):
        mla.attend(module, q, latent, rope, None, cache=object())


def test_taken_away_with_the_others() -> None:
    try:
        hf_attn_patch.unregister([OURS])
        assert not hf_attn_patch.is_registered(OURS)
    finally:
        hf_attn_patch.register()
    inputs = batch("unpadded")
    assert torch.equal(generate(V3, OURS, inputs), generate(V3, "eager", inputs))


# -- the benchmark --------------------------------------------------------------------------------

SHORT = {"keys": (40,), "dtypes": ("fp32",), "budget_s": 0.0, "hidden_size": 48} | LATENTS


def test_bench_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, said = tmp_path / "mla.csv", []
    rows = bench.run(out=out, say=said.append, num_attention_heads=4, q_lora_rank=16, **SHORT)
    assert [row["impl"] for row in rows] == ["hf_attn_patch", "sdpa", "eager"] * 2
    assert [row["extra"] for row in rows[::3]] == [
        f"MLA {what}; cache 96 B/token" for what in ("attention", "layer")
    ]
    assert all(float(row["p50_ms"]) > 0 for row in rows) and len(said) == 2
    assert read_rows(out) == rows
    # a wrong answer is not timed
    monkeypatch.setattr(mla.Sizes, "absorbs", lambda *_: True)
    monkeypatch.setattr(mla, "_window", lambda kwargs: (3, 0))
    with pytest.raises(RuntimeError, match="not timed"):
        bench.run(out=out, say=said.append, num_attention_heads=4, q_lora_rank=16, **SHORT)
    assert read_rows(out) == rows
    with pytest.raises(ValueError, match="possible: fp32, bf16"):
        bench.run(dtypes=("fp8",))
