"""Gradients of a training step against eager's, with and without checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import PAD, TinyModel, build, having, inputs_for, is_causal, padded, positions

ALL = having(lambda spec: True)


def step(
    spec: TinyModel, implementation: str, checkpointing: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step on a padded batch, without dropout, so that two compare."""
    model = copy.deepcopy(build(spec, implementation))
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = inputs_for(spec, padded("right"))
    if is_causal(spec):
        inputs["position_ids"] = positions(inputs["attention_mask"])
    target = inputs.get("decoder_input_ids", inputs["input_ids"])
    inputs["labels"] = target.masked_fill(target == PAD, -100)
    extra = {} if spec.kind == "masked" else {"use_cache": False}
    out = model(**inputs, **extra)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(out.loss.detach()), gradients


def assert_same_step(
    ours: tuple[float, dict[str, torch.Tensor]], theirs: tuple[float, dict[str, torch.Tensor]]
) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys(), "a parameter lost its gradient"
    for name, expected in theirs[1].items():
        scale = expected.abs().max().clamp(min=1e-6)
        gap = float((ours[1][name] - expected).abs().max() / scale)
        # a gradient that is zero but for rounding (a bias of keys) has no relative error
        if float(scale) > 1e-5:
            assert gap < 2e-4, f"gradient of {name} differs by {gap:.1e} of its largest entry"


@pytest.mark.parametrize("spec", ALL)
def test_training_step(spec: TinyModel) -> None:
    assert_same_step(step(spec, "triton_fa2"), step(spec, spec.oracle))


@pytest.mark.parametrize(
    "spec", having(lambda s: s.id in ("llama", "gpt_oss", "gemma2", "t5", "bert", "falcon_alibi"))
)
def test_gradient_checkpointing(spec: TinyModel) -> None:
    assert_same_step(step(spec, "triton_fa2", checkpointing=True), step(spec, spec.oracle))


def test_position_bias_and_sinks_get_gradients() -> None:
    specs = {p.values[0].id: p.values[0] for p in ALL}
    _, t5 = step(specs["t5"], "triton_fa2")
    assert all(t5[n].abs().max() > 0 for n in t5 if "relative_attention_bias" in n)
    _, gpt_oss = step(specs["gpt_oss"], "triton_fa2")
    sinks = [n for n in gpt_oss if n.endswith("sinks")]
    assert len(sinks) == 2
    assert all(gpt_oss[n].abs().max() > 0 for n in sinks)


def test_negative_control_a_lost_gradient_is_seen() -> None:
    spec = ALL[0].values[0]
    loss, gradients = step(spec, spec.oracle)
    wrong = dict(gradients)
    name = next(n for n in wrong if "k_proj" in n)
    wrong[name] = wrong[name] * 1.01
    with pytest.raises(AssertionError, match="k_proj"):
        assert_same_step((loss, wrong), (loss, gradients))
