"""What calibration sees of the source: each layer's inputs and outputs, and their covariance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .merge import LayerFacts
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
    attended: Tensor | None  # the same, each token by the attention it gets, where that is asked
    sample: Tensor  # [up to SAMPLE, S, E]: some of that x

    def facts(self, known: LayerFacts) -> LayerFacts:
        """What is known of the layer, with what was measured."""
        return replace(known, covariance=self.covariance, attended=self.attended)


class _Moments:
    """E[x̃ x̃ᵀ] of what is added, weighted."""

    def __init__(self) -> None:
        self.total, self.weight = torch.zeros(()), 0.0

    def add(self, x: Tensor, weights: Tensor) -> None:
        """x ``[T, E]`` with weights ``[T]``."""
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.total = self.total + ((x * weights[:, None]).T @ x).double().cpu()
        self.weight += weights.sum().item()

    def mean(self) -> Tensor:
        found: Tensor = self.total / self.weight
        if not found.isfinite().all():
            raise ValueError("the source's hidden states hold NaN or infinity: is it damaged?")
        found.diagonal().add_(DAMPING * found.diagonal().mean())
        return found


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
        weigh = self.work.form.weigher(self.work, self.source, layer)
        every, attended = _Moments(), _Moments()
        sample: list[Tensor] = []

        def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            every.add(x.flatten(0, -2), x.new_ones(x.shape[:-1].numel()))
            if weigh is not None:
                attended.add(x.flatten(0, -2), weigh(x).flatten())
                if sum(map(len, sample)) < SAMPLE:
                    sample.append(x.cpu())

        query = next(slot for slot in self.work.family.layout.slots if "q" in slot.roles)
        handle = old.get_submodule(query.module).register_forward_pre_hook(watch)
        uses = zip(inputs, self.calls[layer], strict=True)
        outputs = [run_layer(old, x, call, self.source.device) for x, call in uses]
        handle.remove()
        return Measured(
            layer,
            old,
            inputs,
            outputs,
            covariance=every.mean(),
            attended=None if weigh is None else attended.mean(),
            sample=torch.cat(sample)[:SAMPLE] if sample else inputs[0][:0],
        )


@torch.no_grad()
def run_layer(layer: nn.Module, inputs: Tensor, call: Call, device: str) -> Tensor:
    """[N, S, E] through a layer, a batch at a time; hidden states wait in main memory."""
    batches = (batch.to(device) for batch in inputs.split(call.rows))
    return torch.cat([call.run(layer, batch).cpu() for batch in batches])
