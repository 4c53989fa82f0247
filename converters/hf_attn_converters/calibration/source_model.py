"""The source as a transformers model, watched and run layer by layer.

Weights in their stored dtype stay mapped from their files until a layer is used: memory holds one
layer and the activations. Arithmetic is float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..families import FamilySpec
from ..io.reading import reading
from ..precision import WideProducts, products


def rows_at_once(ids: Tensor, tokens: int) -> int:
    """How many of the sequences ``[N, S]`` make up `tokens` tokens: two at least, if there are."""
    return min(len(ids), max(2, tokens // ids.shape[1]))


@dataclass(frozen=True)
class Call:
    """What a layer is given beside its hidden states: positions, masks."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int  # of the batch that it was recorded with

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """One batch of exactly the size that was recorded: [rows, S, E] -> the same. All is on
        one device."""
        out = layer(hidden, *self.args, **self.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


class _Stop(Exception):
    """Ends a forward pass that has shown what it was run for."""


class SourceModel:
    """The source's model, its layers and how they are called.

    Args:
        folder: of the checkpoint.
        family: its family, which knows where the layers are.
        layers: how many the checkpoint has, with weights of their own.
        trust_remote_code: run the code that lies in the folder.
        device: where layers run.
        tokens_at_once: how many go through a layer together.

    Raises ValueError where transformers cannot build it or where its layers are not found.
    """

    def __init__(
        self,
        folder: Path,
        family: FamilySpec,
        *,
        layers: int,
        trust_remote_code: bool = False,
        device: str = "cpu",
        tokens_at_once: int = 1024,
    ) -> None:
        import transformers
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.family, self.device, self.tokens_at_once = family, device, tokens_at_once
        self.folder = folder
        with reading(folder):
            self.model, found = getattr(transformers, family.auto_class).from_pretrained(
                folder,
                dtype="auto",
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        # What the checkpoint lacks: transformers drew it at random.
        self.missing: frozenset[str] = frozenset(map(str, found["missing_keys"]))
        self.model.eval().requires_grad_(False)
        self.layers: nn.ModuleList = self.model.get_submodule(family.layers_path)
        assert len(self.layers) == layers, (len(self.layers), layers)

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model takes, if it has a limit."""
        config = self.model.config.get_text_config()
        found = getattr(config, "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    @property
    def why_silent(self) -> str | None:
        """Why the model cannot write text of its own; None where it can."""
        if not self.model.can_generate():
            return f"a {type(self.model).__name__} does not generate"
        head = self.model.get_output_embeddings()
        names = {
            name
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if head is not None and any(parameter is own for own in head.parameters())
        }
        if lacking := sorted(names & self.missing):
            return f"it has no language model's head ({', '.join(lacking)})"
        return None

    def float_layer(self, layer: int) -> nn.Module:
        """A float32 copy of a layer on the device, in evaluation mode."""
        return copy.deepcopy(self.layers[layer]).float().eval().to(self.device)

    @torch.no_grad()
    def calls(self, ids: Tensor) -> list[list[Call]]:
        """How each layer is called, use by use, for batches of `rows_at_once` sequences."""
        found: list[list[Call]] = [[] for _ in self.layers]
        with self._watching(lambda layer, hidden, call: found[layer].append(call)):
            self._forward(ids[: rows_at_once(ids, self.tokens_at_once)])
        return [
            [
                replace(c, args=_moved(c.args, self.device), kwargs=_moved(c.kwargs, self.device))
                for c in uses
            ]
            for uses in found
        ]

    @torch.no_grad()
    def first_inputs(self, ids: Tensor) -> Tensor:
        """What the first layer is given: [N, S, E] float32."""
        found: list[Tensor] = []

        def take(layer: int, hidden: Tensor, call: Call) -> None:
            found.append(hidden.float())
            raise _Stop

        with self._watching(take):
            for batch in ids.split(rows_at_once(ids, self.tokens_at_once)):
                self._forward(batch)
        return torch.cat(found)

    @torch.no_grad()
    def all_inputs(self, ids: Tensor, layer: int) -> list[Tensor]:
        """What a layer is given each time it is used: a list of [N, S, E] float32."""
        rounds: list[list[Tensor]] = []

        def take(number: int, hidden: Tensor, call: Call) -> None:
            if number == layer:
                rounds[-1].append(hidden.float())

        with self._watching(take):
            for batch in ids.split(rows_at_once(ids, self.tokens_at_once)):
                rounds.append([])
                self._forward(batch)
        return [torch.cat(use) for use in zip(*rounds, strict=True)]

    def _forward(self, ids: Tensor) -> None:
        kwargs = {"use_cache": False} if self.model.can_generate() else {}
        with suppress(_Stop), self.products():
            self.model(input_ids=ids, **kwargs)

    def products(self) -> AbstractContextManager[Any]:
        """For running the whole model: float32 products where those of its dtype are slow."""
        slow = not products(self.model.dtype, self.model.device).fast
        return WideProducts() if slow else nullcontext()

    @contextmanager
    def _watching(self, take: Callable[[int, Tensor, Call], None]) -> Iterator[None]:
        handles = []
        for number, layer in enumerate(self.layers):

            def hook(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                number: int = number,
            ) -> None:
                rest = dict(kwargs)
                hidden, others = (args[0], args[1:]) if args else (rest.pop("hidden_states"), ())
                call = Call(_moved(others, "cpu"), _moved(rest, "cpu"), len(hidden))
                take(number, hidden, call)

            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _moved(value: Any, device: str) -> Any:
    """Tensors on the device, half-precision ones in float32, also inside tuples and dicts."""
    if isinstance(value, Tensor):
        return (value.float() if value.is_floating_point() else value).to(device)
    if isinstance(value, dict):
        return {key: _moved(x, device) for key, x in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(x, device) for x in value)
    return value
