"""The Gluon kernel for Hopper: its barriers on a machine of threads, its code ahead of time.

On a GPU the same calls run natively.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from conftest import HAS_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from gluon_block import Standstill
from gluon_machine import Descriptor, edited, launch, pointer, read_back

from hf_attn_kernels import flash_attn_func
from hf_attn_kernels.reference import attention_reference
from hf_attn_kernels.triton import gluon_launch
from hf_attn_kernels.triton import options as choice

if not gluon_launch.available():
    pytest.skip("this Triton has no Gluon that the kernel knows", allow_module_level=True)

from hf_attn_kernels.triton.gluon_forward import hopper_forward_kernel as KERNEL

Found = tuple[Tensor, Tensor]


def made(batch: int, q_len: int, k_len: int, heads: int, heads_kv: int, dim: int) -> list[Tensor]:
    shapes = [(batch, q_len, heads, dim), *[(batch, k_len, heads_kv, dim)] * 2]
    torch.manual_seed(q_len * 1000 + k_len)
    return [torch.randn(shape).to(torch.bfloat16) for shape in shapes]


def by_threads(
    q: Tensor, k: Tensor, v: Tensor, *, left: int = -1, right: int = 0,
    s_aux: Tensor | None = None, seed: int = 0, rows: int = 16, block_n: int = 16,
    stages: int = 2, kernel: Any = KERNEL,
) -> Found:  # fmt: skip
    """Out and lse of the kernel, its tiles small."""
    batch, q_len, heads, dim = q.shape
    out, lse = torch.full_like(q, math.nan), torch.full((batch, heads, q_len), math.nan)
    to_out, to_lse = pointer(out), pointer(lse)
    blocks_m = -(-q_len // (2 * rows))
    descriptors = {
        f"{name}_desc": Descriptor(x.transpose(1, 2), (1, 1, size, dim))
        for name, x, size in (("q", q, rows), ("k", k, block_n), ("v", v, block_n))
    }
    launch(
        kernel, blocks_m * batch * heads, seed, **descriptors, Out=to_out, Lse=to_lse,
        SAux=pointer(q if s_aux is None else s_aux), o_sb=out.stride(0), lse_sb=lse.stride(0),
        lse_sh=lse.stride(1), blocks_m=blocks_m, heads_q=heads, groups=heads // k.shape[2],
        q_len=q_len, k_len=k.shape[1], left=left, right=right, scaling=dim**-0.5,
        HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0, HAS_S_AUX=s_aux is not None, D=dim, ROWS=rows,
        BLOCK_N=block_n, STAGES=stages,
    )  # fmt: skip
    return read_back(to_out, out), read_back(to_lse, lse)


def check(found: Found, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> None:
    """Within twice the error of a dense bfloat16 attention, as the other kernels' tests."""
    left, right, s_aux = how.get("left", -1), how.get("right", 0), how.get("s_aux")
    options: dict[str, Any] = {"window_size": (left, right), "s_aux": s_aux}
    exact, exact_lse = attention_reference(q, k, v, **options)
    eager, _ = attention_reference(q, k, v, **options, dtype=torch.bfloat16)
    out, lse = (x.cpu().double() for x in found)
    assert not out.isnan().any()
    allowed = 2 * (eager.double() - exact).abs().max() + 1e-5
    assert (out - exact).abs().max() <= allowed
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    q_len=st.integers(1, 100), k_len=st.integers(1, 130), left=st.sampled_from([-1, 0, 7, 40]),
    right=st.sampled_from([-1, 0, 5]), groups=st.sampled_from([1, 2]), sinks=st.booleans(),
    block_n=st.sampled_from([16, 32]), stages=st.sampled_from([2, 3]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_any_length_and_window_in_any_order(
    q_len: int, k_len: int, left: int, right: int, groups: int, sinks: bool, block_n: int,
    stages: int, seed: int,
) -> None:  # fmt: skip
    tensors = made(1, q_len, k_len, groups, 1, 16)
    s_aux = torch.tensor([0.5, -1.0])[:groups] if sinks else None
    how = {"left": left, "right": right, "s_aux": s_aux}
    found = by_threads(*tensors, **how, block_n=block_n, stages=stages, seed=seed)
    check(found, *tensors, **how)


def test_rows_heads_and_strides_of_a_batch() -> None:
    q, k, v = made(2, 70, 70, 4, 2, 32)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    check(by_threads(q, k, v, right=-1), q, k, v, right=-1)


EDITS = {
    "keys are read before they are there": (
        "        mbarrier.wait(k_full.index(stage), lap)\n", "",
    ),
    "values are read before they are there": (
        "        mbarrier.wait(v_full.index(stage), lap)\n", "",
    ),
    "values are given back while they are read": (
        "        acc, _ = warpgroup_mma_wait(0, deps=(acc, p16))\n"
        "        mbarrier.arrive(v_free.index(last))\n",
        "        mbarrier.arrive(v_free.index(last))\n"
        "        acc, _ = warpgroup_mma_wait(0, deps=(acc, p16))\n",
    ),
    "one consumer gives keys back for both": ("mbarrier.init(k_free.index(i), count=2)",
                                              "mbarrier.init(k_free.index(i), count=1)"),
    "values are never given back": ("        mbarrier.arrive(v_free.index(last))\n", ""),
    "the producer starts a phase late": ("(n // STAGES & 1) ^ 1", "n // STAGES & 1"),
    "scores are used before they are computed": (
        "s = warpgroup_mma_wait(1, deps=(s,))", "s = warpgroup_mma_wait(2, deps=(s,))",
    ),
    "the mask is one key off": ("j <= i + right", "j <= i + right + 1"),
}  # fmt: skip


@pytest.mark.parametrize("fault", EDITS)
def test_control_every_fault_shows(fault: str) -> None:
    tensors = made(1, 90, 130, 2, 1, 16)
    broken = edited(KERNEL, *EDITS[fault])
    with pytest.raises((AssertionError, Standstill)):
        for seed in range(6):
            check(by_threads(*tensors, seed=seed, kernel=broken), *tensors)


COMPILED = """
import re, sys
sys.path.insert(0, "scripts")
from aot import aot, gluon_cases
for case in gluon_cases.aot_cases("sm_90"):
    if not case.name.startswith("bf16"):
        continue
    sass = aot.cuobjdump(aot.build(case, "sm_90").asm["cubin"], "-sass")
    # in the loop the scores are waited for with one product under way, then the values with none
    waits = list(re.finditer(r"WARPGROUP.DEPBAR.LE gsb0, (0x[01])", sass))
    between = [
        len(re.findall(r"MUFU.EX2", sass[one.end() : two.start()]))
        for one, two in zip(waits, waits[1:])
        if (one[1], two[1]) == ("0x1", "0x0")
    ]
    print(case.name, *between)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.version.hip is not None, reason="of NVIDIA's compiler")
def test_exponentials_run_beside_products(fresh_python: Any) -> None:
    """Of both consumers: all of a tile's, 64 rows of BLOCK_N keys by 128 threads."""
    lines = fresh_python("-c", COMPILED).stdout.splitlines()
    found = {name: list(map(int, counts)) for name, *counts in map(str.split, lines)}
    assert len(found) == 4 * len(gluon_launch.RINGS)
    for name, counts in found.items():
        dim = int(name.split("-D")[1].split("-")[0])
        rings = gluon_launch.WINDOW_RINGS if "window" in name else gluon_launch.RINGS
        assert len(counts) == 2 and min(counts) >= rings[dim].block_n // 2 - 4, (name, counts)


def test_what_it_refuses() -> None:
    q, k, v = made(1, 64, 64, 2, 1, 64)

    def inputs(**change: Any) -> Any:
        from hf_attn_kernels.problem import Pattern
        from hf_attn_kernels.triton.launch import Inputs

        plain: dict[str, Any] = {
            "q": q, "k": k, "v": v, "s_aux": None, "slopes": None, "bias": None, "key_mask": None,
            "cu_q": None, "cu_k": None, "seed": None, "max_q": 64, "max_k": 64,
            "pattern": Pattern(scaling=0.125),
        }  # fmt: skip
        return Inputs(**{**plain, **change})

    def refusal(x: Any, chip: str = "sm_90") -> str | None:
        return gluon_launch.refusal(x, chip)

    assert refusal(inputs()) is None
    assert refusal(inputs(), "sm_100") == "sm_100 is not Hopper"
    assert "16-bit" in str(refusal(inputs(q=q.float(), k=k.float(), v=v.float())))
    odd = torch.zeros(1, 64, 2, 68, dtype=torch.bfloat16)[..., :64]
    assert "a stride of 136 bytes" in str(refusal(inputs(q=odd)))
    mask = torch.ones(1, 64, dtype=torch.bool)
    assert refusal(inputs(key_mask=mask)) == "padding"


@pytest.mark.gpu
@pytest.mark.parametrize("dim", gluon_launch.RINGS)
@pytest.mark.parametrize(
    "how", [{}, {"right": -1}, {"left": 100}, {"left": 600, "right": 3}, {"sinks": True}], ids=str
)
def test_natively(dim: int, how: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert HAS_GPU
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    launches: list[object] = []
    run = gluon_launch.forward_launch
    monkeypatch.setattr(
        gluon_launch, "forward_launch", lambda *call: launches.append(call) or run(*call)
    )
    window = (how.get("left", -1), how.get("right", 0))
    s_aux = torch.tensor([0.5, -1.0, 3.0, 0.0]) if "sinks" in how else None
    lengths = ((512, 512), (64, 700), (333, 333), (200, 999), (300, 77), (2000, 3000))
    for q_len, k_len in lengths:
        tensors = made(2, q_len, k_len, 4, 2, dim)
        with choice.asked_for("gluon"):
            out, lse, _ = flash_attn_func(
                *(x.cuda() for x in tensors), window_size=window, return_attn_probs=True,
                s_aux=None if s_aux is None else s_aux.cuda(),
            )  # fmt: skip
        check((out, lse), *tensors, left=window[0], right=window[1], s_aux=s_aux)
    assert len(launches) == len(lengths)


def test_it_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.ruled_out("gluon")
    with choice.asked_for("gluon"):
        assert not choice.ruled_out("gluon")
        with choice.without("gluon"):
            assert choice.ruled_out("gluon")
    monkeypatch.setenv(choice.WITH, "gluon")
    assert not choice.ruled_out("gluon")
    monkeypatch.setenv(choice.WITH, "gloun")
    with pytest.raises(ValueError, match=r"HF_ATTN_TRITON_WITH names 'gloun'"):
        choice.ruled_out("gluon")
