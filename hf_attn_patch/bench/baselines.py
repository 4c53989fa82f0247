"""Who takes part in a GPU benchmark: this package and what PyTorch ships, behind one signature.

Each is `f(q, k, v, shape) -> out` on `[B, S, H, D]` tensors, laid out as a transformers projection
leaves them; the others get transposed views. One that cannot run a shape raises, and the benchmark
says so. Legend: B batch, S tokens, H heads, D head size, G query heads per KV head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .flops import attention_flops, kv_bytes
from .results import OURS, BenchRow, Environment

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One attention problem; `window` counts visible tokens to the left, the query included."""

    pass_: str  # forward | backward | decode
    batch: int
    heads_q: int
    heads_kv: int
    head_dim: int
    seq_q: int
    seq_k: int
    causal: bool = True
    window: int | None = None
    dtype: str = "bf16"

    def row(self, impl: str, env: Environment, **measured: Any) -> BenchRow:
        """The CSV row of `impl` on this shape; without a `timing` it is a plan."""
        return BenchRow(
            impl=impl,
            env=env,
            pass_=self.pass_,
            dtype=self.dtype,
            batch=self.batch,
            heads_q=self.heads_q,
            heads_kv=self.heads_kv,
            head_dim=self.head_dim,
            seq_q=self.seq_q,
            seq_k=self.seq_k,
            window=self.window,
            causal=self.causal,
            **measured,
        )

    @property
    def flops(self) -> float:
        return attention_flops(
            batch=self.batch,
            heads_q=self.heads_q,
            head_dim=self.head_dim,
            seq_q=self.seq_q,
            seq_k=self.seq_k,
            causal=self.causal,
            window=self.window,
            backward=self.pass_ == "backward",
        )

    @property
    def kv_bytes(self) -> int:
        return kv_bytes(
            batch=self.batch,
            heads_kv=self.heads_kv,
            head_dim=self.head_dim,
            seq_k=self.seq_k,
            itemsize=DTYPES[self.dtype].itemsize,
        )

    @property
    def window_size(self) -> tuple[int, int]:
        """flash-attn's way to say it: keys to the left and right, the query's own not counted."""
        left = -1 if self.window is None else self.window - 1
        return (left, -1 if self.window is None or self.causal else left)

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Random q `[B, Sq, Hq, D]` and k, v `[B, Sk, Hkv, D]`; with gradients for a backward."""
        q_shape = (self.batch, self.seq_q, self.heads_q, self.head_dim)
        kv_shape = (self.batch, self.seq_k, self.heads_kv, self.head_dim)
        make = functools.partial(
            torch.randn,
            device=device,
            dtype=DTYPES[self.dtype],
            requires_grad=self.pass_ == "backward",
        )
        return make(q_shape), make(kv_shape), make(kv_shape)

    def __str__(self) -> str:
        window = "" if self.window is None else f" W{self.window}"
        return (
            f"{self.pass_} {self.dtype} B{self.batch} H{self.heads_q}/{self.heads_kv} "
            f"D{self.head_dim} {self.seq_q}x{self.seq_k}{' causal' if self.causal else ''}{window}"
        )


Attention = Callable[[Tensor, Tensor, Tensor, Shape], Tensor]


@dataclass(frozen=True)
class Ours:
    """This package's `flash_attn_func`, by some of its Triton kernels' ways and not by others."""

    asked_for: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    deterministic: bool = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
        from hf_attn_kernels import flash_attn_func

        out = flash_attn_func(
            q, k, v, causal=shape.causal, window_size=shape.window_size,
            deterministic=self.deterministic,
        )  # fmt: skip
        assert isinstance(out, Tensor)  # a tuple only when the LSE is asked for
        return out

    @contextmanager
    def around(self) -> Iterator[None]:
        """What says so; the backward, which runs later, needs it too."""
        if not self.without and not self.asked_for:
            yield
            return
        from hf_attn_kernels.triton.options import asked_for, without

        with asked_for(*self.asked_for), without(*self.without):
            yield


ours = Ours()


def ours_kvcache(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """This package's `flash_attn_with_kvcache` on a contiguous cache that is full."""
    from hf_attn_kernels import flash_attn_with_kvcache

    window = shape.window_size
    out = flash_attn_with_kvcache(q, k, v, causal=shape.causal, window_size=window)
    assert isinstance(out, Tensor)
    return out


def eager(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """transformers' eager attention: K/V repeated, scores in the dtype, softmax in float32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    group = shape.heads_q // shape.heads_kv
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * shape.head_dim**-0.5
    mask = dense_mask(shape, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    wide = torch.promote_types(q.dtype, torch.float32)  # the gate runs this in float64 too
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, shape: Shape, backend: SDPBackend | None) -> Tensor:
    """PyTorch's SDPA, one backend forced when given, without a mask where it can do without."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    square = shape.seq_q == shape.seq_k
    is_causal = shape.causal and square and shape.window is None
    call = functools.partial(
        F.scaled_dot_product_attention,
        q,
        k,
        v,
        attn_mask=None if is_causal else dense_mask(shape, q.device),
        is_causal=is_causal,
        enable_gqa=shape.heads_q != shape.heads_kv,
    )
    if backend is None:
        return call().transpose(1, 2)
    with sdpa_kernel(backend):
        return call().transpose(1, 2)


def transformers_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool = True
) -> Tensor:
    """What ``attn_implementation="sdpa"`` runs: KV heads repeated wherever there is a mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module: Any = SimpleNamespace(num_key_value_groups=q.shape[2] // k.shape[2], is_causal=causal)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return sdpa_attention_forward(module, q, k, v, mask)[0]


def sdpa_packed(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """SDPA for decode, the query heads of a group as rows: `[B, Hkv, G, D]`, nothing repeated."""
    if shape.seq_q != 1 or shape.window is not None:
        raise ValueError("packed heads need one query and no window")
    packed = q.view(shape.batch, shape.heads_kv, -1, shape.head_dim)
    out = F.scaled_dot_product_attention(packed, k.transpose(1, 2), v.transpose(1, 2))
    return out.reshape(q.shape)


def flex(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """FlexAttention compiled for this very shape."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"enable_gqa": shape.heads_q != shape.heads_kv}
    out: Tensor = _compiled_flex()(q, k, v, block_mask=_block_mask(shape, q.device), **options)
    return out.transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


@functools.lru_cache(maxsize=1)
def _block_mask(shape: Shape, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    if not shape.causal and shape.window is None:
        return None
    shift, window, causal = shape.seq_k - shape.seq_q, shape.window, shape.causal

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        back = i + shift - j
        keep = back >= 0 if causal else back == back
        return keep if window is None else keep & (back.abs() < window)

    size = {"Q_LEN": shape.seq_q, "KV_LEN": shape.seq_k, "device": str(device)}
    return create_block_mask(visible, B=None, H=None, **size)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1)
def dense_mask(shape: Shape, device: torch.device) -> Tensor | None:
    """`[Sq, Sk]` bool, True = visible; None where all is."""
    if shape.window is None and (not shape.causal or shape.seq_q == 1):
        return None
    rows = torch.arange(shape.seq_q, device=device)[:, None] + shape.seq_k - shape.seq_q
    back = rows - torch.arange(shape.seq_k, device=device)
    keep = back >= 0 if shape.causal else torch.ones_like(back, dtype=torch.bool)
    return keep if shape.window is None else keep & (back.abs() < shape.window)


def _forced(backend: SDPBackend | None) -> Attention:
    return functools.partial(sdpa, backend=backend)


# what the tables of the kernels chose, beside what they chose against
WAYS: dict[str, Attention] = {
    f"{OURS}:pointers": Ours(without=("descriptors",)),
    f"{OURS}:head-by-head": Ours(without=("heavy_first",)),
}
HOPPER: dict[str, Attention] = {f"{OURS}:gluon": Ours(asked_for=("gluon",))}
SUMS: dict[str, Attention] = {f"{OURS}:nondeterministic": Ours(deterministic=False)}
PREFILL: dict[str, Attention] = {
    OURS: ours,
    "sdpa_cudnn": _forced(SDPBackend.CUDNN_ATTENTION),
    "sdpa_flash": _forced(SDPBackend.FLASH_ATTENTION),
    "sdpa_efficient": _forced(SDPBackend.EFFICIENT_ATTENTION),
    "flex_compiled": flex,
    "eager": eager,
}
DECODE: dict[str, Attention] = {
    OURS: ours_kvcache,
    "sdpa_packed": sdpa_packed,
    "sdpa_cudnn": _forced(SDPBackend.CUDNN_ATTENTION),
    "sdpa_flash": _forced(SDPBackend.FLASH_ATTENTION),
    "flex_compiled": flex,
    "eager": eager,
}
