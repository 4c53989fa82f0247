"""What calibration sees of the source: each layer's inputs and outputs, and their covariance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..merge import LayerFacts
from .attention_maps import Attended, watching
from .source_model import Call, SourceModel

# Added to the covariance's diagonal, as a share of its mean: for what the text never showed.
DAMPING = 1e-6
SAMPLE = 4  # sequences that are enough to tell how far attention reaches


@dataclass(frozen=True)
class Measured:
    """One layer of the source, watched on the calibration's tokens. Letters: N sequences of S
    tokens, E hidden size."""

    layer: int
    module: nn.Module  # in float32
    inputs: list[Tensor]  # of each use of the layer, [N, S, E]
    outputs: list[Tensor]  # the same
    covariance: Tensor  # [E + 1, E + 1] float64: E[x̃ x̃ᵀ] of what the queries are made of
    attended: Tensor  # the same, each token by the attention that it gets
    distances: Tensor  # [S] float64: how much is attended so many tokens back, of SAMPLE sequences

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

    def __init__(self, source: SourceModel, ids: Tensor) -> None:
        self.source, self.ids = source, ids
        self.calls = source.calls(ids)
        # Layers that share their weights are used several times each, on inputs of their own.
        self.shared = any(len(calls) > 1 for calls in self.calls)

    def layers(self) -> Iterator[Measured]:
        hidden = [] if self.shared else [self.source.first_inputs(self.ids)]
        for layer in range(len(self.source.layers)):
            if self.shared:
                hidden = self.source.all_inputs(self.ids, layer)
            measured = self._measure(layer, hidden)
            yield measured
            hidden = measured.outputs

    @torch.no_grad()
    def _measure(self, layer: int, inputs: list[Tensor]) -> Measured:
        old = self.source.float_layer(layer)
        every, attended = _Moments(), _Moments()
        distances = torch.zeros(self.ids.shape[1], dtype=torch.float64)
        latest, sampled = torch.zeros(()), 0

        def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal latest
            (latest, *_) = args
            every.add(latest.flatten(0, -2), latest.new_ones(latest.shape[:-1].numel()))

        def see(seen: Attended) -> None:
            nonlocal sampled, distances
            attended.add(latest.flatten(0, -2), seen.received.flatten())
            if sampled < SAMPLE:
                distances = distances + seen.distances()
                sampled += len(latest)

        query = next(s.module for s in self.source.family.layout.slots if "q" in s.roles)
        attention = old.get_submodule(query.rpartition(".")[0])
        handle = old.get_submodule(query).register_forward_pre_hook(take)
        uses = zip(inputs, self.calls[layer], strict=True)
        with watching(attention, see):
            outputs = [run_layer(old, x, call, self.source.device) for x, call in uses]
        handle.remove()
        assert attended.weight > 0, f"{type(attention).__name__}: its attention was not seen"
        return Measured(layer, old, inputs, outputs, every.mean(), attended.mean(), distances)


@torch.no_grad()
def run_layer(layer: nn.Module, inputs: Tensor, call: Call, device: str) -> Tensor:
    """[N, S, E] through a layer, a batch at a time; hidden states wait in main memory."""
    batches = (batch.to(device) for batch in inputs.split(call.rows))
    return torch.cat([call.run(layer, batch).cpu() for batch in batches])
