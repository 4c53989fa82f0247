"""Names: registering, refusing, taking back, what check() says. Also run on transformers 5.17."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from tiny_models import EVERY, LLAMA_LIKE, build, logits, tokens

import hf_attn_patch
from hf_attn_patch import Accepted, Rejected, check
from hf_attn_patch.capabilities import DeviceRequirement
from hf_attn_patch.transformers_compat import tables as transformers_tables

NAMES = ("triton_fa2", "triton_swa", "triton_paged_flash2", "triton_mla")
LLAMA = next(spec for spec in EVERY if spec.id == "llama")


@pytest.fixture
def registered_again() -> Iterator[None]:
    yield
    hf_attn_patch.register()


def tables() -> list[dict[str, Any]]:
    return [table for _, table in transformers_tables.interfaces()]


def tiny_llama(**options: Any) -> Any:
    config = transformers.LlamaConfig(**LLAMA_LIKE)
    return transformers.AutoModelForCausalLM.from_config(config, **options)


# --- registering ----------------------------------------------------------------------------------


def test_import_registers_attention_and_mask() -> None:
    assert [impl.name for impl in hf_attn_patch.list_implementations()] == list(NAMES)
    for name in NAMES:
        assert all(name in table for table in tables())
        assert hf_attn_patch.is_registered(name)


def test_register_is_idempotent() -> None:
    before = [dict(table) for table in tables()]
    hf_attn_patch.register()
    hf_attn_patch.register(["triton_fa2"])
    assert [dict(table) for table in tables()] == before


def test_unregister_and_register(registered_again: None) -> None:
    hf_attn_patch.unregister(["triton_fa2"])
    assert not hf_attn_patch.is_registered("triton_fa2")
    assert hf_attn_patch.is_registered("triton_swa")
    with pytest.raises(ValueError, match="is not supported"):
        tiny_llama(attn_implementation="triton_fa2")
    verdict = check(transformers.LlamaConfig())
    assert isinstance(verdict, Rejected) and "register()" in verdict.fix
    hf_attn_patch.unregister()
    assert all(name not in table for table in tables() for name in NAMES)
    hf_attn_patch.register()
    tiny_llama(attn_implementation="triton_fa2")


@pytest.mark.parametrize("kind", [0, 1], ids=["attention", "mask"])
def test_a_name_of_somebody_else_is_not_overwritten(kind: int, registered_again: None) -> None:
    def theirs(*args: Any, **kwargs: Any) -> None:
        return None

    hf_attn_patch.unregister()
    tables()[kind]["triton_swa"] = theirs
    try:
        with pytest.raises(ValueError, match=r"triton_swa.*already registered.*theirs"):
            hf_attn_patch.register()
        assert all("triton_fa2" not in table for table in tables()), "half a registration"
        hf_attn_patch.unregister()
        assert tables()[kind]["triton_swa"] is theirs
    finally:
        del tables()[kind]["triton_swa"]


@pytest.mark.parametrize("call", [hf_attn_patch.register, hf_attn_patch.unregister])
def test_unknown_name(call: Any) -> None:
    with pytest.raises(ValueError, match="possible: triton_fa2, triton_swa, triton_paged_flash2"):
        call(["triton_fa3"])


@pytest.mark.parametrize("where", ["AttentionInterface", "paged prefix"])
def test_a_paged_name_of_somebody_else_is_not_overwritten(
    where: str, registered_again: None
) -> None:
    key = "triton_paged_flash2"
    if where == "paged prefix":
        if not transformers_tables.batching_prefix():
            pytest.skip("this transformers has no prefix")
        key = transformers_tables.batching_prefix() + key
    hf_attn_patch.unregister()
    tables()[0][key] = test_unknown_name
    try:
        with pytest.raises(ValueError, match="already registered by"):
            hf_attn_patch.register(["triton_paged_flash2"])
        assert not hf_attn_patch.is_registered("triton_paged_flash2")
    finally:
        del tables()[0][key]


def test_the_prefixed_name_comes_and_goes(registered_again: None) -> None:
    """Up to transformers 5.18 continuous batching asks for it, and for no mask of that name."""
    prefixed = transformers_tables.batching_prefix() + "triton_paged_flash2"
    assert prefixed in tables()[0]
    assert (prefixed in tables()[1]) == (not transformers_tables.batching_prefix())
    hf_attn_patch.unregister(["triton_paged_flash2"])
    assert not any("triton_paged_flash2" in key for table in tables() for key in table)


def test_falcon_and_continuous_batching() -> None:
    """Its layers drop what the manager passes: refused, and the other names are not."""
    falcon = next(s for s in EVERY if s.id == "falcon_gqa")
    with pytest.raises(ValueError, match=r"Falcon.*generate_batch.*Instead: .*triton_fa2"):
        build(falcon, "triton_paged_flash2")
    config = transformers.FalconConfig(**falcon.arguments)
    verdict = check(config, "cpu", "triton_paged_flash2")
    assert isinstance(verdict, Rejected) and "generate_batch" in verdict.reason
    assert check(config, "cpu", "triton_fa2").ok


def test_name_can_be_set_and_changed_at_run_time() -> None:
    model = tiny_llama(attn_implementation="eager").eval()
    ids = tokens(2, 9)
    with torch.no_grad():
        eager = model(ids).logits
        model.set_attn_implementation("triton_fa2")
        torch.testing.assert_close(model(ids).logits, eager, rtol=1e-4, atol=1e-6)


def test_each_part_can_have_its_own() -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config=transformers.LlamaConfig(**LLAMA_LIKE),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ),
    )
    parts = {"text_config": "triton_fa2", "vision_config": "eager", "": "sdpa"}
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=parts)
    assert model.config.text_config._attn_implementation == "triton_fa2"
    assert model.config.vision_config._attn_implementation == "eager"


# --- models that cannot take it -------------------------------------------------------------------

IGNORING = {
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 1, "n_head": 2}),
    "mpt": ("MptForCausalLM", {"d_model": 32, "n_layers": 1, "n_heads": 2}),
    "codegen": ("CodeGenForCausalLM", {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}),
    "gptj": ("GPTJForCausalLM", {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
    "mamba": ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 1}),
}
# transformers 5.24 brought these two to the interface
NEWLY_SERVED = ("codegen", "gptj")
if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24):
    NOW_SERVED = {model_type: IGNORING.pop(model_type) for model_type in NEWLY_SERVED}
else:
    NOW_SERVED = {
        "gpt_neox": (
            "GPTNeoXForCausalLM",
            {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        )
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model_type", IGNORING)
def test_a_model_that_would_ignore_the_name_is_refused_at_load(model_type: str, name: str) -> None:
    class_name, arguments = IGNORING[model_type]
    config = transformers.AutoConfig.for_model(model_type, vocab_size=32, **arguments)
    with pytest.raises(ValueError, match=rf"{name}.* refused.*[Ii]nstead: load it with"):
        getattr(transformers, class_name)._from_config(config, attn_implementation=name)
    verdict = check(config, "cpu", name)
    assert isinstance(verdict, Rejected)
    assert "eager" in verdict.fix
    # and it still loads with what it can take
    getattr(transformers, class_name)._from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("name", ["triton_fa2", "triton_paged_flash2"])
@pytest.mark.parametrize("model_type", NOW_SERVED)
def test_a_model_that_calls_the_interface_is_served(model_type: str, name: str) -> None:
    """By a release's own code, not by a list of model types."""
    class_name, arguments = NOW_SERVED[model_type]
    config = transformers.AutoConfig.for_model(model_type, vocab_size=32, **arguments)
    assert check(config, "cpu", name).ok
    model_class = getattr(transformers, class_name)
    ours = model_class._from_config(config, attn_implementation=name).eval()
    eager = model_class._from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(ours.state_dict())
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        for parameter in (*ours.parameters(), *eager.parameters()):
            parameter.mul_(5)  # so that attention is far from uniform
        for given in ({}, {"attention_mask": mask}):
            found, want = (m(ids, **given).logits for m in (ours, eager))
            keep = given.get("attention_mask", torch.ones_like(ids)).bool()
            torch.testing.assert_close(found[keep], want[keep], rtol=1e-4, atol=1e-4)


def test_refused_too_when_the_name_comes_after_loading() -> None:
    class_name, arguments = IGNORING["bloom"]
    config = transformers.BloomConfig(vocab_size=32, **arguments)
    model = getattr(transformers, class_name)._from_config(config, attn_implementation="eager")
    model.config._attn_implementation = "triton_fa2"
    with pytest.raises(ValueError, match="bloom"):
        model(torch.arange(5)[None])


def test_mistyped_name_is_transformers_own_error() -> None:
    with pytest.raises(ValueError, match='attn_implementation="triton_fa"'):
        tiny_llama(attn_implementation="triton_fa")
    verdict = check(transformers.LlamaConfig(), implementation="triton_fa")
    assert isinstance(verdict, Rejected)
    assert "did you mean 'triton_fa2'" in verdict.fix


# --- check ----------------------------------------------------------------------------------------


def test_check_a_model_a_config_and_a_folder(tmp_path: Any) -> None:
    model = build(LLAMA, "triton_fa2")
    model.save_pretrained(tmp_path)
    for subject in (model, model.config, str(tmp_path)):
        verdict = check(subject, "cpu")
        assert isinstance(verdict, Accepted)
        assert verdict.backend == "blockwise PyTorch"
        assert "4 query and 2 key/value heads" in verdict.reason
    assert check(model).ok


def test_check_says_which_backend_a_gpu_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_attn_patch import capabilities

    found = {"triton": object()}
    monkeypatch.setattr(capabilities.importlib.util, "find_spec", found.get)
    monkeypatch.setattr(capabilities, "_installed", lambda package: "3.6.0")
    assert check(transformers.LlamaConfig(), "cuda:1").to_dict()["backend"] == "triton"
    monkeypatch.setattr(capabilities, "_installed", lambda package: "3.5.1+git1234")
    old = check(transformers.LlamaConfig(), "cuda")
    assert isinstance(old, Rejected) and "triton>=3.6; 3.5.1+git1234 is installed" in old.reason
    found.clear()
    missing = check(transformers.LlamaConfig(), "cuda")
    assert isinstance(missing, Rejected) and "hf-attn-patch[gpu]" in missing.fix


def test_check_a_device_that_nothing_serves() -> None:
    verdict = check(transformers.LlamaConfig(), "mps")
    assert isinstance(verdict, Rejected)
    assert "cuda, xpu, cpu" in verdict.reason and "sdpa" in verdict.fix


def test_check_head_dim() -> None:
    config = transformers.LlamaConfig(**LLAMA_LIKE | {"head_dim": 1024})
    verdict = check(config, "cpu")
    assert isinstance(verdict, Rejected) and "1024" in verdict.reason and "512" in verdict.reason


def test_check_window() -> None:
    assert (
        "configure_swa" in check(transformers.LlamaConfig(), "cpu", "triton_swa").to_dict()["fix"]
    )
    assert check(transformers.MistralConfig(), "cpu", "triton_swa").ok


def test_requirement_without_a_package() -> None:
    verdict = DeviceRequirement(device="cpu", backend="x").check()
    assert verdict == Accepted("x", "tensors on 'cpu' run x")


# --- importing ------------------------------------------------------------------------------------


def run_fresh(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ORDERS = {
    "ours_then_a_reload": "import hf_attn_patch, importlib; importlib.reload(hf_attn_patch); "
    "import transformers.modeling_utils; importlib.reload(hf_attn_patch)",
    "transformers_first": "import transformers.modeling_utils; import hf_attn_patch",
    "a_submodule_first": "import hf_attn_patch.attention.dense; hf_attn_patch.register()",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_registered_whatever_is_imported_first(order: str) -> None:
    code = f"{order}\nprint(*map(hf_attn_patch.is_registered, {NAMES}))"
    assert run_fresh(code).split() == ["True"] * len(NAMES)


def test_import_and_listing_cost_nothing() -> None:
    code = (
        "import sys, hf_attn_patch\n"
        "hf_attn_patch.list_implementations()\n"
        "print(*[m for m in ('torch', 'transformers', 'triton') if m in sys.modules])"
    )
    assert run_fresh(code) == ""


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        hf_attn_patch.no_such_thing  # noqa: B018
    assert set(hf_attn_patch.__all__) <= set(dir(hf_attn_patch))
    assert all(getattr(hf_attn_patch, name) is not None for name in hf_attn_patch.__all__)


def test_continuous_batching_cache_is_refused() -> None:
    from hf_attn_patch.registration.functions import fa2_forward

    module = build(LLAMA, "triton_fa2").model.layers[0].self_attn
    q = torch.randn(1, 4, 3, 16)
    with pytest.raises(ValueError, match=r"continuous batching.*triton_paged_flash2"):
        fa2_forward(module, q, q[:, :2], q[:, :2], None, cache=object())


def test_negative_control_missing_mask_function_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a mask function transformers drops the padding; the logits must show it."""
    from tiny_models import TOLERANCE, padded, worst

    inputs = padded("left")
    monkeypatch.delitem(tables()[1], "triton_fa2")
    gap = worst(logits(LLAMA, "triton_fa2", inputs), logits(LLAMA, "eager", inputs))
    assert gap > 100 * TOLERANCE
