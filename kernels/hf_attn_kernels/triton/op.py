"""The kernels as torch operators: launch, shape functions for torch.compile, and autograd.

`attention` is what the API calls. Below it are two custom operators, one for each direction, whose
arguments are plain tensors and numbers, because that is what torch.compile can see through.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..namespace import NAMESPACE
from ..problem import Pattern, Problem
from .backward_launch import run_backward
from .decode import decode_dense, serves_dense
from .forward_launch import Outputs, run_forward
from .launch import Inputs, Shape


def attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """Run `problem` on Triton: out like q with v's head_dim, and the natural log-sum-exp."""
    if serves_dense(problem):
        return decode_dense(problem)
    p, pattern = problem, problem.pattern
    out, lse, _ = attention_forward(
        p.q,
        p.k,
        p.v,
        p.s_aux,
        _rows_of_slopes(p.alibi_slopes),
        p.bias,
        p.key_padding_mask,
        p.cu_seqlens_q,
        p.cu_seqlens_k,
        p.dropout_seed,
        p.max_seqlen_q,
        p.max_seqlen_k,
        pattern.scaling,
        pattern.window_left,
        pattern.window_right,
        pattern.softcap,
        pattern.sink_tokens,
        pattern.dropout_p,
        p.deterministic,
    )
    return out, lse


def _rows_of_slopes(slopes: Tensor | None) -> Tensor | None:
    """``[1 | B, Hq]`` float32, contiguous."""
    if slopes is None:
        return None
    return (slopes if slopes.dim() == 2 else slopes[None]).contiguous()


@torch.library.custom_op(f"{NAMESPACE}::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    slopes: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    max_q: int,
    max_k: int,
    scaling: float,
    left: int,
    right: int,
    softcap: float,
    sink_tokens: int,
    dropout_p: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Out, log-sum-exp and its parts (`Shape.lse_parts`).

    Arguments are as in :class:`..problem.Problem`, already checked.

    `deterministic` is for the backward, which sees this operator's arguments alone.
    """
    pattern = Pattern(
        scaling=scaling,
        window_left=left,
        window_right=right,
        softcap=softcap,
        sink_tokens=sink_tokens,
        dropout_p=dropout_p,
    )
    o = run_forward(
        Inputs(q, k, v, s_aux, slopes, bias, key_mask, cu_q, cu_k, seed, max_q, max_k, pattern)
    )
    return o.out, o.lse, o.parts


@attention_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, slopes: Tensor | None,
    bias: Tensor | None, key_mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    seed: Tensor | None, max_q: int, max_k: int, scaling: float, left: int, right: int,
    softcap: float, sink_tokens: int, dropout_p: float, deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = Shape.of(q, k, v, cu_q, max_q, max_k)
    out, lse = shape.empty_outputs(q)
    return out, lse, shape.lse_parts(lse, bias)


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    parts: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    slopes: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    max_q: int,
    max_k: int,
    scaling: float,
    left: int,
    right: int,
    softcap: float,
    sink_tokens: int,
    dropout_p: float,
    deterministic: bool,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, bias and s_aux; the last two have 0 elements where not asked for."""
    pattern = Pattern(
        scaling=scaling,
        window_left=left,
        window_right=right,
        softcap=softcap,
        sink_tokens=sink_tokens,
        dropout_p=dropout_p,
    )
    x = Inputs(q, k, v, s_aux, slopes, bias, key_mask, cu_q, cu_k, seed, max_q, max_k, pattern)
    return run_backward(x, dout, dlse, Outputs(out, lse, parts), bias_needs_grad, deterministic)


@attention_backward.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, parts: Tensor, q: Tensor,
    k: Tensor, v: Tensor, s_aux: Tensor | None, slopes: Tensor | None, bias: Tensor | None,
    key_mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, seed: Tensor | None,
    max_q: int, max_k: int, scaling: float, left: int, right: int, softcap: float, sink_tokens: int,
    dropout_p: float, deterministic: bool, bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        bias.new_empty(bias.shape) if bias is not None and bias_needs_grad else q.new_empty(0),
        s_aux.new_empty(s_aux.shape) if s_aux is not None else q.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    tensors, numbers = inputs[:10], inputs[10:]
    ctx.save_for_backward(*tensors, *output)
    ctx.numbers = numbers
    ctx.bias_needs_grad = ctx.needs_input_grad[5]
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse, _dparts):
    *tensors, out, lse, parts = ctx.saved_tensors
    nothing = (None,) * (len(tensors) + len(ctx.numbers))
    if dout is None and dlse is None:
        return nothing
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dbias, ds_aux = attention_backward(
        dout, dlse, out, lse, parts, *tensors, *ctx.numbers, ctx.bias_needs_grad
    )
    return (
        dq,
        dk,
        dv,
        ds_aux if ctx.needs_input_grad[3] else None,
        None,
        dbias if ctx.bias_needs_grad else None,
        *nothing[6:],
    )


attention_forward.register_autograd(_backward, setup_context=_setup_context)
