"""Forward KL and cross-entropy over large vocabularies, some tokens at a time.

Letters: T tokens of a batch, V vocabulary, C tokens of a chunk.

No float32 copy of ``[T, V]`` is made: softmax and gradient are computed on ``[C, V]``. The
gradient is written where the teacher's logits were, which nobody needs afterwards (the idea of
Liger-Kernel, arXiv:2410.10989, where the gradient takes the place of the logits themselves).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # target of a token that is not to be predicted, as transformers marks it
CHUNK = 1 << 22  # numbers in [C, V]


def next_tokens(labels: Tensor) -> Tensor:
    """What each position is to predict: ``[B, S]`` labels one to the left, IGNORED at the end."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def distillation_loss(
    logits: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    *,
    kl_weight: float,
    count: Tensor | int,
) -> Tensor:
    """``(kl_weight · KL(teacher ‖ student) + (1 - kl_weight) · cross-entropy) / count``, summed.

    Args:
        logits: ``[..., V]``, the student's.
        teacher: the same shape, not trained; **overwritten** if its dtype is that of `logits`.
            None only where kl_weight is 0.
        targets: ``[...]`` int64; IGNORED where nothing is predicted, by either loss.
        count: what to divide by: the tokens of the whole step.
    """
    if teacher is not None:
        _check_width(logits, teacher)
        teacher = teacher.flatten(0, -2)
    assert teacher is not None or kl_weight == 0, "a KL needs a teacher"
    summed: Tensor = _Distillation.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, -2), teacher, targets.flatten(), kl_weight
    )
    return summed / count


@torch.no_grad()
def token_losses(logits: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
    """``[..., 3]`` float32: KL, the student's cross-entropy, the teacher's, of every token.

    Zero where nothing is predicted; NaN for what a missing teacher would tell.
    """
    if teacher is not None:
        _check_width(logits, teacher)
        teacher = teacher.flatten(0, -2)
    flat = targets.flatten()
    found = torch.full((len(flat), 3), float("nan"), device=logits.device)
    for part, chosen, log_q, log_p in _chunks(logits.flatten(0, -2), teacher, flat):
        found[part, 1] = -log_q.gather(1, chosen[:, None])[:, 0]
        if log_p is not None:
            found[part, 0] = _kl(log_p, log_q)
            found[part, 2] = -log_p.gather(1, chosen[:, None])[:, 0]
    found[flat == IGNORED] = 0
    return found.view(*targets.shape, 3)


class _Distillation(torch.autograd.Function):
    """Sum of the losses; the gradient is made on the way forward, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, teacher: Tensor | None, targets: Tensor, kl_weight: float
    ) -> Tensor:
        reusable = teacher is not None and teacher.dtype == logits.dtype
        gradient = teacher if reusable else torch.empty_like(logits)
        assert gradient is not None
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for part, chosen, log_q, log_p in _chunks(logits, teacher, targets):
            kept = (targets[part] != IGNORED).float()[:, None]
            ce = -log_q.gather(1, chosen[:, None])[:, 0]
            losses = (1 - kl_weight) * ce
            # d KL / d logits = q - p, d CE / d logits = q - onehot
            slope = log_q.exp()
            slope.scatter_add_(1, chosen[:, None], torch.full_like(ce, kl_weight - 1)[:, None])
            if log_p is not None and kl_weight:
                losses = losses + kl_weight * _kl(log_p, log_q)
                slope.addcmul_(log_p.exp(), kept, value=-kl_weight)
            total += (losses * kept[:, 0]).sum()
            gradient[part] = slope.mul_(kept)
        ctx.gradient = gradient
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        gradient: Tensor = ctx.gradient
        ctx.gradient = None
        return gradient.mul_(outer), None, None, None


def _chunks(
    logits: Tensor, teacher: Tensor | None, targets: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """(which tokens, their targets with 0 for IGNORED, log q, log p), [C, V] float32 each."""
    rows = max(1, CHUNK // logits.shape[-1])
    for begin in range(0, len(targets), rows):
        part = slice(begin, begin + rows)
        log_q = torch.log_softmax(logits[part].float(), -1)
        log_p = None if teacher is None else torch.log_softmax(teacher[part].float(), -1)
        yield part, targets[part].clamp(min=0), log_q, log_p


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _check_width(logits: Tensor, teacher: Tensor) -> None:
    assert logits.shape == teacher.shape, (logits.shape, teacher.shape)
