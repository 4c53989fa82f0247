"""The Triton operator inside torch: opcheck, torch.compile, layouts, and what the door refuses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_attn_kernels import (
    backend_name,
    flash_attn_func,
    flash_attn_varlen_func,
    use_backend,
)
from hf_attn_kernels.reference import attention_reference

Backend = Callable[[], AbstractContextManager[None]]


def qkv(device: torch.device, *, seq: int = 20, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        torch.randn(1, seq, heads, 16, dtype=dtype, device=device, requires_grad=True)
        for heads in (2, 1, 1)
    ]


def test_opcheck(device: torch.device, triton_backend: Backend) -> None:
    from hf_attn_kernels.triton.op import attention_forward

    bias = torch.randn(1, 2, 20, 20, device=device, requires_grad=True)
    s_aux = torch.randn(2, device=device, requires_grad=True)
    numbers = (0, 0, 0.25, 7, 0, 0.0, 0, 0.0)
    absent = (None,) * 4
    with triton_backend():
        torch.library.opcheck(
            attention_forward,
            (*qkv(device), s_aux, None, bias, *absent, *numbers),
            test_utils=(
                "test_schema", "test_autograd_registration", "test_faketensor",
                "test_aot_dispatch_static",
            ),
        )  # fmt: skip


@pytest.mark.parametrize("seq", [20, 1], ids=["prefill", "decode"])
def test_compiles_as_one_graph(device: torch.device, triton_backend: Backend, seq: int) -> None:
    q, k, v = qkv(device)
    q = q[:, :seq].detach().requires_grad_(seq > 1)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q * 1.5, k, v, causal=True, window_size=(7, 0))
        assert isinstance(out, Tensor)
        return out * 2

    with triton_backend():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        if seq > 1:
            got, want = compiled(q, k, v), layer(q, k, v)
            grads = [torch.autograd.grad(x.sum(), (q, k, v)) for x in (got, want)]
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b)
        else:
            with torch.no_grad():
                got, want = compiled(q, k, v), layer(q, k, v)
    torch.testing.assert_close(got, want)


def test_compiles_with_dropout(device: torch.device, triton_backend: Backend) -> None:
    with triton_backend():
        compiled = torch.compile(
            lambda q, k, v: flash_attn_func(q, k, v, 0.5), fullgraph=True, backend="aot_eager"
        )
        out = compiled(*qkv(device))
        assert bool(torch.isfinite(out).all())
        out.sum().backward()


def test_gradcheck_in_float32(device: torch.device, triton_backend: Backend) -> None:
    """Against finite differences, which know nothing of the oracle."""
    leaves = [t.detach().requires_grad_() for t in qkv(device, seq=3)]
    with triton_backend():
        assert torch.autograd.gradcheck(
            lambda q, k, v: flash_attn_func(q, k, v, causal=True), leaves, eps=1e-2, atol=2e-3,
            rtol=2e-2, nondet_tol=0.0,
        )  # fmt: skip


def test_transposed_layouts_need_no_copy(device: torch.device, triton_backend: Backend) -> None:
    """transformers' ``[B, H, S, D]`` tensors are passed as transposed views."""
    q, k, v = (t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(device))
    assert not q.is_contiguous()
    with triton_backend():
        out = flash_attn_func(q, k, v)
    want, _ = attention_reference(q, k, v)
    torch.testing.assert_close(out, want.float(), rtol=1e-4, atol=1e-5)


def _call(device: torch.device, **changes: Any) -> object:
    made = dict(zip(("q", "k", "v"), (t.detach() for t in qkv(device)), strict=True))
    made |= {name: make(device) for name, make in changes.items() if callable(make)}
    plain = {name: value for name, value in changes.items() if not callable(value)}
    return flash_attn_func(**made, **plain)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[torch.device], Tensor]:
    return lambda device: torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": tensor(1, 20, 2, 16, dtype=torch.int32)}, r"share one dtype"),
        ({n: tensor(1, 20, 2, 16, dtype=torch.int32) for n in "qkv"}, r"int32.*possible: float16"),
        ({n: tensor(1, 20, 1, 640) for n in "qkv"}, r"head_dim 640.*1 to 512.*sdpa"),
        ({"q": tensor(20, 2, 16)}, r"q must be \[batch, length, heads, head_dim\], got"),
        ({"q": tensor(1, 20, 3, 16), "k": tensor(1, 20, 2, 16), "v": tensor(1, 20, 2, 16)},
         r"3 query heads cannot be shared by 2"),
        ({"v": tensor(1, 19, 1, 16)}, r"k and v must agree"),
        ({"q": tensor(2, 20, 2, 16)}, r"batch 2.*have 1"),
        ({"k": tensor(1, 20, 1, 24)}, r"head_dim 16 and k has 24"),
        ({"s_aux": tensor(3)}, r"s_aux must be \[2\]"),
        ({"alibi_slopes": tensor(3)}, r"alibi_slopes must be \[2\]"),
        ({"alibi_slopes": tensor(2, dtype=torch.float16)}, r"alibi_slopes must be float32"),
        ({"bias": tensor(1, 2, 20, 19)}, r"bias must be \[1\|1, 1\|2, 1\|20, 20\]"),
        ({"bias": tensor(1, 2, 20, 20, dtype=torch.int64)}, r"bias must be bool.*got torch.int64"),
        ({"key_padding_mask": tensor(1, 20)}, r"key_padding_mask must be bool \[1, 20\]"),
        ({"key_padding_mask": tensor(1, 9, dtype=torch.bool)}, r"key_padding_mask must be bool"),
        ({"softmax_scale": float("nan")}, r"softmax_scale must be positive and finite, got nan"),
        ({"softmax_scale": -1.0}, r"softmax_scale must be positive"),
        ({"softcap": -1.0}, r"softcap must be 0"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"window_size": (1, 2, 3)}, r"window_size is a pair"),
        ({"sink_tokens": -1}, r"sink_tokens must be 0 or more"),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x),
)  # fmt: skip
def test_the_door(device: torch.device, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _call(device, **changes)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (torch.tensor([0, float("nan"), 20.0]), r"1-D int32 tensor"),
        (torch.tensor([0, 12, 9, 20], dtype=torch.int32), r"never fall"),
        (torch.tensor([0, 21], dtype=torch.int32), r"end at or before the 20 tokens"),
        (torch.tensor([1, 20], dtype=torch.int32), r"must start at 0"),
        (torch.tensor([[0, 20]], dtype=torch.int32), r"1-D int32 tensor"),
    ],
    ids=["nan", "falling", "too-long", "start", "rank"],
)
def test_the_door_of_packed_calls(offsets: Tensor, message: str) -> None:
    q, k, v = (t.detach()[0] for t in qkv(torch.device("cpu")))
    good = torch.tensor([0, 20], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(q, k, v, offsets, good, 20, 20)
    with pytest.raises(ValueError, match=r"k must be \[pages, page_size"):
        flash_attn_varlen_func(q, k, v, good, good, 20, 20, block_table=good[None])


def test_devices_and_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'meta'; possible devices: cuda, xpu, cpu"):
        backend_name(torch.device("meta"))
    unknown = pytest.raises(ValueError, match=r"'cutlass' does not exist; possible: triton, cpu")
    with unknown, use_backend("cutlass"):
        pass
    with use_backend("triton"), monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            backend_name(torch.device("cpu"))
    monkeypatch.setattr("hf_attn_kernels.device.triton_installed", lambda: False)
    with pytest.raises(ImportError, match=r"hf-attn-patch\[gpu\]"):
        backend_name(torch.device("cuda"))


@pytest.mark.parametrize(("capability", "chip"), [
    ((8, 0), "sm_80"), ((8, 6), "sm_89"), ((8, 9), "sm_89"), ((9, 0), "sm_90"),
    ((10, 0), "sm_100"), ((12, 0), "sm_89"),
])  # fmt: skip
def test_every_capability_has_tiles(capability: tuple[int, int], chip: str) -> None:
    from hf_attn_kernels.triton.config import JOINT_HEAD_DIM, KERNELS, chip_of_capability, tiles

    assert chip_of_capability(*capability) == chip
    for kernel in KERNELS:
        head_dim = JOINT_HEAD_DIM if kernel == "joint" else 256
        for itemsize, tma in ((2, False), (2, True), (4, False)):
            assert tiles(kernel, chip, itemsize, head_dim, tma=tma).num_warps in (4, 8)


def test_the_rows_of_special_calls() -> None:
    """A row of its own for each kind of call where there is one, else the nearest."""
    from hf_attn_kernels.triton.config import TABLE, tiles

    row = TABLE["sm_90"]

    def first(kernel: str, **how: Any) -> object:
        return tiles(kernel, "sm_90", 2, 64, **how)

    assert first("forward", tma=True) == row["forward tma"][2][0]
    assert first("forward", tma=True, kind="window") == row["forward tma window"][2][0]
    assert first("forward", tma=True, kind="heavy") == row["forward tma heavy"][2][0]
    assert first("forward", kind="window") == row["forward heavy"][2][0]
    assert first("dq", tma=True, kind="heavy") == row["dq tma"][2][0]
    assert first("bias_grad", tma=True, kind="heavy") == row["bias_grad"][2][0]
    assert tiles("forward", "sm_90", 4, 64, tma=True, kind="heavy") == row["forward"][4][0]
    assert tiles("forward", "sm_80", 2, 64, tma=True) == TABLE["sm_80"]["forward"][2][0]


def test_tiles_refuse_what_they_cannot_hold() -> None:
    from hf_attn_kernels.triton.config import chip_of_capability, tiles

    with pytest.raises(ValueError, match=r"capability 7.5 is not supported"):
        chip_of_capability(7, 5)
    with pytest.raises(ValueError, match=r"dq supports head_dim up to 256, got 300"):
        tiles("dq", "sm_90", 2, 300)
