"""On a GPU alone: the shipped tiles at models' sizes, CUDA graphs, and what is repeatable."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from kernel_cases import Case, apart, check, gradients, make_data, run_kernel
from torch import Tensor

from hf_attn_kernels import flash_attn_func

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from hf_attn_kernels.triton import options

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16

LARGE = [
    Case(q_len=2000, batch=5, heads_q=4, heads_kv=kv, head_dim=dim, causal=causal, dtype=BF16)
    for dim, kv in ((64, 4), (128, 1), (256, 2))
    for causal in (True, False)
] + [
    Case(q_len=2000, batch=5, head_dim=128, causal=True, window=(511, 0), dtype=BF16),
    Case(
        lengths=((2000, 2000), (77, 77), *[(1900, 2900)] * 3), head_dim=128, causal=True, dtype=BF16
    ),
]


@pytest.mark.parametrize("deterministic", [True, False], ids=["", "sums"])
@pytest.mark.parametrize("by", ["descriptors", "pointers"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_at_the_sizes_of_models(
    case: Case, by: str, deterministic: bool, device: torch.device
) -> None:
    with options.without("gluon", *(("descriptors",) if by == "pointers" else ())):
        check(case, device, apart, deterministic=deterministic)


def test_a_cuda_graph_keeps_its_descriptors(device: torch.device) -> None:
    q, k, v = (torch.randn(16, 1024, 4, 64, dtype=BF16, device=device) for _ in range(3))
    with options.without("gluon"):
        flash_attn_func(q, k, v, causal=True)  # compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = flash_attn_func(q, k, v, causal=True)
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, flash_attn_func(q, k, v, causal=True))
        assert not torch.equal(out, flash_attn_func(q, k, v))


def test_gradients_are_the_same_bits_unless_it_is_said(device: torch.device) -> None:
    data = make_data(
        Case(q_len=2000, batch=5, head_dim=64, causal=True, dtype=torch.float16), device
    )

    def dq(**how: bool) -> Tensor:
        return gradients(data, *run_kernel(data, **how))["q"]

    assert torch.equal(dq(), dq())
    torch.testing.assert_close(dq(deterministic=False), dq(), rtol=1e-2, atol=1e-2)
