"""The Triton forward and backward kernels, feature by feature, against the float64 oracle.

Without a GPU they run in Triton's interpreter. Inputs lie in a fence of NaN, fresh memory is NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from kernel_cases import Case, check, make_data, run_kernel
from torch import Tensor

Fence = Callable[[Tensor], Tensor]
Backend = Callable[[], AbstractContextManager[None]]
pytestmark = pytest.mark.usefixtures("poison_memory")

F16, BF16 = torch.float16, torch.bfloat16

LENGTHS = [
    Case(q_len=q, k_len=k, causal=causal, batch=1, note="length")
    for q, k in ((1, 1), (1, 63), (63, 63), (111, 111), (257, 257), (17, 63), (63, 17), (5, 257))
    for causal in (False, True)
]
GROUPS = [
    Case(heads_q=8, heads_kv=kv, causal=True, dtype=dtype, note="group")
    for kv in (8, 2, 1)
    for dtype in (torch.float32, BF16)
]
WINDOWS = [
    Case(q_len=111, causal=True, window=(left, 0), batch=1, note="window")
    for left in (0, 1, 16, 110, 111, 500)
] + [
    Case(q_len=63, k_len=70, window=(7, 3)),
    Case(q_len=63, k_len=63, window=(-1, 5)),
    Case(q_len=40, k_len=111, window=(5, -1)),
    Case(q_len=111, causal=True, window=(7, 0), sink_tokens=4, dtype=BF16),
    Case(q_len=63, k_len=111, causal=True, window=(20, 0), sink_tokens=1),
    Case(q_len=20, k_len=257, causal=True, window=(3, 0), sink_tokens=40, batch=1),
    Case(q_len=63, causal=True, window=(5, 0), sink_tokens=3, padding="left"),
    Case(q_len=63, causal=True, window=(5, 0), sink_tokens=3, padding="holes"),
]
HEAD_DIMS = [
    Case(q_len=40, head_dim=dim, causal=True, batch=1, dtype=BF16, heads_q=2, heads_kv=1)
    for dim in (16, 64, 72, 80, 96, 112, 128, 256)
] + [
    Case(q_len=33, head_dim=192, head_dim_v=128, causal=True, batch=1, heads_q=2, heads_kv=2),
    Case(q_len=33, head_dim=24, head_dim_v=40, batch=1),
]
SCORES = [
    Case(causal=True, softcap=5.0),
    Case(causal=True, softcap=50.0, dtype=BF16, window=(20, 0)),
    Case(causal=True, s_aux=True),
    Case(causal=True, s_aux=True, dtype=F16, window=(8, 0)),
    Case(q_len=63, k_len=17, causal=True, s_aux=True, note="empty-rows"),
    Case(causal=True, alibi="heads"),
    Case(q_len=20, k_len=63, causal=True, alibi="rows", dtype=BF16),
    Case(scale=1.0, dtype=F16),
    Case(scale=0.03, softcap=2.0, s_aux=True, alibi="heads", causal=True, window=(9, 0)),
]
BIASES = [
    Case(bias=(1, 4, 63), note="T5"),
    Case(bias=(2, 4, 63), causal=True, dtype=BF16),
    Case(bias=(2, 1, 1)),
    Case(bias=(1, 1, 63), softcap=3.0, causal=True),
    Case(bias=(1, 4, 1), q_len=111, batch=1),
    Case(bias=(2, 1, 63), bool_bias=True),
    Case(bias=(1, 1, 63), bool_bias=True, dtype=F16, causal=True),
    Case(bias=(2, 4, 1), bool_bias=True),
    Case(bias=(1, 4, 63), padding="right"),
]
PADDINGS = [
    Case(padding=kind, causal=causal, dtype=dtype)
    for kind, causal, dtype in (
        ("left", True, torch.float32), ("right", True, BF16), ("right", False, torch.float32),
        ("holes", False, torch.float32), ("holes", True, F16), ("dead", False, torch.float32),
        ("dead", True, torch.float32),
    )
] + [
    Case(padding="dead", s_aux=True),
    Case(q_len=3, k_len=63, padding="left", causal=True),
]  # fmt: skip
PACKED = [
    Case(lengths=((5, 9), (0, 1), (35, 35), (23, 18)), causal=True),
    Case(lengths=((63, 63), (1, 1), (47, 47)), causal=True, dtype=BF16, heads_kv=1),
    Case(lengths=((20, 30), (3, 0), (40, 40)), window=(6, 2)),
    Case(lengths=((20, 20), (33, 33)), causal=True, window=(6, 0), sink_tokens=2, s_aux=True),
    Case(lengths=((20, 30), (33, 12)), bias=(2, 4, 33), alibi="rows"),
    Case(lengths=((20, 20), (33, 33)), bias=(1, 1, 1), softcap=4.0),
]
DROPOUTS = [
    Case(dropout_p=0.3, causal=True),
    Case(dropout_p=0.5, q_len=40, k_len=63, s_aux=True, dtype=BF16),
    Case(dropout_p=0.2, lengths=((20, 30), (33, 12)), window=(9, 9)),
    Case(dropout_p=0.2, bias=(1, 4, 63)),
]
CASES = [
    *LENGTHS, *GROUPS, *WINDOWS, *HEAD_DIMS, *SCORES, *BIASES, *PADDINGS, *PACKED, *DROPOUTS,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(
    case: Case, device: torch.device, triton_backend: Backend, fenced: Fence
) -> None:
    with triton_backend():
        check(case, device, fenced)


def test_head_dim_512_forward(device: torch.device, triton_backend: Backend, fenced: Fence) -> None:
    case = Case(q_len=33, head_dim=512, causal=True, batch=1, heads_q=2, heads_kv=1, dtype=BF16)
    with triton_backend(), torch.no_grad():
        check(case, device, fenced, backward=False)


SHORT = [
    Case(q_len=1, k_len=111, causal=True),
    Case(q_len=3, k_len=63, causal=True, window=(9, 0), dtype=BF16, heads_kv=1),
    Case(q_len=1, k_len=63, causal=True, padding="left", softcap=4.0),
    Case(q_len=2, k_len=63, causal=True, window=(3, 0), sink_tokens=5, padding="holes"),
    Case(q_len=1, k_len=63, causal=True, padding="dead", s_aux=True, alibi="heads"),
]


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_decoding_takes_its_own_kernel(
    case: Case, device: torch.device, triton_backend: Backend, fenced: Fence
) -> None:
    """A few queries without a gradient go to the split-KV kernel, with the same results."""
    with triton_backend(), torch.no_grad():
        check(case, device, fenced, backward=False)


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        (Case(q_len=63, causal=True, window=(8, 0)), {"window_size": (9, 0)}),
        (Case(q_len=63, causal=True), {"causal": False, "window_size": (-1, 1)}),
        (Case(q_len=63, causal=True, softcap=5.0), {"softcap": 5.5}),
        (Case(q_len=63, causal=True, window=(8, 0), sink_tokens=2), {"sink_tokens": 3}),
    ],
    ids=["window+1", "diagonal+1", "softcap", "sink+1"],
)
def test_negative_control(
    case: Case, wrong: dict[str, object], device: torch.device, triton_backend: Backend,
    fenced: Fence,
) -> None:  # fmt: skip
    """The comparison has teeth: a mask shifted by one key breaks the budget."""
    with triton_backend(), pytest.raises(AssertionError, match="exceeds"):
        check(case, device, fenced, backward=False, **wrong)


def test_no_queries_and_no_keys(device: torch.device, triton_backend: Backend) -> None:
    with triton_backend():
        data = make_data(Case(q_len=5, k_len=0), device)
        out, lse = run_kernel(data)
        assert bool((out == 0).all()) and bool(torch.isneginf(lse).all())
        out.sum().backward()
        assert data.q.grad is not None and bool((data.q.grad == 0).all())
        out, _ = run_kernel(make_data(Case(q_len=0, k_len=5), device))
        assert out.shape == (2, 0, 4, 32)


def test_same_bits_twice(device: torch.device, triton_backend: Backend) -> None:
    """Forward and backward: no atomics, so two runs agree to the last bit, dropout included."""
    case = Case(q_len=63, causal=True, dropout_p=0.2, bias=(1, 4, 63), heads_kv=1, dtype=BF16)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        data = make_data(case, device)
        with triton_backend():
            torch.manual_seed(4)
            out, lse = run_kernel(data)
            out.sum().backward()
        results.append([out, lse, *(t.grad for t in data.leaves.values())])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_dropout_follows_torchs_seed(device: torch.device, triton_backend: Backend) -> None:
    case = Case(q_len=63, dropout_p=0.5)
    data = make_data(case, device)
    with triton_backend():
        outs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs.append(run_kernel(data)[0])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_tiling_does_not_matter(
    device: torch.device, triton_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dropped weights depend on the seed and the position alone, not on the chip's tiles."""
    from hf_attn_kernels.triton import config

    case = Case(q_len=63, dropout_p=0.5, causal=True)
    data = make_data(case, device)
    outs = []
    for tiles in (config.Tiles(16, 16, 4, 1), config.Tiles(64, 32, 4, 1)):
        row = {"forward": {4: (tiles,) * 4}}
        monkeypatch.setattr(config, "TABLE", dict.fromkeys(config.TABLE, row))
        torch.manual_seed(5)
        with triton_backend():
            outs.append(run_kernel(data)[0])
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31(device: torch.device) -> None:
    """A key far behind the 2**31st element is read from where it is."""
    length, dim = 2**18, 128
    k = torch.zeros(1, length, 128, dim, dtype=BF16, device=device)[:, :, :1]
    v = torch.zeros_like(k)
    q = torch.ones(1, 1, 1, dim, dtype=BF16, device=device)
    k[:, -1], v[:, -1] = 100.0, 3.0
    from hf_attn_kernels import flash_attn_func

    out = flash_attn_func(q, k, v)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out, torch.full_like(out, 3.0))


def test_every_case_is_named_once() -> None:
    names = [str(case) for case in CASES]
    assert len(names) == len(set(names)), "two cases with one name"
    assert all(dataclasses.is_dataclass(case) for case in CASES)
