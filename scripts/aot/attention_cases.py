"""The calls whose kernels are compiled ahead of time: every tile of the table, every feature."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_attn_kernels.problem import Pattern
from hf_attn_kernels.triton.backward_launch import Gradients, backward_launches, serves_joint
from hf_attn_kernels.triton.config import COPY_ENGINE
from hf_attn_kernels.triton.forward_launch import Outputs, forward_launch
from hf_attn_kernels.triton.launch import Inputs, Launch
from hf_attn_kernels.triton.options import without

from .aot import AotCase, case_of


@dataclass(frozen=True, kw_only=True)
class Call:
    """A kind of call. The sizes only matter to Triton in being multiples of 16."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    head_dim_v: int | None = None
    heads_q: int = 32
    heads_kv: int = 8
    causal: bool = True
    window: int = -1
    softcap: float = 0.0
    sink_tokens: int = 0
    dropout_p: float = 0.0
    s_aux: bool = False
    alibi: bool = False
    bias: str = ""  # "", "bool" or "added"
    padded: bool = False
    packed: bool = False
    backward: bool = True
    without: tuple[str, ...] = ()  # ways that are ruled out, so that the next one is compiled


_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# tiles: each dtype with each head_dim of the table, and the odd ones between
_DIMS = tuple(
    Call(name=f"{_NAMES[dtype]}-D{dim}-{'causal' if causal else 'full'}", dtype=dtype,
         head_dim=dim, causal=causal, backward=dim <= 256)
    for dtype, dims in (
        (torch.bfloat16, (64, 80, 96, 128, 256, 512)),
        (torch.float16, (64, 128, 256)),
        (torch.float32, (64, 128, 256)),
    )
    for dim in dims
    for causal in ((True, False) if dtype == torch.bfloat16 and dim != 512 else (True,))
)  # fmt: skip
# features: one at a time on the commonest shape, and together as models ask for them
_FEATURES = (
    Call(name="bf16-D192-DV128-causal", head_dim=192, head_dim_v=128, heads_kv=32),
    Call(name="bf16-D128-mha", heads_kv=32),
    Call(name="bf16-D128-mqa", heads_kv=1),
    Call(name="bf16-D128-window", window=511),
    Call(name="bf16-D128-window-sinks", window=511, sink_tokens=4),
    Call(name="bf16-D128-padded", padded=True),
    Call(name="bf16-D128-packed", packed=True),
    Call(name="bf16-D128-dropout", dropout_p=0.1),
    Call(name="bf16-D128-alibi", alibi=True),
    Call(name="bf16-D128-bool-mask", causal=False, bias="bool"),
    Call(name="bf16-D64-added-bias", head_dim=64, heads_kv=32, causal=False, bias="added"),
    Call(name="bf16-D64-window", head_dim=64, window=511),
    Call(name="bf16-D64-s_aux-window", head_dim=64, window=127, s_aux=True),
    Call(name="bf16-D256-softcap-window", head_dim=256, window=4095, softcap=50.0),
)
# what serves calls that the copy engine cannot: each of the tiles, and the heaviest features
_POINTERS = tuple(
    replace(call, name=f"{call.name}-pointers", without=("descriptors",))
    for call in _DIMS + _FEATURES
    if call.dtype == torch.bfloat16
    and not (call.padded or call.packed or call.head_dim in (80, 96))
)
CALLS = _DIMS + _FEATURES + _POINTERS


def inputs(call: Call) -> Inputs:
    """The tensors of a call, without storage."""
    batch, length = 4, 4096
    dim_v = call.head_dim_v or call.head_dim

    def tensor(heads: int, dim: int) -> Tensor:
        lead = (batch * length,) if call.packed else (batch, length)
        return torch.empty(*lead, heads, dim, dtype=call.dtype, device="meta")

    def maybe(wanted: bool, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device="meta") if wanted else None

    bias_dtype = torch.bool if call.bias == "bool" else call.dtype
    return Inputs(
        q=tensor(call.heads_q, call.head_dim),
        k=tensor(call.heads_kv, call.head_dim),
        v=tensor(call.heads_kv, dim_v),
        s_aux=maybe(call.s_aux, (call.heads_q,), call.dtype),
        slopes=maybe(call.alibi, (1, call.heads_q), torch.float32),
        bias=maybe(bool(call.bias), (1, call.heads_q, length, length), bias_dtype),
        key_mask=maybe(call.padded, (batch, length), torch.bool),
        cu_q=maybe(call.packed, (batch + 1,), torch.int32),
        cu_k=maybe(call.packed, (batch + 1,), torch.int32),
        seed=maybe(call.dropout_p > 0, (1,), torch.int64),
        max_q=length,
        max_k=length,
        pattern=Pattern(
            scaling=call.head_dim**-0.5,
            window_left=call.window,
            window_right=0 if call.causal else -1,
            softcap=call.softcap,
            sink_tokens=call.sink_tokens,
            dropout_p=call.dropout_p,
        ),
    )


def launches(call: Call, chip: str) -> list[Launch]:
    """Every kernel of a call, forward first, on tensors without storage."""
    x = inputs(call)
    o = Outputs.of(x)
    with without(*call.without):
        found = [forward_launch(x, o, chip)]
        if not call.backward:
            return found
        dbias = None
        if x.bias is not None and x.bias.dtype != torch.bool:
            dbias = torch.empty(x.bias.shape, dtype=torch.float32, device="meta")
        grads = Gradients(x.q, x.k, x.v, dbias)
        found += backward_launches(x, o, o.out, None, o.lse, grads, chip)
        if serves_joint(x.shape):
            dq_sum = torch.empty(x.q.shape, dtype=torch.float32, device="meta")
            grads = replace(grads, dbias=None, dq_sum=dq_sum)
            found += backward_launches(x, o, o.out, None, o.lse, grads, chip)[1:]
    return found


def aot_cases(arch: str) -> list[AotCase]:
    """Cases of the forward and backward kernels with the tiles of `arch`."""
    return [
        case_of(launch, call.name)
        for call in CALLS
        if arch in COPY_ENGINE or not call.without
        for launch in launches(call, arch)
    ]
