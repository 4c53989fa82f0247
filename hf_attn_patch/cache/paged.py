"""PagedCache: a transformers cache whose keys and values lie in pages."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import Cache, PreTrainedModel, implementation_of
from ..models import mla
from ..swa_settings import OWN_WINDOWS, required
from .layer import PagedLayer, check_reader
from .rolling import layer_windows
from .rows import Rows, Window
from .stats import CacheStats, filled, percent
from .step import DeviceTable, Step

PAGE_SIZES = (16, 32, 64, 128, 256)
DTYPES = {None: None, "fp8": torch.float8_e4m3fn, torch.float8_e4m3fn: torch.float8_e4m3fn}


class PagedCache(Cache):
    """Keys and values in pages of a growing pool, for ``generate(..., past_key_values=cache)``.

    Rows of a batch share the pages of equal beginnings and copy them when they part (beams,
    ``num_return_sequences``, equal prompts). Padding takes no place. Pages that leave a layer's
    window are let go. Full pages stay findable by their tokens: :meth:`start`, called before
    ``generate()``, takes from them what a new prompt has in common with earlier rows. Kwon et al.,
    "PagedAttention" (2023).

    Padding comes before a row's tokens (``padding_side="left"``). Encoder-decoder models take
    ``EncoderDecoderCache(PagedCache(model), DynamicCache())``: cross-attention keeps plain tensors.

    Args:
        model: with one of our implementations; a hook on it tells the cache the token ids.
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
        if implementation_of(self.config) == mla.NAME:  # set after loading, maybe
            mla.prepare(model)
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
        self._ids: Tensor | None = None  # what the model is being called with
        self._expected: PagedLayer | None = None  # has handed out keys that nobody has read
        self._from_start = False  # rows may still be multiplied, as generate() does
        _watch(model, self)

    # -- between generations -----------------------------------------------------------------------

    def start(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> int:
        """Begin new rows, with what earlier ones have in common with them already there.

        Call it with the inputs of ``generate()``, then ``generate()`` with this cache. Prompts are
        matched in whole pages; at least the last token is left to compute.

        Args:
            input_ids: ``[B, S]``; attention_mask: ``[B, S]``, 0 for padding on the left.

        Returns:
            Columns of `input_ids` that need not be computed again.
        """
        real = real_tokens(attention_mask, *input_ids.shape)
        if not self._broken:
            self.rows.settle()
        ids = [row[len(row) - n :] for row, n in zip(input_ids.tolist(), real, strict=True)]
        column = self.rows.resume(ids, input_ids.shape[1], trust=not self._broken)
        self._moved(column)
        self._from_start = True
        return column

    def reset(self) -> None:
        """Forget everything and give the memory back."""
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
        self.rows.shorten(-tokens_to_remove)
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
            self.rows.select(indices)
            self._moved(self.length)

    def _moved(self, length: int) -> None:
        """Rows have changed beside a forward pass."""
        self.length, self.step, self._from_start = length, None, False
        for table in self.on_device.values():
            table.table = None
        for layer in self.layers:
            layer.length = length
        self._expected = None

    # -- a forward pass ----------------------------------------------------------------------------

    def expect(self, layer: PagedLayer) -> None:
        """A layer hands out its new keys: the attention function must have read those before."""
        waiting, self._expected = self._expected, layer
        if waiting is not None and waiting is not layer:
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
        if layer.length == self.length:
            self.step = self._begin(batch, new, mask, layer.device)
        step = self.step
        if step is None or layer.length != step.length or new != step.new:
            self._refuse_broken()
            raise AssertionError("a layer took other columns than the one before it")
        layer.length += new
        return step

    def _begin(self, batch: int, new: int, mask: Tensor | None, device: torch.device) -> Step:
        self._settle()
        rows = self.rows
        real = [new] * batch
        # looking waits for a GPU: worth it once per prompt, not at every step
        if mask is not None and (new > 1 or mask.device.type == "cpu"):
            real = real_tokens(mask[:, -new:], batch, new)
            self._check_earlier(mask[:, :-new], batch)
        if not rows.tokens:
            rows.begin(batch)
        elif self._from_start and batch % len(rows.tokens) == 0:
            self.batch_repeat_interleave(batch // len(rows.tokens))
        if batch != len(rows.tokens):
            raise ValueError(
                f"this cache holds {len(rows.tokens)} rows and got {batch}: call cache.start(...) "
                "or cache.reset() before other prompts"
            )
        self._from_start = False
        ids, self._ids = self._ids, None
        if ids is not None and tuple(ids.shape) != (batch, new):
            ids = None
        before = rows.tokens
        changes = rows.extend(real, new, ids, self._page_bytes)
        for layer in self.layers:
            layer.copy_pages(changes[layer.window].copies)
        for window, table in self.on_device.items():
            table.update(rows.tables[window], changes[window], device)
        length, self.length = self.length, self.length + new
        last = self.step
        held = last.grown if last is not None and last.grown.device == device else None
        if held is None:
            held = torch.tensor(before, dtype=torch.int32).to(device)
        count: int | Tensor = new
        if real != [new] * batch:
            count = torch.tensor(real, dtype=torch.int32).to(device)
        return Step(length, new, before, rows.tokens, held, held + count)

    def _check_earlier(self, mask: Tensor, batch: int) -> None:
        """Raises ValueError when a mask hides tokens that are in pages, or shows padding."""
        held = self.rows.tokens
        if len(held) != batch:  # empty, or to be multiplied
            held = [n for n in held for _ in range(batch // max(1, len(held)))]
        shown = mask.sum(-1).tolist()
        if shown != (held or [0] * batch):
            raise ValueError(
                f"the attention mask shows {shown} earlier tokens of the rows, this cache holds "
                f"{held}: pass the mask that they were computed with and ones for what was "
                "generated (without a mask generate() takes every pad token for padding)"
            )

    def _settle(self) -> None:
        self._refuse_broken()
        self.rows.settle()

    @property
    def _broken(self) -> bool:
        """Whether a forward pass has ended halfway."""
        return any(layer.is_initialized and layer.length != self.length for layer in self.layers)

    def _refuse_broken(self) -> None:
        if self._broken:
            raise ValueError(
                "a forward pass with this cache ended halfway, so its layers hold different "
                "tokens: call cache.start(...) or cache.reset() and begin again"
            )

    def _page_bytes(self) -> dict[Window, int]:
        """Bytes of a page over all layers of a window; unused layers count like the others."""
        known = [layer.bytes_per_page for layer in self.layers if layer.is_initialized]
        guess = sum(known) // len(known) if known else 0
        sizes = dict.fromkeys(self.rows.tables, 0)
        for layer in self.layers:
            sizes[layer.window] += layer.bytes_per_page if layer.is_initialized else guess
        return sizes


def real_tokens(mask: Tensor | None, batch: int, columns: int) -> list[int]:
    """How many of each row's columns are no padding, which must come first; mask ``[B, S]``."""
    if mask is None:
        return [columns] * batch
    if tuple(mask.shape) != (batch, columns):
        raise ValueError(
            f"the attention mask is {list(mask.shape)}, the tokens are {[batch, columns]}"
        )
    mask = mask.bool()
    count = mask.sum(-1)
    first = torch.arange(columns, 0, -1, device=mask.device)
    if not torch.equal(mask, first <= count[:, None]):
        raise ValueError(
            "a PagedCache takes padding only before a row's tokens; set "
            "tokenizer.padding_side='left', or use transformers' DynamicCache for other masks"
        )
    found: list[int] = count.tolist()
    return found


def _watch(model: nn.Module, cache: PagedCache) -> None:
    """Tell a cache, as long as it lives, the token ids of the model's forward passes with it."""
    reference = weakref.ref(cache)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alive, given = reference(), kwargs.get("past_key_values")
        if alive is None or alive not in (given, getattr(given, "self_attention_cache", None)):
            return
        ids = kwargs.get("decoder_input_ids", kwargs.get("input_ids", args[0] if args else None))
        alive._ids = ids if isinstance(ids, Tensor) else None

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    weakref.finalize(cache, handle.remove)
