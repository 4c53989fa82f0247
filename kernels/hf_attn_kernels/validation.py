"""Checks at the door: shapes, dtypes and devices, before anything is launched.

Every message says what was got, what is possible and, where there is one, the way out. Nothing here
reads a tensor's values on a GPU (that would wait for the device); on the CPU the packed lengths are
read too, because there it costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .problem import UNBOUNDED, Pattern, Problem

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALL_FLOATS = (*FLOAT_DTYPES, torch.float64)  # on the CPU
MAX_HEAD_DIM = 512
MAX_HEAD_DIM_BACKWARD = 256


def check_pattern(
    head_dim: int,
    *,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    sink_tokens: int,
    dropout_p: float,
) -> Pattern:
    """Checked numbers, with causal folded into the window."""
    if len(window_size) != 2:
        raise ValueError(
            f"window_size is a pair (left, right), -1 for unbounded; got {window_size!r}"
        )
    left, right = (UNBOUNDED if side < 0 else int(side) for side in window_size)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if not 0 <= softcap < math.inf:  # math.isfinite is none of torch.compile's functions
        raise ValueError(f"softcap must be 0 (off) or a positive finite number, got {softcap}")
    # a head_dim of 0 is refused by name later on
    scaling = max(head_dim, 1) ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not 0 < scaling < math.inf:
        raise ValueError(f"softmax_scale must be positive and finite, got {softmax_scale}")
    if sink_tokens < 0:
        raise ValueError(f"sink_tokens must be 0 or more, got {sink_tokens}")
    return Pattern(
        scaling=scaling,
        window_left=left,
        window_right=0 if causal else right,
        softcap=float(softcap),
        sink_tokens=0 if left == UNBOUNDED else int(sink_tokens),
        dropout_p=float(dropout_p),
    )


def check_problem(p: Problem) -> None:
    """Raise ValueError unless every tensor of `p` fits the others."""
    rank = 3 if p.packed else 4
    layout = "[total, heads, head_dim]" if p.packed else "[batch, length, heads, head_dim]"
    for name, t in (("q", p.q), ("k", p.k), ("v", p.v)):
        if t.dim() != rank:
            raise ValueError(f"{name} must be {layout}, got shape {tuple(t.shape)}")
    check_dtypes(p.q, p.k, p.v)
    check_heads(p.q, p.k, p.v)
    if p.k.shape[:-1] != p.v.shape[:-1]:
        raise ValueError(
            f"k and v must agree in all but head_dim, got {tuple(p.k.shape)} and {tuple(p.v.shape)}"
        )
    if p.packed:
        batch = _check_cu_seqlens(p)
        max_q, max_k = p.max_seqlen_q, p.max_seqlen_k
    else:
        batch, max_q, max_k = p.q.shape[0], p.q.shape[1], p.k.shape[1]
        if p.k.shape[0] != batch:
            raise ValueError(
                f"q has batch {batch}, k and v have {p.k.shape[0]}; they must be equal"
            )
    _check_extras(p, batch, max_q, max_k)


def values_readable(t: Tensor) -> bool:
    """Whether looking at values costs nothing: on the CPU, unless torch.compile or a fake mode
    traces, where there are none."""
    return t.is_cpu and type(t) is Tensor and not torch.compiler.is_compiling()


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Head counts divide, head_dim is shared by q and k and within the limit."""
    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    if heads_kv == 0 or heads_q % heads_kv:
        raise ValueError(
            f"{heads_q} query heads cannot be shared by {heads_kv} key/value heads; "
            "the number of key/value heads must divide the number of query heads"
        )
    if v.shape[-2] != heads_kv:
        raise ValueError(f"k has {heads_kv} heads and v has {v.shape[-2]}; they must be equal")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q has head_dim {q.shape[-1]} and k has {k.shape[-1]}; they must be equal"
        )
    for name, dim in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim {dim} of {name} is not supported; possible: 1 to {MAX_HEAD_DIM}. "
                "Use attn_implementation='sdpa' for this model."
            )
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if (
        needs_grad
        and q.device.type != "cpu"
        and max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM_BACKWARD
    ):
        raise ValueError(
            f"backward supports head_dim up to {MAX_HEAD_DIM_BACKWARD}, got "
            f"{max(q.shape[-1], v.shape[-1])}; wrap inference in torch.no_grad(), or train with "
            "attn_implementation='sdpa'"
        )


def check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    allowed = ALL_FLOATS if q.device.type == "cpu" else FLOAT_DTYPES
    if q.dtype not in allowed:
        raise ValueError(
            f"dtype {q.dtype} is not supported on {q.device.type!r}; possible: "
            + ", ".join(str(d).removeprefix("torch.") for d in allowed)
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}"
        )


def _check_cu_seqlens(p: Problem) -> int:
    assert p.cu_seqlens_q is not None  # what makes it packed
    if p.cu_seqlens_k is None:
        raise ValueError("a packed call needs cu_seqlens_k as well as cu_seqlens_q")
    for name, cu, total in (
        ("cu_seqlens_q", p.cu_seqlens_q, p.q.shape[0]),
        ("cu_seqlens_k", p.cu_seqlens_k, p.k.shape[0]),
    ):
        if cu.dim() != 1 or cu.dtype != torch.int32 or cu.numel() < 1:
            raise ValueError(
                f"{name} must be a 1-D int32 tensor of sequences + 1 offsets, got "
                f"{tuple(cu.shape)} {cu.dtype}"
            )
        if cu.device != p.q.device:
            raise ValueError(f"{name} must be on {p.q.device}, got {cu.device}")
        if values_readable(cu):
            check_offsets(name, cu.tolist(), total)
    if p.cu_seqlens_q.numel() != p.cu_seqlens_k.numel():
        raise ValueError(
            f"cu_seqlens_q describes {p.cu_seqlens_q.numel() - 1} sequences and cu_seqlens_k "
            f"{p.cu_seqlens_k.numel() - 1}; they must be equal"
        )
    return p.cu_seqlens_q.numel() - 1


def check_offsets(name: str, offsets: list[int], total: int) -> list[int]:
    """The offsets, which start at 0, never fall and end within `total`."""
    rising = all(a <= b for a, b in pairwise(offsets))
    if offsets[0] != 0 or not rising or offsets[-1] > total:
        raise ValueError(
            f"{name} must start at 0, never fall and end at or before the {total} tokens given; "
            f"got {offsets[:8]}{' ...' if len(offsets) > 8 else ''}"
        )
    return offsets


def _check_extras(p: Problem, batch: int, max_q: int, max_k: int) -> None:
    heads_q, device = p.q.shape[-2], p.q.device
    if p.s_aux is not None and tuple(p.s_aux.shape) != (heads_q,):
        raise ValueError(f"s_aux must be [{heads_q}] (query heads), got {tuple(p.s_aux.shape)}")
    if p.alibi_slopes is not None:
        check_alibi(p.alibi_slopes, batch, heads_q)
    if p.key_padding_mask is not None:
        mask = p.key_padding_mask
        if mask.dtype != torch.bool or tuple(mask.shape) != (batch, max_k):
            raise ValueError(
                f"key_padding_mask must be bool [{batch}, {max_k}] (batch, keys; True = keep), got "
                f"{mask.dtype} {tuple(mask.shape)}"
            )
    if p.bias is not None:
        _check_bias(p.bias, batch, heads_q, max_q, max_k)
    for name in ("s_aux", "alibi_slopes", "key_padding_mask", "bias"):
        t = getattr(p, name)
        if t is not None and t.device != device:
            raise ValueError(f"{name} must be on {device}, got {t.device}")


def _check_bias(bias: Tensor, batch: int, heads_q: int, max_q: int, max_k: int) -> None:
    full = (batch, heads_q, max_q, max_k)
    fits = bias.dim() == 4 and bias.shape[3] == max_k
    fits = fits and all(
        have in (1, want) for have, want in zip(bias.shape[:3], full[:3], strict=True)
    )
    if not fits:
        raise ValueError(
            f"bias must be [1|{batch}, 1|{heads_q}, 1|{max_q}, {max_k}] (batch, query heads, "
            f"queries, keys), got {tuple(bias.shape)}"
        )
    if bias.dtype != torch.bool and not bias.is_floating_point():
        raise ValueError(
            f"bias must be bool (True = keep) or floating point (added), got {bias.dtype}"
        )


def check_alibi(slopes: Tensor, batch: int, heads_q: int) -> None:
    """alibi_slopes is [Hq] or [B, Hq], float32 (FlashAttention-2's contract)."""
    if tuple(slopes.shape) not in ((heads_q,), (batch, heads_q), (1, heads_q)):
        raise ValueError(
            f"alibi_slopes must be [{heads_q}] or [{batch}, {heads_q}], got {tuple(slopes.shape)}"
        )
    if slopes.dtype != torch.float32:
        raise ValueError(f"alibi_slopes must be float32, got {slopes.dtype}")
