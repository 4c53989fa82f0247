"""PagedCache: a transformers cache whose keys and values lie in pages."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor

from ..swa_config import OWN_WINDOWS, required
from ..transformers_compat import latent_layers
from ..transformers_compat.compat import Cache, PreTrainedModel, implementation_of
from . import inputs, model_state
from .block_pool import OutOfPagesError
from .inputs import ForwardInputs, real_tokens
from .model_state import ModelState
from .page_storage import PagedLayer, check_reader
from .rolling import layer_windows
from .sequences import Rows, Window
from .stats import CacheStats, filled, percent
from .step import DeviceTable, Step

PAGE_SIZES = (16, 32, 64, 128, 256)
DTYPES = {None: None, "fp8": torch.float8_e4m3fn, torch.float8_e4m3fn: torch.float8_e4m3fn}


class PagedCache(Cache):
    """Keys and values in pages of a growing pool, for ``generate(..., past_key_values=cache)``.

    Rows of a batch share the pages of equal beginnings and copy them when they part (beams,
    ``num_return_sequences``, equal prompts). Padding takes no place. Pages that leave a layer's
    window are let go. Full pages stay findable: :meth:`start`, called before ``generate()``, takes
    from them what a new prompt has in common with earlier rows. Pages are shared and found only
    where token ids, their places and the model's state are all that made them; see
    ``docs/paged-cache.md``. Kwon et al., "PagedAttention" (2023).

    Padding comes before a row's tokens (``padding_side="left"``). Encoder-decoder models take
    ``EncoderDecoderCache(PagedCache(model), DynamicCache())``: cross-attention keeps plain tensors.

    Args:
        model: with one of our implementations; a hook on it tells the cache what it is called with.
        page_size: tokens of a page: 16, 32, 64, 128 or 256.
        max_bytes: of keys and values; None: as much as is asked for. A pool that grows is copied a
            layer at a time: for that moment there is one layer's pool more.
        dtype: None for the model's own, or ``"fp8"``: float8_e4m3fn with one scale per head, set
            by the first tokens.

    Raises:
        ValueError: another implementation, or numbers out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        page_size: int = 16,
        max_bytes: int | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"PagedCache takes a transformers model, got {type(model).__name__}")
        if page_size not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {PAGE_SIZES} tokens, got {page_size!r}")
        if dtype not in DTYPES:
            raise ValueError(
                f"dtype must be None (the model's own) or 'fp8' (float8_e4m3fn), got {dtype!r}"
            )
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes must be positive or None, got {max_bytes!r}")
        self.config = model.config.get_text_config(decoder=True)
        check_reader(self.config)
        if implementation_of(self.config) == latent_layers.NAME:  # set after loading, maybe
            latent_layers.prepare(model)
        triton_swa = implementation_of(self.config) == "triton_swa"
        settings = required(self.config) if triton_swa else OWN_WINDOWS
        windows = layer_windows(self.config, settings)
        layers = [PagedLayer(self, window, i) for i, window in enumerate(windows)]
        super().__init__(layers=list(layers))
        self.layers: list[PagedLayer] = layers  # type: ignore[assignment]  # a narrower type
        self.page_size, self.page_dtype = page_size, DTYPES[dtype]
        sinks = {window: 0 if window is None else settings.sinks for window in windows}
        self.rows = Rows(sinks, page_size, max_bytes)
        self.on_device = {window: DeviceTable(page_size) for window in sinks}
        self.length = 0  # columns of the batch, padding included
        self.step: Step | None = None  # the forward pass that runs, or ran last
        self.unfinished = False  # something has begun and not come to its end
        self.inputs: ForwardInputs | None = None  # what the model is being called with
        self._state: ModelState | None = None  # of the model, when the present rows began
        self._expected: PagedLayer | None = None  # has handed out keys that nobody has read
        self._from_start = False  # rows may still be multiplied, as generate() does
        self._model = weakref.ref(model)
        inputs.watch(model, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """A cache of its own, of the same model: layers and the hook know their cache."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        shared = ("config", "_model", "_state", "inputs")
        for name, value in vars(self).items():
            twin.__dict__[name] = value if name in shared else copy.deepcopy(value, memo)
        for layer in twin.layers:
            layer.belong_to(twin)
        model = self._model()
        if model is not None:
            inputs.watch(model, twin)
        return twin

    # -- between generations -----------------------------------------------------------------------

    def start(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> int:
        """Begin new rows, with what earlier ones have in common with them already there.

        Call it with the inputs of ``generate()``, all of them, then ``generate()`` with this cache.
        Prompts are matched in whole pages; at least the last token is left to compute.

        Args:
            input_ids: ``[B, S]``; attention_mask: ``[B, S]``, 0 for padding on the left.
            others: of the model's inputs; with any that a page's key does not cover, such as
                images, nothing is found.

        Returns:
            Columns of `input_ids` that need not be computed again.
        """
        batch, width = input_ids.shape
        real = real_tokens(attention_mask, batch, width)
        model = self._model()
        state = None if model is None else model_state.read(model)
        positions = others.get("position_ids")
        plain = inputs.not_covered(model, others) is None and (
            positions is None or inputs.counts_tokens(positions, [0] * batch, real, 0, width)
        )
        ids = [row[len(row) - n :] for row, n in zip(input_ids.tolist(), real, strict=True)]
        # rows whose model has changed meanwhile may be of two states
        trust = not self.unfinished and _same(state, self._state)
        self.unfinished = True
        seed = state.key if state is not None and plain else None
        column = self.rows.resume(ids, width, trust=trust, seed=seed)
        self._state = state
        self._moved(column)
        self._from_start = True
        return column

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self.unfinished = True
        self.rows.reset()
        for layer in self.layers:
            layer.reset()
        self._moved(0)

    def offload_to_host(self) -> None:
        """Move what is held to main memory; the next use brings it back by itself."""
        self._settle()
        for layer in self.layers:
            layer.to_host(self.rows.tables[layer.window].pool.occupied())

    def stats(self) -> CacheStats:
        """Pages, bytes and waste at this moment."""
        self._settle()
        sizes = self._page_bytes()
        tables = self.rows.tables
        pools = {window: table.pool for window, table in tables.items()}
        used = sum(p.used for p in pools.values())
        held = sum(filled(table, self.rows.tokens) for table in tables.values())
        pool_bytes = sum(p.size * sizes[w] for w, p in pools.items())
        return CacheStats(
            page_size=self.page_size,
            pages=sum(p.size for p in pools.values()),
            used=used,
            free=sum(p.free for p in pools.values()),
            kept=sum(p.kept for p in pools.values()),
            shared=sum(p.shared for p in pools.values()),
            bytes=sum(layer.allocated for layer in self.layers),
            used_bytes=sum(p.used * sizes[w] for w, p in pools.items()),
            internal_waste=percent(used * self.page_size - held, used * self.page_size),
            external_waste=percent(
                sum((p.free + 1) * sizes[w] for w, p in pools.items()), pool_bytes
            ),
            hit_rate=self.rows.found / self.rows.asked if self.rows.asked else 0.0,
        )

    # -- what generate() does with its cache -------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens.

        Raises:
            ValueError: a positive number, or a window would need pages that were let go.
        """
        tokens_to_remove = int(tokens_to_remove)  # older releases pass a tensor
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop() takes the negative number of tokens to remove, got {tokens_to_remove}"
            )
        self._refuse_broken()
        self.unfinished = True
        try:
            self.rows.shorten(-tokens_to_remove)
        except ValueError:  # nothing was changed
            self.unfinished = False
            raise
        self._moved(max(0, self.length + tokens_to_remove))

    def activate_past_recording(self) -> None:
        """Let nothing go until the next :meth:`crop`."""
        self.rows.keep_all = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become copies of the rows at ``beam_idx [B]``; pages are shared."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows become copies of the rows at `indices`."""
        self._select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._select([row for row in range(len(self.rows.tokens)) for _ in range(repeats)])

    def _select(self, indices: list[int]) -> None:
        self._settle()
        if indices != list(range(len(self.rows.tokens))):
            self.unfinished = True
            self.rows.select(indices)
            self._moved(self.length)

    def _moved(self, length: int) -> None:
        """Rows have changed beside a forward pass."""
        self.length, self.step, self._from_start = length, None, False
        for table in self.on_device.values():
            table.table = None
        for layer in self.layers:
            layer.length = length
        self._expected = self.inputs = None
        self.unfinished = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch that a layer has taken, padding included.

        Raises:
            ValueError: PEFT would put a cache of its own in this one's place.
        """
        model = None if any(self.rows.tokens) else self._model()
        if model is not None:
            inputs.refuse_other_cache(model)
        return super().get_seq_length(layer_idx)

    # -- a forward pass ----------------------------------------------------------------------------

    def expect(self, layer: PagedLayer) -> None:
        """A layer hands out its new keys: the attention function must have read those before."""
        waiting, self._expected = self._expected, layer
        if waiting is None or waiting is layer:
            return
        if self.unfinished and self.step is not None and layer.number in self.step.entered:
            self._refuse_broken()  # that was an earlier forward pass
        raise ValueError(
            f"layer {waiting.number} did not pass its keys on to the attention function as the "
            f"cache gave them: a model of type {self.config.model_type!r} cannot use a "
            "PagedCache; use transformers' DynamicCache"
        )

    def enter(self, layer: PagedLayer, batch: int, new: int, mask: Tensor | None) -> Step:
        """The step in which `layer` gets `new` columns of `batch` rows; its first layer begins it.

        `mask` is ``[B, length + new]`` bool, False for padding; None for none.
        """
        self._expected = None
        if not self.unfinished:
            self.step = self._begin(batch, new, mask, layer.device)
        step = self.step
        if step is None or layer.number in step.entered or layer.length != step.length:
            self._refuse_broken()
        assert step is not None and new == step.new, "a layer took other columns than the first"
        step.entered.add(layer.number)
        return step

    def wrote(self, layer: PagedLayer) -> None:
        """A layer's pages hold the step's tokens. The step counts when they all do."""
        step = self.step
        assert step is not None and layer.number in step.entered
        step.written.add(layer.number)
        layer.length = step.length + step.new
        if len(step.written) < len(self.layers):
            return
        self.length = layer.length
        if self.rows.history.complete and not (self._state is not None and self._state.holds()):
            self.rows.history.give_up()  # the model was changed between these tokens
        self.unfinished = False

    def _begin(self, batch: int, new: int, mask: Tensor | None, device: torch.device) -> Step:
        self._settle()
        rows = self.rows
        real = [new] * batch
        # looking waits for a GPU: worth it once per prompt, not at every step
        if mask is not None and (new > 1 or mask.device.type == "cpu"):
            real = real_tokens(mask[:, -new:], batch, new)
            inputs.check_earlier(mask[:, :-new], self.rows.tokens, batch)
        given, self.inputs = self.inputs, None
        if not rows.tokens:
            model = None if given is None or given.ids is None else given.model()
            self._state = None if model is None else model_state.read(model)
            rows.begin(batch, None if self._state is None else self._state.key)
        elif self._from_start and batch % len(rows.tokens) == 0:
            self.batch_repeat_interleave(batch // len(rows.tokens))
            self._from_start = True
        if batch != len(rows.tokens):
            raise ValueError(
                f"this cache holds {len(rows.tokens)} rows and got {batch}: call cache.start(...) "
                "or cache.reset() before other prompts"
            )
        why = self._not_shared(given, batch, new, real)
        if why is not None and self.resumed:
            inputs.refuse_resuming(self.length, why)
        self._from_start = False
        ids = given.ids if given is not None and why is None else None
        before = rows.tokens
        self.unfinished = True
        try:
            changes = rows.extend(
                real, new, ids, self._page_bytes, None if given is None else given.positions
            )
        except OutOfPagesError:  # nothing was changed
            self.unfinished = False
            raise
        for layer in self.layers:
            layer.copy_pages(changes[layer.window].copies)
        for window, table in self.on_device.items():
            table.update(rows.tables[window], changes[window], device)
        last = self.step
        held = last.grown if last is not None and last.grown.device == device else None
        if held is None:
            held = torch.tensor(before, dtype=torch.int32).to(device)
        count: int | Tensor = new
        if real != [new] * batch:
            count = torch.tensor(real, dtype=torch.int32).to(device)
        return Step(self.length, new, before, rows.tokens, held, held + count)

    @property
    def resumed(self) -> bool:
        """Whether start() has found pages, and the call that goes on from them is still to come."""
        return self._from_start and any(self.rows.tokens)

    def _not_shared(
        self, given: ForwardInputs | None, batch: int, new: int, real: list[int]
    ) -> str | None:
        """Why the new tokens' pages are not told by their ids, None if they are."""
        if not self.rows.history.complete:
            return "what is not known by its tokens"
        if given is None:
            return "inputs that no hook of this cache has seen"
        if given.ids is None:
            return given.why or "no input_ids"
        if tuple(given.ids.shape) != (batch, new):
            return f"input_ids of shape {list(given.ids.shape)} for {[batch, new]} keys"
        positions, before = given.positions, self.rows.tokens
        if not self._from_start and new == 1 and all(real) and positions is not None:
            return None  # looked at when somebody asks: see History.add
        if not inputs.counts_tokens(positions, before, real, self.length, new):
            return "position_ids that are not the tokens' places in their rows"
        if not self._from_start:
            return None
        if given.mask_columns not in (None, self.length + new):
            return f"an attention_mask of {given.mask_columns} columns for {self.length + new}"
        if self._state is None or self._model() is not given.model() or not self._state.holds():
            return "another model, or one that was changed since"
        return None

    def _settle(self) -> None:
        self._refuse_broken()
        self.unfinished = True
        self.rows.settle()
        self.unfinished = False

    def _refuse_broken(self) -> None:
        if self.unfinished:
            behind = [x.number for x in self.layers if self.step and x.length == self.step.length]
            raise ValueError(
                "a forward pass with this cache ended halfway, so its layers hold different "
                f"tokens (behind are layers {behind}): call cache.start(...) or cache.reset() and "
                "begin again"
            )

    def _page_bytes(self) -> dict[Window, int]:
        """Bytes of a page over all layers of a window; unused layers count like the others."""
        known = [layer.bytes_per_page for layer in self.layers if layer.is_initialized]
        guess = sum(known) // len(known) if known else 0
        sizes = dict.fromkeys(self.rows.tables, 0)
        for layer in self.layers:
            sizes[layer.window] += layer.bytes_per_page if layer.is_initialized else guess
        return sizes


def _same(state: ModelState | None, earlier: ModelState | None) -> bool:
    return state is not None and earlier is not None and state.key == earlier.key
