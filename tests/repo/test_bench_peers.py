"""The peers of the GPU benchmark: right where they run here, called as their libraries ask."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench import gpu, peers
from torch import Tensor

from hf_attn_kernels.reference import attention_reference
from hf_attn_patch.bench.baselines import Attention, Shape

CPU = torch.device("cpu")
SMALL = Shape(
    pass_="forward", batch=2, heads_q=4, heads_kv=2, head_dim=32, seq_q=70, seq_k=70, dtype="fp32"
)
SHAPES = {
    "causal": SMALL,
    "full": replace(SMALL, causal=False),
    "mha": replace(SMALL, heads_kv=4, dtype="bf16"),
    "longer": replace(SMALL, seq_k=130),
}


def kept(attention: Attention, shape: Shape) -> bool:
    torch.manual_seed(0)
    q, k, v = shape.inputs(CPU)
    return gpu.forward_budget(attention(q, k, v, shape).detach(), q, k, v, shape).kept


needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton")


@needs_triton
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_flash_attention_1_is_right_in_both_directions(shape: Shape) -> None:
    assert kept(peers.flash_attention_1, shape)
    backward = replace(shape, pass_="backward")
    torch.manual_seed(0)
    gate = gpu._gradient_check(*backward.inputs(CPU), backward)
    assert all(budget.kept for budget in gate(peers.flash_attention_1))


@needs_triton
def test_control_a_key_late_shows() -> None:
    def late(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
        return peers.flash_attention_1(q, k.roll(1, 1), v.roll(1, 1), shape)

    assert not kept(late, SMALL)


@needs_triton
def test_flash_attention_1_says_what_it_was_not_made_for() -> None:
    with pytest.raises(ValueError, match="no windows"):
        kept(peers.flash_attention_1, replace(SMALL, window=8))


COMPILE = """
import sys
sys.path.insert(0, "scripts")
import torch
from aot import aot
from bench import fa1
meta = {"device": "meta"}
for dim in (64, 128, 256):
    x = torch.empty(1, 4096, 16, dim, dtype=torch.bfloat16, **meta)
    wide, sums = torch.empty_like(x, dtype=torch.float32), torch.empty(1, 16, 4096, **meta)
    sizes = {"q_sb": x.stride(0), "k_sb": x.stride(0), "heads": 16, "groups": 1, "q_len": 4096,
             "k_len": 4096, "scale": 0.1, "CAUSAL": True, "D": dim, "BLOCK": fa1.BLOCK}
    base = {"Q": x, "K": x, "V": x, "Out": wide, "Peak": sums, "Total": sums}
    grads = {"DOut": x, "DQ": wide, "DK": x, "DV": x, "scaling": 0.1}
    for fn, arguments in ((fa1._forward, base), (fa1._backward, {**base, **grads})):
        case = aot.case_from_arguments(
            kernel="fa1", name=str(dim), fn=fn, arguments={**arguments, **sizes},
            num_warps=fa1._warps(dim), num_stages=1)
        found = aot.compile_case(case, "sm_90")
        assert found.fits and found.matrix, found
"""


@needs_triton
@pytest.mark.slow
def test_flash_attention_1_compiles_for_a_gpu(fresh_python: Any) -> None:
    fresh_python("-c", COMPILE)


# without SHAPES["longer"]: its is_causal is aligned at the top left
ITS_SHAPES = [SHAPES["causal"], SHAPES["full"], SHAPES["mha"], replace(SMALL, window=9)]


@pytest.mark.parametrize("shape", ITS_SHAPES, ids=str)
def test_transformers_own_sdpa_is_right(shape: Shape) -> None:
    assert kept(peers.transformers_own, shape)


class Wrapper:
    """FlashInfer's two wrappers as its documentation describes them, over the oracle."""

    def __init__(self, workspace: Tensor, layout: str, use_tensor_cores: bool = False) -> None:
        assert workspace.numel() >= 128 * 2**20 and layout == "NHD"

    def plan(self, *given: Any, q_data_type: torch.dtype, causal: bool = False,
             window_left: int = -1) -> None:  # fmt: skip
        self.given, self.causal, self.left = given, causal, window_left


class Prefill(Wrapper):
    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        starts_q, starts_k, heads, heads_kv, dim = self.given
        assert q.shape[1:] == (heads, dim) and k.shape[1:] == (heads_kv, dim)
        out, _ = attention_reference(
            q, k, v, causal=self.causal, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k,
            window_size=(self.left, 0 if self.causal else -1),
        )  # fmt: skip
        return out.to(q.dtype)


class Decode(Wrapper):
    def run(self, q: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        starts, indices, last, heads, _, dim, page_size = self.given
        assert (last == page_size).all() and q.shape[1:] == (heads, dim)
        rows = []
        for b, (start, end) in enumerate(itertools.pairwise(starts)):
            k, v = (x[indices[start:end].long()].flatten(0, 1) for x in pages)
            rows.append(attention_reference(q[b, None, None], k[None], v[None])[0])
        return torch.cat(rows).squeeze(1).to(q.dtype)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"BatchPrefillWithRaggedKVCacheWrapper": Prefill,
             "BatchDecodeWithPagedKVCacheWrapper": Decode}  # fmt: skip
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(**names))  # type: ignore[arg-type]
    for cached in (peers._prefill, peers._decode, peers._workspace):
        cached.cache_clear()


@pytest.mark.usefixtures("flashinfer")
def test_flashinfer_is_asked_for_the_same_attention() -> None:
    for shape in SHAPES.values():
        assert kept(peers.flashinfer_prefill, shape)
    decode = replace(SMALL, pass_="decode", seq_q=1, seq_k=96, causal=True)
    torch.manual_seed(0)
    q, k, v = decode.inputs(CPU)
    out = peers.flashinfer_decode(q, k, v, decode, page_size=16)
    assert gpu.forward_budget(out, q, k, v, decode).kept
    with pytest.raises(ValueError, match="no backward"):
        peers.flashinfer_prefill(q, k, v, replace(SMALL, pass_="backward"))
    with pytest.raises(ValueError, match="full pages"):
        peers.flashinfer_decode(q, k, v, replace(decode, seq_k=100), page_size=16)
