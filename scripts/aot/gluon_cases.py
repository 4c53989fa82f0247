"""The calls whose Hopper kernel is compiled ahead of time: every ring, every feature."""

from __future__ import annotations

import torch

from hf_attn_kernels.triton.gluon_launch import RINGS, forward_launch, refusal

from .aot import AotCase, case_of
from .attention_cases import Call, inputs

CALLS = tuple(
    Call(name=f"{name}-D{dim}-{kind}", dtype=dtype, head_dim=dim, **how)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
    for dim in RINGS
    for kind, how in (
        ("causal", {}), ("full", {"causal": False}), ("window", {"window": 511}),
        ("s_aux-window", {"s_aux": True, "window": 127}),
    )
)  # fmt: skip


def aot_cases(arch: str) -> list[AotCase]:
    """Cases of the Hopper kernel; none on another chip, or by a Triton without its Gluon."""
    cases = []
    for call in CALLS:
        x = inputs(call)
        if refusal(x, arch) is not None:
            continue
        out, lse = x.shape.empty_outputs(x.q)
        launch = forward_launch(x, out, lse)
        cases.append(case_of(launch, call.name))
    return cases
