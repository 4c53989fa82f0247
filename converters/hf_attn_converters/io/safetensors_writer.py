"""Writing one safetensors file: header first, then tensor by tensor, hashed on the way."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .journal import Finished
from .safetensors_reader import TensorInfo

_THREADED = 1 << 18  # bytes from which hashing beside writing is worth a hand-over
_WRITEBACK = 32 << 20  # bytes after which the system is asked to put them on the disk


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's bytes, without a copy."""
    assert tensor.is_contiguous()
    return memoryview(tensor.flatten().view(torch.uint8).numpy().data)


def header_bytes(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """What stands before the data: the header's length, and the header."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for info in tensors:
        end = position + info.nbytes
        header[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # data begins aligned
    return len(raw).to_bytes(8, "little") + raw


def write_file(
    path: Path,
    tensors: Sequence[TensorInfo],
    data: Callable[[TensorInfo], Iterable[memoryview]],
    metadata: Mapping[str, str],
) -> Finished:
    """Write a new file, header first, then each tensor as `data` gives it; fsync.

    All shapes are known beforehand, so memory holds two chunks of one tensor at a time: a chunk
    must stay as it is until the one after the next is asked for. Raises FileExistsError when
    there is such a file, OSError when the disk refuses.
    """
    header = header_bytes(tensors, metadata)
    with _sink(path) as sink:
        sink.write(memoryview(header))
        for info in tensors:
            begin = sink.size
            for chunk in data(info):
                sink.write(chunk)
            assert sink.size - begin == info.nbytes, (info, sink.size - begin)
        return Finished(path.name, sink.size, sink.finish())


class _Sink:
    """An open file that hashes what it writes, on a thread of its own."""

    def __init__(self, descriptor: int, pool: ThreadPoolExecutor) -> None:
        self.descriptor, self.pool = descriptor, pool
        self.digest = hashlib.sha256()
        self.hashing: Future[None] | None = None
        self.size = 0
        self.asked = 0  # bytes that the system was asked to put on the disk

    def write(self, chunk: memoryview) -> None:
        """Write a chunk. Its memory must stay as it is until the next call has begun to write."""
        chunk = chunk.cast("B")
        self._wait()
        if len(chunk) >= _THREADED:
            # Beside the writing, and beside the reading of the next: all let go of the GIL.
            self.hashing = self.pool.submit(self.digest.update, chunk)
        else:
            self.digest.update(chunk)
        done = 0
        while done < len(chunk):
            done += os.write(self.descriptor, chunk[done:])
        self.size += len(chunk)
        if self.size - self.asked >= _WRITEBACK:
            _hand_over(self.descriptor, max(0, self.asked - _WRITEBACK), self.size)
            self.asked = self.size

    def finish(self) -> str:
        """Put all on the disk; the sha256."""
        os.fsync(self.descriptor)
        self._wait()
        return self.digest.hexdigest()

    def _wait(self) -> None:
        if self.hashing is not None:
            self.hashing.result()
            self.hashing = None


def _hand_over(descriptor: int, begin: int, end: int) -> None:
    """Start writing what is new, and let go of the cached pages that are on the disk by now.

    Otherwise the last fsync waits for nearly the whole file, and an output larger than the
    memory crowds out what others have cached. On Linux DONTNEED does both, without waiting.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)


@contextmanager
def _sink(path: Path) -> Iterator[_Sink]:
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        yield _Sink(file.fileno(), pool)
