"""Fitting one converted layer to what the source's layer gives.

The layer sees the hidden states that the converted layers before it really produce, and is drawn
towards the hidden states of the source: each layer repairs what those before it lost. Every token
counts by its relative error, because whatever reads a hidden state normalises it first; without
that a few tokens with huge activations would be all that counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..precision import products
from .source_model import Call


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a layer is fitted.

    Args:
        steps: of AdamW; they go through the tokens in ever new orders.
        step_tokens: for each step, in two sequences at least.
        attention_lr: of the attention's weights; warmed up, then linear to 0.
        other_lr: of the layer's other weights. 0 leaves them as they are.
    """

    steps: int = 96
    step_tokens: int = 1024
    attention_lr: float = 2e-3
    other_lr: float = 3e-4

    def __post_init__(self) -> None:
        if min(self.steps, self.step_tokens) < 1 or self.attention_lr <= 0 or self.other_lr < 0:
            raise ValueError(
                "steps, step_tokens and attention_lr must be positive, other_lr not negative: "
                f"{self}"
            )


WARM_UP = 5  # steps
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Use:
    """One use of the layer: what it gets, what it should give, how it is called."""

    inputs: Tensor  # [N, S, E]
    targets: Tensor  # [N, S, E]
    call: Call


def fit_layer(
    layer: nn.Module,
    attention: Sequence[nn.Parameter],
    others: Sequence[nn.Parameter],
    uses: Sequence[Use],
    settings: FitSettings,
    seed: int,
) -> float:
    """Fit in place; returns the last steps' mean error relative to what the layer adds."""
    layer.requires_grad_(False)
    groups: list[dict[str, Any]] = [{"params": list(attention), "peak": settings.attention_lr}]
    if settings.other_lr and others:
        groups.append({"params": list(others), "peak": settings.other_lr})
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)
    batches = _batches(uses, settings.steps, seed)
    device = next(layer.parameters()).device
    scale = _added(uses).to(device)
    losses = []
    for step, (use, rows) in enumerate(batches):
        share = min(1.0, (step + 1) / WARM_UP) * (1 - step / settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        targets = use.targets[rows].to(device)
        with _autocast(targets):
            found = use.call.run(layer, use.inputs[rows].to(device))
        loss = relative_error(found.float(), targets) / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    layer.requires_grad_(False)
    return torch.stack(losses[-8:]).mean().item()


def relative_error(found: Tensor, targets: Tensor) -> Tensor:
    """Mean over tokens of ‖found - target‖² / ‖target‖², on [..., E]."""
    size = targets.square().sum(-1).clamp_min(torch.finfo(targets.dtype).tiny)
    return ((found - targets).square().sum(-1) / size).mean()


def _added(uses: Sequence[Use]) -> Tensor:
    """How much a layer changes its inputs: the error of leaving it out."""
    parts = [
        relative_error(use.inputs[: use.call.rows], use.targets[: use.call.rows]) for use in uses
    ]
    return torch.stack(parts).mean().clamp_min(1e-12)


def _batches(uses: Sequence[Use], steps: int, seed: int) -> list[tuple[Use, Tensor]]:
    """For each step a use and a batch of its sequences; each comes once before any again."""
    generator = torch.Generator().manual_seed(seed)
    count, together = len(uses[0].inputs), uses[0].call.rows
    found: list[tuple[Use, Tensor]] = []
    while len(found) < steps:
        orders = [torch.randperm(count, generator=generator).split(together) for _ in uses]
        for rows in zip(*orders, strict=True):
            found += [(use, r) for use, r in zip(uses, rows, strict=True) if len(r) == together]
    return found[:steps]


def _autocast(like: Tensor) -> Any:
    """bfloat16 products where the device has them fast, with float32 weights."""
    fast = products(torch.bfloat16, like.device).fast
    return torch.autocast(like.device.type, torch.bfloat16, enabled=fast)
