"""A KV cache that holds each row's first tokens and the window, whatever the length: O(window).

What a layer holds is ``[S sinks | everything from column `start` on]``; S is 0 until something has
been dropped. The tail ends at the last token, so causality and windows, aligned to the bottom
right, need no change; the mask is gathered in the same order by :mod:`..masking.sinks`.

The tail exceeds the window by `slack` to 2 `slack` tokens: dropping copies the window, and so
happens once in `slack` steps, and assisted generation can take back what was not accepted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..masking.sinks import RowStarts, ask, head_slots
from ..swa_config import SwaSettings, required
from ..transformers_compat.compat import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    implementation_of,
)

SLACK = 64


class RollingLayer(DynamicLayer):
    """One layer: keys ``[B, Hkv, held, D]`` and values ``[B, Hkv, held, Dv]``."""

    is_croppable = True
    # transformers says "or None until the first update"; there is no reading before it
    keys: Tensor
    values: Tensor

    def __init__(
        self,
        window: int,
        sinks: int = 0,
        *,
        is_sliding: bool = False,
        slack: int = SLACK,
        starts: RowStarts | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = is_sliding  # transformers' word for "the model's own config slides it"
        self.window = window
        self.sinks = sinks
        self.slack = max(slack, sinks)  # so that the first drop is behind every row's first sinks
        self.record_past = False
        self.starts = starts or RowStarts()
        self.cumulative_length = 0
        self.start = 0

    def activate_past_recording(self) -> None:
        """Drop nothing until the next crop."""
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, drop what no later query sees, return all that these queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        # what follows on a prompt may be guesses: all of them can be taken back
        revocable = max(self.slack, new if self.cumulative_length else 0)
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        self.cumulative_length += new
        self.keys, self.values = keys, values
        # better too long than without the rows' first tokens
        known = not self.sinks or self.starts.told() == self.cumulative_length
        if known and not self.record_past:
            self._drop(revocable)
        return keys, values

    def _drop(self, revocable: int) -> None:
        keep = self.window - 1 + revocable
        tail = self.cumulative_length - self.start
        start = self.cumulative_length - keep
        if tail <= keep + self.slack or start <= self.sinks:
            return
        index = self._sink_index(start)
        self.keys = self._kept(self.keys, index, keep)
        self.values = self._kept(self.values, index, keep)
        self.start = start

    def _sink_index(self, start: int) -> Tensor | None:
        """``[B, S]`` where what the head shall hold stands now; None: it is the first S keys."""
        total = self.cumulative_length
        columns = self.starts.columns(self.sinks, total) if self.sinks else None
        if columns is None:
            return None
        columns = columns.to(self.keys.device)
        number, _ = head_slots(columns, start)
        column = columns.gather(1, number)
        gone = (columns < self.start).sum(-1, keepdim=True)
        in_head = number + self.sinks - gone
        in_tail = column - self.start + (self.sinks if self.start else 0)
        index = torch.where(column < self.start, in_head, in_tail)
        # an empty slot takes any key, and the mask hides it
        return index.clamp(0, self.keys.shape[-2] - 1)

    def _kept(self, states: Tensor, index: Tensor | None, keep: int) -> Tensor:
        tail = states[..., states.shape[-2] - keep :, :]
        if self.sinks == 0:
            return tail.clone()  # a view would keep all the rest alive
        if index is None:
            return torch.cat([states[..., : self.sinks, :], tail], dim=-2)
        picked = index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1])
        return torch.cat([states.gather(-2, picked), tail], dim=-2)

    def get_seq_length(self) -> int:
        """Tokens seen, dropped ones with them."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """Tokens that can be held for good."""
        return self.window + self.sinks

    def get_max_cache_shape(self) -> int:
        """The older name of :meth:`get_max_length`."""
        return self.get_max_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that the next update returns, position of the first).

        With sinks the held positions have a gap; the offset is 0 then, and the mask function knows
        by the length, which is less than the tokens seen.
        """
        tail = self.cumulative_length - self.start + query_length
        sizes = (self.sinks + tail, 0) if self.sinks and self.start else (tail, self.start)
        if self.sinks:
            ask(self.starts, *sizes)
        return sizes

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens.

        Raises:
            ValueError: a positive number, or the tokens needed instead have been dropped.
        """
        tokens_to_remove = int(tokens_to_remove)  # older releases pass a tensor
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop() takes the negative number of tokens to remove, got {tokens_to_remove}"
            )
        if not self.is_initialized:
            return
        remove = -tokens_to_remove
        left = self.cumulative_length - remove
        if left < 0 or (self.start and left - self.start < self.window - 1):
            raise ValueError(
                f"cannot take back {remove} of {self.cumulative_length} tokens: a window of "
                f"{self.window} would then need keys that were dropped. Call "
                "cache.activate_past_recording() before the tokens are added."
            )
        if remove:
            self.keys = self.keys[..., : self.keys.shape[-2] - remove, :]
            self.values = self.values[..., : self.values.shape[-2] - remove, :]
            self.cumulative_length = left
        if self.record_past and (not self.sinks or self.starts.told() >= left):
            self._drop(self.slack)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.cumulative_length = self.start = 0
        self.starts.clear()

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.starts.forget()

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.starts.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.starts.forget()


class RollingCache(Cache):
    """The cache that ``triton_swa`` needs for memory O(window).

    ``configure_swa`` makes ``generate()`` use one by itself; make one for your own loop:
    ``model(ids, past_key_values=RollingCache(model.config), use_cache=True)``.

    Args:
        config: the model's, with ``attn_implementation="triton_swa"``.

    Raises:
        ValueError: another implementation, or no window is known.
    """

    def __init__(self, config: Any) -> None:
        config = config.get_text_config(decoder=True)
        name = implementation_of(config)
        if name != "triton_swa":
            raise ValueError(
                f"RollingCache works with attn_implementation='triton_swa', this model has "
                f"{name!r}: others would attend to keys at wrong positions. Use transformers' "
                "DynamicCache."
            )
        super().__init__(layers=rolling_layers(config, required(config)))


def rolling_layers(config: Any, settings: SwaSettings) -> list[Any]:
    """One layer for each of the model's, rolling where a window applies to it."""
    layers = DynamicCache(config=config).layers
    if not layers:
        layers = [DynamicLayer() for _ in range(config.num_hidden_layers)]
    starts = RowStarts()
    return [_rolling(layer, settings, starts) for layer in layers]


def layer_windows(config: Any, settings: SwaSettings) -> list[int | None]:
    """The window of each of the model's layers, None for full attention.

    Raises ValueError where a layer's state is no keys and values.
    """
    layers = DynamicCache(config=config).layers or [DynamicLayer()] * config.num_hidden_layers
    kinds = {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            f"a model of type {config.model_type!r} has layers that hold no pages of keys and "
            f"values ({names}); use transformers' DynamicCache"
        )
    return [settings.narrow(getattr(layer, "sliding_window", None)) for layer in layers]


def _rolling(layer: Any, settings: SwaSettings, starts: RowStarts) -> Any:
    slides = type(layer) is DynamicSlidingWindowLayer
    if not slides and type(layer) is not DynamicLayer:
        return layer  # linear attention, convolutions: not ours
    window = settings.narrow(layer.sliding_window if slides else None)
    if window is None:
        return layer
    rolling = RollingLayer(window, settings.sinks, is_sliding=slides, slack=SLACK, starts=starts)
    rolling.record_past = getattr(layer, "record_past", False)
    return rolling
