"""The call as torch sees it: one opaque operator with a fake and a gradient.

Without gradients and outside ``torch.compile`` it is skipped: its dispatch costs more than a decode
step of a small model. Under ``torch.compile`` padding may stay data-dependent, because it is looked
at inside the operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..batch_invariance import batch_invariant
from ..namespace import NAMESPACE
from ..problem import Pattern, Problem
from . import blockwise, direct, extension_prefill
from .choice import choose, traits_of
from .context import sum_dtype

# arguments of the operators, in order: the tensors of a Problem, then the numbers of its Pattern
_TENSORS = (
    "q", "k", "v", "s_aux", "alibi_slopes", "bias", "key_padding_mask", "cu_seqlens_q",
    "cu_seqlens_k", "dropout_seed",
)  # fmt: skip
_NUMBERS = ("scaling", "window_left", "window_right", "softcap", "sink_tokens", "dropout_p")


def attention(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """out ``[B, Q, Hq, Dv]`` (packed ``[Tq, Hq, Dv]``) and the natural log-sum-exp, float32,
    ``[B, Hq, Q]`` (packed ``[Hq, Tq]``); differentiable. Where the problem does not need the
    log-sum-exp, None may come in its place."""
    tensors = [getattr(problem, name) for name in _TENSORS]
    traced = torch.compiler.is_compiling() or _faked(problem.q)
    if traced or _needs_grad(tensors):
        numbers = [getattr(problem.pattern, name) for name in _NUMBERS]
        lengths = (problem.max_seqlen_q, problem.max_seqlen_k)
        out, lse = cpu_attention(*tensors, *numbers, *lengths)
    else:
        out, lse = _forward(problem, need_lse=problem.need_lse)
    return out, None if lse is None else lse.to(torch.float32)


def _faked(q: Tensor) -> bool:
    """Whether a fake mode traces: no values are there to be looked at."""
    return isinstance(q, FakeTensor)


def _needs_grad(tensors: list[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _forward(problem: Problem, *, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    engine = choose(traits_of(problem)).engine
    call = blockwise.call_of(problem) if extension_prefill.takes(problem.q.shape[-3]) else None
    found = None if call is None else extension_prefill.attention(call)
    if found is None and engine == blockwise.FLASH and not batch_invariant():
        shortest = direct.attention(problem, need_lse=need_lse)
        if shortest is not None:
            return shortest
    out, lse = found or blockwise.forward(call or blockwise.call_of(problem), engine)
    return (out[0], lse[0]) if problem.packed else (out, lse)


def _problem(tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> Problem:
    return Problem(
        **dict(zip(_TENSORS, tensors, strict=True)),
        pattern=Pattern(**dict(zip(_NUMBERS, numbers[:-2], strict=True))),
        max_seqlen_q=numbers[-2],
        max_seqlen_k=numbers[-1],
    )


@torch.library.custom_op(f"{NAMESPACE}::cpu_attention", mutates_args=(), device_types="cpu")
def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, alibi_slopes: Tensor | None,
    bias: Tensor | None, key_padding_mask: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, dropout_seed: Tensor | None, scaling: float, window_left: int,
    window_right: int, softcap: float, sink_tokens: int, dropout_p: float, max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The forward; the log-sum-exp comes in the dtype of sums."""
    tensors = (
        q, k, v, s_aux, alibi_slopes, bias, key_padding_mask, cu_seqlens_q, cu_seqlens_k,
        dropout_seed,
    )  # fmt: skip
    numbers = (
        scaling, window_left, window_right, softcap, sink_tokens, dropout_p, max_seqlen_q,
        max_seqlen_k,
    )  # fmt: skip
    out, lse = _forward(_problem(tensors, numbers), need_lse=True)
    assert lse is not None  # asked for
    return out, lse


@cpu_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    rows, heads = q.shape[:-2], q.shape[-2]
    out = q.new_empty(*rows, heads, v.shape[-1])
    return out, q.new_empty(*rows[:-1], heads, rows[-1], dtype=sum_dtype(q.dtype))


@torch.library.custom_op(f"{NAMESPACE}::cpu_attention_grad", mutates_args=(), device_types="cpu")
def cpu_attention_grad(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool,
    q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, alibi_slopes: Tensor | None,
    bias: Tensor | None, key_padding_mask: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, dropout_seed: Tensor | None, scaling: float, window_left: int,
    window_right: int, softcap: float, sink_tokens: int, dropout_p: float, max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, s_aux and bias; the last two are empty where there is none."""
    tensors = (
        q, k, v, s_aux, alibi_slopes, bias, key_padding_mask, cu_seqlens_q, cu_seqlens_k,
        dropout_seed,
    )  # fmt: skip
    numbers = (
        scaling, window_left, window_right, softcap, sink_tokens, dropout_p, max_seqlen_q,
        max_seqlen_k,
    )  # fmt: skip
    problem = _problem(tensors, numbers)
    rule = choose(traits_of(problem, bias_grad=bias_grad, lse_grad=grad_lse is not None))
    if problem.packed:
        out, lse, grad_out = out[None], lse[None], grad_out[None]
        grad_lse = None if grad_lse is None else grad_lse[None]
    g = blockwise.backward(
        blockwise.call_of(problem), rule.engine, out, lse, grad_out, grad_lse, bias_grad
    )
    dq, dk, dv = (g.q[0], g.k[0], g.v[0]) if problem.packed else (g.q, g.k, g.v)
    nothing = q.new_empty(0)
    return (
        dq,
        dk,
        dv,
        nothing if g.s_aux is None else g.s_aux,
        q.new_empty(0) if g.bias is None else g.bias,
    )


@cpu_attention_grad.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool,
    q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, alibi_slopes: Tensor | None,
    bias: Tensor | None, *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(0) if s_aux is None else s_aux.new_empty(s_aux.shape),
        bias.new_empty(bias.shape) if bias is not None and bias_grad else q.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[: len(_TENSORS)])
    ctx.numbers = inputs[len(_TENSORS) :]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    out, lse, *tensors = ctx.saved_tensors
    others = (None,) * (len(_TENSORS) - 6 + len(ctx.numbers))
    if grad_out is None and grad_lse is None:
        return (None,) * 6 + others
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
    needs = ctx.needs_input_grad
    dq, dk, dv, ds_aux, dbias = cpu_attention_grad(
        grad_out, grad_lse, out, lse, bool(needs[5]), *tensors, *ctx.numbers
    )
    return (
        dq if needs[0] else None,
        dk if needs[1] else None,
        dv if needs[2] else None,
        ds_aux if needs[3] else None,
        None,
        dbias if needs[5] else None,
        *others,
    )


cpu_attention.register_autograd(_backward, setup_context=_setup)
