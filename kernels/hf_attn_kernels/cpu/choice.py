"""Which engine serves a call: the first row of a table whose condition holds.

The flash engine is PyTorch's own fused kernel; the matmul engine has every feature and is also the
faster one where the fused kernel is not made for the dtype or the shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..problem import UNBOUNDED, Problem
from . import extension_prefill
from .blockwise import FLASH, MATMUL, call_of


@dataclass(frozen=True)
class Traits:
    """What the choice depends on; made from a Problem, or by the cache's own entry."""

    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    softcap: bool = False
    dropout: bool = False
    bias_grad: bool = False
    lse_grad: bool = False


@dataclass(frozen=True)
class Rule:
    engine: str
    why: str
    holds: Callable[[Traits], bool]


RULES = (
    Rule(MATMUL, "softcap", lambda t: t.softcap),
    Rule(MATMUL, "dropout", lambda t: t.dropout),
    Rule(MATMUL, "gradient of the bias", lambda t: t.bias_grad),
    Rule(MATMUL, "gradient of the log-sum-exp", lambda t: t.lse_grad),
    Rule(MATMUL, "head_dim of v differs", lambda t: t.head_dim != t.head_dim_v),
    Rule(MATMUL, "float16 runs as float32", lambda t: t.dtype == torch.float16),
    Rule(FLASH, "PyTorch's fused kernel", lambda t: True),
)


# before them, where it is built (`prefill.REFUSALS` says what it leaves to them); forward only
BY_EXTENSION = Rule("compiled", "the CPU extension", lambda t: True)


def choose(traits: Traits) -> Rule:
    return next(rule for rule in RULES if rule.holds(traits))


def traits_of(problem: Problem, *, bias_grad: bool = False, lse_grad: bool = False) -> Traits:
    return Traits(
        dtype=problem.q.dtype,
        head_dim=problem.q.shape[-1],
        head_dim_v=problem.v.shape[-1],
        softcap=problem.pattern.softcap > 0,
        dropout=problem.pattern.dropout_p > 0,
        bias_grad=bias_grad,
        lse_grad=lse_grad,
    )


def plan(problem: Problem) -> str:
    """The path a forward call takes, in words: what it is and which engine, with the reason."""
    p = problem.pattern
    rule = choose(traits_of(problem))
    if extension_prefill.serves(call_of(problem)):
        rule = BY_EXTENSION
    if p.window_left != UNBOUNDED or p.window_right > 0:
        shape = f"window ({p.window_left}, {p.window_right})"
    elif p.window_right == 0:
        shape = "causal"
    else:
        shape = "full"
    parts = [shape]
    if problem.packed:
        parts.append("sequence by sequence")
    elif problem.key_padding_mask is not None:
        parts.append("row by row")
    return f"{', '.join(parts)}: {rule.engine} ({rule.why})"
