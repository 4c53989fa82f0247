"""One thread block of a machine for Gluon kernels: what its partitions share, and whose turn it is.

Partitions are threads, one of which runs at a time. Which one, when a copy lands and when a product
reads its operands is drawn from a seed, between the earliest and the latest moment that the machine
allows; memory that a copy may be overwriting is NaN. So a barrier that is missing shows: as NaN, as
a wrong number, as an arrival too many or as a standstill.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
EARLY = 0.3  # how often something under way ends before anybody has to wait for it


class Standstill(AssertionError):
    """Everybody waits and nothing is under way."""


class Tile(np.ndarray):  # type: ignore[type-arg]
    """A tensor in registers: float32, bfloat16 rounded to its numbers, or integers."""

    def to(self, dtype: Any) -> Tile:
        if dtype in (torch.bfloat16, torch.float16):
            rounded = torch.from_numpy(np.ascontiguousarray(self)).to(dtype).float().numpy()
            return rounded.view(Tile)
        return self.astype(dtype).view(Tile)


def tile(x: Any) -> Tile:
    found = np.asarray(x)
    return (found.astype(np.float32) if found.dtype == np.float64 else found).view(Tile)


@dataclass
class Shared:
    array: Array
    dtype: Any

    def index(self, i: int) -> Shared:
        return Shared(self.array[i], self.dtype)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.array.transpose(order), self.dtype)

    def reshape(self, shape: Sequence[int]) -> Shared:
        view = self.array.view()
        view.shape = tuple(shape)  # raises where it would copy
        return Shared(view, self.dtype)


class Barrier:
    """PTX's mbarrier: a phase ends when all arrivals and all expected bytes are there."""

    def __init__(self) -> None:
        self.count = self.missing = self.expected = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def change(self, arrivals: int, expected: int) -> None:
        self.missing -= arrivals
        self.expected += expected
        assert self.missing >= 0, "an arrival too many: a phase was run over"
        if self.missing == 0 and self.expected == 0:
            self.phase, self.missing = self.phase + 1, self.count

    def passed(self, parity: int) -> bool:
        return self.phase & 1 != parity


@dataclass(eq=False)
class Copy:
    source: Array
    barrier: Barrier
    target: Shared
    nbytes: int

    def end(self) -> None:
        self.target.array[...] = self.source
        self.barrier.change(0, -self.nbytes)


@dataclass(eq=False)
class Product:
    """``acc + a @ b`` of one warpgroup; operands in shared memory are read when it ends."""

    a: Any
    b: Shared
    acc: Any
    owner: int
    value: Tile | None = None

    def end(self) -> None:
        a = self.a.array if isinstance(self.a, Shared) else self.a
        acc = self.acc.value if isinstance(self.acc, Product) else self.acc
        self.value = tile(a @ self.b.array + (0 if acc is None else acc))


class Block:
    """One thread block: its partitions, their turns, and what they have started."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.turn = threading.Condition()
        self.running = -1
        self.ready: dict[int, Callable[[], bool]] = {}
        self.copies: list[Copy] = []
        self.products: dict[int, list[Product]] = {}
        self.failed: BaseException | None = None
        self.me = threading.local()

    def run(self, partitions: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
        def body(number: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
            self.me.number = number
            try:
                self.step()
                function(*arguments)
            except BaseException as error:  # handed to the caller below
                self.failed = self.failed or error
            with self.turn:
                self._choose()

        self.products = {i: [] for i in range(len(partitions))}
        self.ready = {i: lambda: False for i in range(len(partitions))}  # until they get there
        threads = [
            threading.Thread(target=body, args=(i, *partition), daemon=True)
            for i, partition in enumerate(partitions)
        ]
        self.ready = {}
        self.starting = len(threads)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failed is not None:
            raise self.failed
        left = [*self.copies, *(p for line in self.products.values() for p in line)]
        assert not left, "the block ended with work under way"

    def step(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Others may go on; comes back when it is its turn and `ready` holds."""
        me = self.me.number
        with self.turn:
            self.ready[me] = ready
            if self.starting:
                self.starting -= 1
            if not self.starting:
                self._choose()
            while self.running != me and self.failed is None:
                self.turn.wait()
            if self.failed is not None:
                raise self.failed
            del self.ready[me]

    def _choose(self) -> None:
        self.running = -1
        while self.ready and self.failed is None:
            while self.under_way and self.random.random() < EARLY:
                self._end_one()
            able = [number for number, ready in self.ready.items() if ready()]
            if able:
                self.running = self.random.choice(able)
                break
            if not self.under_way:
                self.failed = Standstill(f"partitions {sorted(self.ready)} wait for nothing")
            else:
                self._end_one()
        self.turn.notify_all()

    @property
    def under_way(self) -> list[Copy | Product]:
        """Copies end in any order, a warpgroup's products in that of their start."""
        return [*self.copies, *(line[0] for line in self.products.values() if line)]

    def _end_one(self) -> None:
        chosen = self.random.choice(self.under_way)
        if isinstance(chosen, Copy):
            self.copies.remove(chosen)
        else:
            self.products[chosen.owner].pop(0)
        chosen.end()
