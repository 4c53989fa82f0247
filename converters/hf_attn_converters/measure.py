"""What calibration sees of the source: each layer's inputs and outputs, and their covariance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .source_model import Call, SourceModel
from .work import Work

# Added to the covariance's diagonal, as a share of its mean: for what the text never showed.
DAMPING = 1e-6
SAMPLE = 4  # sequences whose attention inputs are kept


@dataclass(frozen=True)
class Measured:
    """One layer of the source, watched on the calibration's tokens. Letters: N sequences of S
    tokens, E hidden size."""

    layer: int
    module: nn.Module  # in float32
    inputs: list[Tensor]  # of each use of the layer, [N, S, E]
    outputs: list[Tensor]  # the same
    covariance: Tensor  # [E + 1, E + 1] float64: E[x̃ x̃ᵀ] of what the queries are made of
    sample: Tensor  # [up to SAMPLE, S, E]: some of that x


class Watch:
    """The source's layers one after the other, each on what those before it give."""

    def __init__(self, work: Work, source: SourceModel, ids: Tensor) -> None:
        self.work, self.source, self.ids = work, source, ids
        self.calls = source.calls(ids)
        # Layers that share their weights are used several times each, on inputs of their own.
        self.shared = any(len(calls) > 1 for calls in self.calls)

    def layers(self) -> Iterator[Measured]:
        hidden = [] if self.shared else [self.source.first_inputs(self.ids)]
        for layer in range(self.work.plan.layers):
            if self.shared:
                hidden = self.source.all_inputs(self.ids, layer)
            measured = self._measure(layer, hidden)
            yield measured
            hidden = measured.outputs

    @torch.no_grad()
    def _measure(self, layer: int, inputs: list[Tensor]) -> Measured:
        old = self.source.float_layer(layer)
        total: Tensor | None = None
        seen = 0
        sample: list[Tensor] = []

        def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal total, seen
            if args[0].ndim == 3 and sum(map(len, sample)) < SAMPLE:
                sample.append(args[0].cpu())
            x = args[0].flatten(0, -2)
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            part = (x.T @ x).double().cpu()
            total, seen = part if total is None else total + part, seen + len(x)

        query = next(slot for slot in self.work.family.layout.slots if "q" in slot.roles)
        handle = old.get_submodule(query.module).register_forward_pre_hook(watch)
        uses = zip(inputs, self.calls[layer], strict=True)
        outputs = [run_layer(old, x, call, self.source.device) for x, call in uses]
        handle.remove()
        assert total is not None
        covariance = total / seen
        if not covariance.isfinite().all():
            raise ValueError("the source's hidden states hold NaN or infinity: is it damaged?")
        covariance.diagonal().add_(DAMPING * covariance.diagonal().mean())
        kept = torch.cat(sample)[:SAMPLE] if sample else inputs[0][:0]
        return Measured(layer, old, inputs, outputs, covariance, kept)


@torch.no_grad()
def run_layer(layer: nn.Module, inputs: Tensor, call: Call, device: str) -> Tensor:
    """[N, S, E] through a layer, a batch at a time; hidden states wait in main memory."""
    batches = (batch.to(device) for batch in inputs.split(call.rows))
    return torch.cat([call.run(layer, batch).cpu() for batch in batches])
