"""One layer's keys and values in pages.

Shape letters: B batch, S new tokens, Hkv KV heads, D / Dv head_dim of keys / values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

import torch
from torch import Tensor

from hf_attn_kernels.fp8 import quantise

from ..capabilities import PAGE_READERS
from ..transformers_compat.compat import CacheLayerMixin, implementation_of
from .block_pool import NOBODYS

if TYPE_CHECKING:
    from .sequences import Rows
    from .step import DeviceTable, Step

ATTRIBUTE = "hf_attn_layer"  # on the keys that `update` returns
# the first tokens set the scale of float8 pages; later ones may be this many times as large
FP8_HEADROOM = 4.0
ROOM = 2  # on a CPU: times the pages in use, so that few steps wait for all to be copied


class Owner(Protocol):
    """What a layer asks of the cache that it belongs to, and the attention function through it."""

    config: Any
    layers: list[PagedLayer]
    page_size: int
    page_dtype: torch.dtype | None
    rows: Rows
    on_device: dict[int | None, DeviceTable]
    unfinished: Any

    def expect(self, layer: PagedLayer) -> None: ...

    def enter(self, layer: PagedLayer, batch: int, new: int, mask: Tensor | None) -> Step: ...

    def wrote(self, layer: PagedLayer) -> None: ...


def layer_of(keys: Tensor) -> PagedLayer | None:
    """The paged layer that keys come from, None for keys of any other cache."""
    return getattr(keys, ATTRIBUTE, None)


def check_reader(config: Any) -> None:
    """Raises ValueError unless a model's attention implementation can read a PagedCache."""
    name = implementation_of(config)
    if name not in PAGE_READERS:
        raise ValueError(
            f"a PagedCache is read by {', '.join(PAGE_READERS)}, this model has "
            f"attn_implementation={name!r}: load it with one of these, or use transformers' "
            "DynamicCache"
        )


def _dtype_of(x: Tensor) -> torch.dtype:
    """What attention computes in: under autocast that is not what comes in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _shapes(keys: Tensor, values: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """KV heads and head_dim of both."""
    (_, heads, _, dim), (_, heads_v, _, dim_v) = keys.shape, values.shape
    return (heads, dim), (heads_v, dim_v)


class PagedLayer(CacheLayerMixin):
    """Pages of one layer, ``[pages, page_size, Hkv, D]`` and ``[..., Dv]``.

    `update` stores nothing: it hands the new keys on with a mark, and the attention function, which
    knows the mask, has them written. That is why this works with our implementations only.
    """

    is_croppable = True
    is_sliding = False  # masks are made for all tokens; the kernels apply the window

    def __init__(self, cache: Owner, window: int | None, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window, self.number = window, number
        self.belong_to(cache)
        self.length = 0  # of the batch, padding included
        self.k_pages: Tensor | None = None
        self.v_pages: Tensor | None = None
        self.k_descale: Tensor | None = None  # [Hkv] float32, of float8 pages
        self.v_descale: Tensor | None = None
        self._room: tuple[Tensor, Tensor] | None = None  # of which k_pages and v_pages are the part
        self._on_host: tuple[list[int], Tensor, Tensor] | None = None

    def belong_to(self, cache: Owner) -> None:
        """Be a layer of `cache`, without keeping it alive: a cache that is dropped is freed."""
        self._cache = ref(cache)

    @property
    def cache(self) -> Owner:
        found = self._cache()
        if found is None:
            raise ValueError(
                f"the PagedCache of this layer {self.number} is gone: keep the cache, not its "
                "layers, as long as the model is called with them"
            )
        return found

    # -- transformers' side ------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        first = self.cache.layers[0]
        if first.is_initialized and first.device != key_states.device:
            raise ValueError(
                f"a PagedCache has all layers on one device; layer 0 is on {first.device} and "
                f"layer {self.number} on {key_states.device}: load the model on one device, or use "
                "transformers' DynamicCache"
            )
        self.device: torch.device = key_states.device
        self.shapes = _shapes(key_states, value_states)
        self.compute_dtype = _dtype_of(key_states)
        self.dtype = self.cache.page_dtype or self.compute_dtype
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``: the same, marked as this layer's."""
        cache = self.cache
        if not cache.unfinished:  # the step's first layer: reading a config takes time
            check_reader(cache.config)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_same_model(key_states, value_states)
        cache.expect(self)
        keys = key_states.view_as(key_states)  # the mark must not stay on somebody else's tensor
        setattr(keys, ATTRIBUTE, self)
        return keys, value_states

    def _check_same_model(self, keys: Tensor, values: Tensor) -> None:
        found, device, dtype = _shapes(keys, values), keys.device, _dtype_of(keys)
        if (found, device, dtype) != (self.shapes, self.device, self.compute_dtype):
            (heads, dim), _ = self.shapes
            raise ValueError(
                f"this cache's layer {self.number} holds {heads} KV heads of head_dim {dim} in "
                f"{self.compute_dtype} on {self.device}, and got {found[0][0]} of {found[0][1]} in "
                f"{dtype} on {device}: it belongs to another model; make a new PagedCache"
            )

    def get_seq_length(self) -> int:
        """Tokens of the batch, padding included."""
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The older name of :meth:`get_max_length`."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    # -- memory ------------------------------------------------------------------------------------

    @property
    def bytes_per_page(self) -> int:
        """Of keys and values; 0 before the first update."""
        if not self.is_initialized:
            return 0
        numbers = sum(heads * dim for heads, dim in self.shapes)
        return numbers * self.cache.page_size * self.dtype.itemsize

    @property
    def allocated(self) -> int:
        """Bytes on the device."""
        return sum(x.nbytes for x in (self.k_pages, self.v_pages) if x is not None)

    @property
    def pages(self) -> tuple[Tensor, Tensor]:
        """Keys and values, on the device and as large as the pool has become."""
        size = self.cache.rows.tables[self.window].pool.size
        if self._on_host is not None and self.k_pages is not None:
            self._on_host = None  # moving away broke off: these are the ones that count
        if self.k_pages is None or self.v_pages is None or self.k_pages.shape[0] < size:
            if self._room is None or self._room[0].shape[0] < size:
                old = (self.k_pages, self.v_pages)
                k, v = (self._more_room(*of, size) for of in zip(old, self.shapes, strict=True))
                self._room = (k, v)
            k, v = (room[:size] for room in self._room)
            if self._on_host is not None:
                self._fetch(k, v)
            self.k_pages, self.v_pages = k, v
        return self.k_pages, self.v_pages

    def _more_room(self, old: Tensor | None, shape: tuple[int, int], size: int) -> Tensor:
        """For `size` pages, the old ones copied."""
        if self.device.type == "cpu":  # what nobody has written takes no memory there
            limit = self.cache.rows.tables[self.window].pool.limit
            size = max(size, min(ROOM * size, limit or ROOM * size))
        heads, dim = shape
        room = torch.empty(
            size, self.cache.page_size, heads, dim, dtype=self.dtype, device=self.device
        )
        if old is not None:
            room[: old.shape[0]] = old
        return room

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Contents of the first page of each pair to the second."""
        if not pairs or not self.is_initialized:
            return
        source, target = torch.tensor(pairs, device=self.device).unbind(1)
        for x in self.pages:
            x[target] = x[source]

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Keys ``[B, S, Hkv, D]`` and values at `slots` ``[B, S]``: page * page_size + place.

        The last thing it does is to tell the cache.
        """
        self.set_scales(keys, values, slots)
        new = (self._stored(keys, self.k_descale), self._stored(values, self.v_descale))
        for pages, x in zip(self.pages, new, strict=True):
            pages.view(-1, *pages.shape[2:])[slots] = x
        self.cache.wrote(self)

    def set_scales(self, keys: Tensor, values: Tensor, slots: Tensor | None = None) -> None:
        """With float8 pages: choose the scales, once, by the first real tokens."""
        if self.cache.page_dtype is None or self.v_descale is not None:
            return
        largest, scales = torch.finfo(self.dtype).max, []
        for x in (keys, values):
            size = x.detach().abs().amax(-1).float()  # [B, S, Hkv]
            if slots is not None:
                size = size * (slots >= self.cache.page_size * (NOBODYS + 1))[..., None]
            top = size.amax((0, 1)).clamp_min(torch.finfo(torch.float32).tiny * largest)
            scales.append(top * (FP8_HEADROOM / largest))
        self.k_descale, self.v_descale = scales

    def _stored(self, x: Tensor, descale: Tensor | None) -> Tensor:
        return x if descale is None else quantise(x, descale[None])

    def to_host(self, used: list[int]) -> None:
        """Move the pages `used` to main memory and let go of the device's."""
        if self.k_pages is not None and self.v_pages is not None:
            k, v = (x[used].to("cpu") for x in (self.k_pages, self.v_pages))
            self._on_host = (used, k, v)
            self.k_pages = self.v_pages = self._room = None

    def _fetch(self, *pages: Tensor) -> None:
        """What was moved away, into pages that nobody uses yet; a failure loses nothing."""
        assert self._on_host is not None
        used, *stored = self._on_host
        for room, x in zip(pages, stored, strict=True):
            room[used] = x.to(self.device)
        self._on_host = None

    def reset(self) -> None:
        self.length = 0
        self.k_descale = self.v_descale = None
        self.k_pages = self.v_pages = self._room = self._on_host = None
