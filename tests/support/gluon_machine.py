"""Gluon kernels run by threads: Triton's interpreter does not know Gluon.

`launch` calls a kernel's own source with a `gl` of numpy arrays, block by block (:mod:`gluon_block`
says what is random there, and what that shows). Layouts, which only a compiler can check, are not
looked at.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from gluon_block import Array, Barrier, Block, Copy, Product, Shared, Tile, tile


@dataclass
class Pointer:
    """Addresses in a tensor; outside of it none may be touched."""

    memory: Array
    dtype: Any
    offset: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.dtype, self.offset + more)

    def inside(self, mask: Any) -> tuple[Array, Array]:
        at, wanted = np.broadcast_arrays(self.offset, True if mask is None else mask)
        if ((at[wanted] < 0) | (at[wanted] >= self.memory.size)).any():
            raise IndexError("an element outside of the tensor")
        return at, wanted


@dataclass(frozen=True)
class Descriptor:
    """A tensor of which the copy engine takes tiles; what is outside of it reads as 0."""

    tensor: torch.Tensor
    block: tuple[int, ...]
    layout: None = None

    @property
    def dtype(self) -> Any:
        return self.tensor.dtype

    @property
    def block_type(self) -> Any:
        return SimpleNamespace(nbytes=int(np.prod(self.block)) * self.tensor.element_size())

    def read(self, at: Sequence[int]) -> Array:
        found = np.zeros(self.block, dtype=np.float32)
        assert all(a >= 0 for a in at)
        spans = tuple(slice(a, a + n) for a, n in zip(at, self.block, strict=True))
        inside = self.tensor[spans]
        found[tuple(slice(0, n) for n in inside.shape)] = inside.float().numpy()
        return found


def _names(block: Block, pid: int) -> dict[str, Any]:
    """`gl`, `mbarrier`, the copy and the products, for one block."""

    def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Tile:
        at, wanted = pointer.inside(mask)
        return tile(np.where(wanted, pointer.memory[np.where(wanted, at, 0)], other))

    def store(pointer: Pointer, value: Tile, mask: Any = None) -> None:
        at, wanted = pointer.inside(mask)
        pointer.memory[at[wanted]] = np.broadcast_to(value, at.shape)[wanted]

    def allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
        if dtype == np.int64:
            barriers = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=barriers.__getitem__)
        return Shared(np.full(shape, np.nan, dtype=np.float32), dtype)

    def copy(source: Descriptor, at: Sequence[int], barrier: Barrier, target: Shared) -> None:
        target.array[...] = np.nan
        nbytes = source.block_type.nbytes
        block.copies.append(Copy(source.read([int(a) for a in at]), barrier, target, nbytes))
        block.step()

    def multiply(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
        assert is_async
        product = Product(a, b, acc if use_acc else None, block.me.number)
        block.products[product.owner].append(product)
        block.step()
        return product

    def wait_products(num_outstanding: int, deps: Sequence[Any]) -> Any:
        block.step()
        mine = block.products[block.me.number]
        while len(mine) > num_outstanding:
            mine.pop(0).end()
        found = [dep.value if isinstance(dep, Product) else dep for dep in deps]
        assert all(value is not None for value in found), "used before its product has ended"
        return found[0] if len(found) == 1 else tuple(found)

    def wait(barrier: Barrier, phase: int) -> None:
        block.step(lambda: barrier.passed(int(phase)))

    def arrive(barrier: Barrier) -> None:
        barrier.change(1, 0)
        block.step()

    def nothing(*_: Any, **__: Any) -> None:
        return None

    gl = SimpleNamespace(
        constexpr=None, float32=np.float32, int64=np.int64,
        NVMMADistributedLayout=nothing, DotOperandLayout=nothing, SliceLayout=nothing,
        program_id=lambda axis: pid,
        arange=lambda start, end, layout: tile(np.arange(start, end, dtype=np.int32)),
        full=lambda shape, value, dtype, layout: tile(np.full(shape, value, dtype=dtype)),
        convert_layout=lambda x, layout: x, to_tensor=tile, load=load, store=store,
        where=lambda c, a, b: tile(np.where(c, a, b)), exp2=lambda x: tile(np.exp2(x)),
        log=lambda x: tile(np.log(x)), max=lambda x, axis: tile(np.max(x, axis)),
        sum=lambda x, axis: tile(np.sum(x, axis)), cdiv=lambda a, b: -(-a // b),
        maximum=_largest(np.maximum), minimum=_largest(np.minimum), static_range=range,
        allocate_shared_memory=allocate,
        warp_specialize=lambda partitions, warps, registers: block.run(partitions),
    )  # fmt: skip
    barriers = SimpleNamespace(
        init=lambda barrier, count: barrier.init(count), wait=wait, arrive=arrive,
        expect=lambda barrier, nbytes: barrier.change(1, nbytes), MBarrierLayout=nothing,
    )  # fmt: skip
    return {
        "gl": gl, "mbarrier": barriers, "load_tile": copy,
        "warpgroup_mma": multiply, "warpgroup_mma_wait": wait_products,
    }  # fmt: skip


def _largest(function: Any) -> Callable[[Any, Any], Any]:
    """Of two integers an integer, as a loop needs it, else a tile."""

    def found(a: Any, b: Any) -> Any:
        return (
            int(function(a, b))
            if isinstance(a, int) and isinstance(b, int)
            else tile(function(a, b))
        )

    return found


def _plain(kernel: Any, names: dict[str, Any]) -> FunctionType:
    """A Gluon kernel as Python, with all that its module holds as Python too."""
    scope = {**kernel.fn.__globals__}

    def function(jitted: Any) -> FunctionType:
        return FunctionType(jitted.fn.__code__, scope, jitted.fn.__name__)

    for name, value in kernel.fn.__globals__.items():
        if type(value).__name__ == "constexpr":
            scope[name] = value.value
        elif type(value).__name__ == "GluonJITFunction":
            scope[name] = function(value)
    scope.update(names)
    return function(kernel)


def launch(kernel: Any, grid: int, seed: int, **arguments: Any) -> None:
    """Run a kernel's blocks one after the other. Tensors are given as `Pointer` or `Descriptor`.

    Raises:
        Standstill, AssertionError, IndexError: what is said at the top of this file.
    """
    for pid in range(grid):
        names = _names(Block(seed * grid + pid), pid)
        with np.errstate(invalid="ignore", divide="ignore"):
            _plain(kernel, names)(**arguments)


def pointer(tensor: torch.Tensor) -> Pointer:
    """To a float32 copy of a contiguous tensor; read it back by `read_back`."""
    memory = tensor.float().contiguous().view(-1).numpy().copy()
    return Pointer(memory, SimpleNamespace(element_ty=tensor.dtype))


def read_back(found: Pointer, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(found.memory.copy()).view(like.shape)


def edited(kernel: Any, old: str, new: str) -> Any:
    """The kernel of a module whose source says `new` in the place of `old`."""
    source = Path(kernel.fn.__code__.co_filename).read_text()
    assert source.count(old) == 1, f"{old!r} stands there {source.count(old)} times"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edited.py"
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location("edited", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)  # Triton reads the source while its functions are made
    return getattr(module, kernel.fn.__name__)
