"""Attention of few queries over many keys: split-KV over a contiguous or paged cache.

All query heads of a KV head, and all new tokens, share the rows of one tile, so K and V are read
once per KV head ("GQA packed into M"). The keys are cut into splits that run side by side, and a
second kernel combines them (Flash-Decoding). Grid and number of splits depend on shapes only, never
on the lengths in device memory: nothing waits for the device and a CUDA graph can capture it.

Shape letters: B batch, Q queries, Hq / Hkv query / KV heads, G = Hq / Hkv, K keys a row may have,
D / Dv head_dim of q, k / v.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..launch_cache import learn
from ..namespace import NAMESPACE, OPS
from ..problem import CacheProblem, NewKeys, Pattern, Problem, Rotary
from .append import append_launch
from .config import chip_of
from .decode_config import processors
from .decode_launch import Cache, launches, new_outputs
from .launch import Launch
from .launch_plan import CachePlan, Ready

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DENSE_MAX_ROWS = 16  # Q * G: one tile; beyond it the forward kernel's larger tiles do better


def attention_with_cache(problem: CacheProblem) -> tuple[Tensor, Tensor]:
    """Run `problem` on Triton: new keys are written in place first.

    Returns:
        out ``[B, Q, Hq, Dv]`` (packed ``[T, Hq, Dv]``) and the natural log-sum-exp ``[B, Hq, Q]``
        (packed ``[Hq, T]``) float32. Rows without a visible key are zeros and -inf (or s_aux). Not
        differentiable.

    Raises:
        ValueError: the dtype is not one of DTYPES.
    """
    p = problem
    _check_dtype(p.q)
    if torch.compiler.is_compiling() or type(p.q) is not Tensor:  # or a fake mode traces
        return _by_operators(p)
    lengths = p.seqlens_k if p.cu_seqlens_k is None else p.cu_seqlens_k
    x = Cache(
        q=p.q, k=p.k_cache, v=p.v_cache, seqlens=lengths, cu_q=p.cu_seqlens_q,
        block_table=p.block_table, batch_idx=p.batch_idx, leftpad=p.leftpad, s_aux=p.s_aux,
        slopes=p.alibi_slopes, k_descale=p.k_descale, v_descale=p.v_descale,
        new_keys=0 if p.new is None else p.new.k.shape[1], max_q=p.max_seqlen_q,
        max_k=p.max_seqlen_k,
    )  # fmt: skip
    with on(p.q.device):
        append = compiled = None
        if p.new is not None:
            append, turned = append_launch(x, p.new)
            compiled = append.run()
            x = x if turned is None else replace(x, q=turned)
        out, lse, done = _run(x, p.pattern, p.num_splits)
    skipped = p.new is not None and compiled is None  # there was nothing to write
    if p.call is not None and done and done[0][1] is not None and not skipped and p.as_given:
        decode, *reduce = [Ready.of(*pair) for pair in done]
        partial = done[0][0].arguments["partial"]
        plan = CachePlan(
            append=None if append is None else Ready.of(append, compiled),
            turns=p.new is not None and p.new.rotary is not None,
            decode=decode,
            reduce=reduce[0] if reduce else None,
            partial=0 if partial is None else partial.numel(),
        )
        learn(p.call, plan)
    return out, lse


def _by_operators(p: CacheProblem) -> tuple[Tensor, Tensor]:
    """The same as two operators, which torch.compile can see."""
    q, new = p.q, p.new
    if new is not None:
        rotary = new.rotary
        turn = (None, None) if rotary is None else (rotary.cos, rotary.sin)
        turned = OPS.append(
            q, new.k, new.v, p.k_cache, p.v_cache, p.seqlens_k, p.block_table, p.batch_idx,
            p.k_descale, p.v_descale, *turn, rotary is not None and rotary.interleaved,
            rotary is not None and rotary.ordered,
        )  # fmt: skip
        q = q if rotary is None else turned
    out, lse = OPS.decode(
        q, p.k_cache, p.v_cache, p.seqlens_k if p.cu_seqlens_k is None else p.cu_seqlens_k,
        p.cu_seqlens_q, p.block_table, p.batch_idx, p.leftpad, None, p.s_aux, p.alibi_slopes,
        p.k_descale, p.v_descale, 0 if new is None else new.k.shape[1], p.max_seqlen_q,
        p.max_seqlen_k, *_numbers(p.pattern), p.num_splits,
    )  # fmt: skip
    return out, lse


def _numbers(pattern: Pattern) -> tuple[float, int, int, float, int]:
    return (
        pattern.scaling, pattern.window_left, pattern.window_right, pattern.softcap,
        pattern.sink_tokens,
    )  # fmt: skip


def serves_dense(problem: Problem) -> bool:
    """Whether `decode_dense` can stand in for the forward kernel, and should."""
    p = problem
    if p.packed or p.bias is not None or p.pattern.dropout_p > 0:
        return False
    given = (p.q, p.k, p.v, p.s_aux)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return False
    rows = p.q.shape[1] * (p.q.shape[2] // p.k.shape[2])
    return rows <= DENSE_MAX_ROWS and p.q.dtype in DTYPES


def decode_dense(problem: Problem) -> tuple[Tensor, Tensor]:
    """A dense `problem` that `serves_dense`, over keys given whole; same results as the forward."""
    p, leftpad, slopes = problem, None, problem.alibi_slopes
    if p.pattern.sink_tokens and p.key_padding_mask is not None:
        # sinks count from the first kept key; an all-False row gets 0, where its mask hides all
        leftpad = p.key_padding_mask.to(torch.int32).argmax(dim=1).to(torch.int32)
    slopes = slopes[None] if slopes is not None and slopes.dim() == 1 else slopes
    _check_dtype(p.q)
    out, lse = OPS.decode(
        p.q, p.k, p.v, None, None, None, None, leftpad, p.key_padding_mask, p.s_aux, slopes, None,
        None, 0, 0, 0, *_numbers(p.pattern), 0,
    )  # fmt: skip
    return out, lse


def _check_dtype(q: Tensor) -> None:
    if q.dtype not in DTYPES:
        raise ValueError(
            f"dtype {q.dtype} is not supported by the Triton decode kernel; possible: "
            + ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        )


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; switching costs microseconds, so only where needed."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return contextlib.nullcontext()


def _decode(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, cu_q: Tensor | None,
    block_table: Tensor | None, batch_idx: Tensor | None, leftpad: Tensor | None,
    key_mask: Tensor | None, s_aux: Tensor | None, slopes: Tensor | None,
    k_descale: Tensor | None, v_descale: Tensor | None, new_keys: int, max_q: int, max_k: int,
    scaling: float, left: int, right: int, softcap: float, sink_tokens: int, num_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = Cache(
        q=q, k=k, v=v, seqlens=seqlens, cu_q=cu_q, block_table=block_table, batch_idx=batch_idx,
        leftpad=leftpad, key_mask=None if key_mask is None else key_mask.contiguous(),
        s_aux=None if s_aux is None else s_aux.contiguous(),
        slopes=None if slopes is None else slopes.contiguous(), k_descale=k_descale,
        v_descale=v_descale, new_keys=new_keys, max_q=max_q, max_k=max_k,
    )  # fmt: skip
    pattern = Pattern(
        scaling=scaling, window_left=left, window_right=right, softcap=softcap,
        sink_tokens=sink_tokens,
    )  # fmt: skip
    with on(q.device):
        out, lse, _ = _run(x, pattern, num_splits)
    return out, lse


def _run(
    x: Cache, pattern: Pattern, num_splits: int
) -> tuple[Tensor, Tensor, list[tuple[Launch, Any]]]:
    """out, lse, and the launches with what Triton returned from them."""
    out, lse = new_outputs(x.q, x.v, packed=x.cu_q is not None)
    if out.numel() == 0 or x.batch == 0 or x.longest == 0:
        return out, lse, []
    device = x.q.device
    chip, units = chip_of(device.type, device.index), processors(device)
    steps = launches(x, pattern, num_splits, out, lse, chip, units)
    return out, lse, [(step, step.run()) for step in steps]


def _append(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor,
    block_table: Tensor | None, batch_idx: Tensor | None, k_descale: Tensor | None,
    v_descale: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool,
    ordered: bool,
) -> Tensor:  # fmt: skip
    x = Cache(
        q=q, k=k_cache, v=v_cache, seqlens=seqlens, block_table=block_table, batch_idx=batch_idx,
        k_descale=k_descale, v_descale=v_descale,
    )  # fmt: skip
    rotary = None
    if cos is not None and sin is not None:
        rotary = Rotary(cos=cos, sin=sin, interleaved=interleaved, ordered=ordered)
    launch, turned = append_launch(x, NewKeys(k=k, v=v, rotary=rotary))
    with on(q.device):
        launch.run()
    return q.new_empty(0) if turned is None else turned


# A bare Library costs a third of what custom_op does at each call, and inference needs no autograd
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_LIBRARY.define(
    "decode(Tensor q, Tensor k, Tensor v, Tensor? seqlens, Tensor? cu_q, Tensor? block_table, "
    "Tensor? batch_idx, Tensor? leftpad, Tensor? key_mask, Tensor? s_aux, Tensor? slopes, "
    "Tensor? k_descale, Tensor? v_descale, int new_keys, int max_q, int max_k, float scaling, "
    "int left, int right, float softcap, int sink_tokens, int num_splits) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "append(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor seqlens, "
    "Tensor? block_table, Tensor? batch_idx, Tensor? k_descale, Tensor? v_descale, Tensor? cos, "
    "Tensor? sin, bool interleaved, bool ordered) -> Tensor"
)
_LIBRARY.impl("decode", _decode, "CompositeExplicitAutograd")
_LIBRARY.impl("append", _append, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{NAMESPACE}::decode", lib=_LIBRARY)
def _(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, cu_q: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor]:
    return new_outputs(q, v, packed=cu_q is not None)


@torch.library.register_fake(f"{NAMESPACE}::append", lib=_LIBRARY)
def _(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape if rest[9] is not None else 0)
