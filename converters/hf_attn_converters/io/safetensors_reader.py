"""Reading one safetensors file: its header checked, one tensor at a time.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the data without gaps (https://github.com/huggingface/safetensors#format). The header is
read and checked here, not by the safetensors package, because a converter plans from headers
alone and copies most tensors as bytes, never as tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_HEADER = 100_000_000  # bytes; the format's own limit
CHUNK = 1 << 23  # bytes copied at a time

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}
FLOAT_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class TensorInfo:
    name: str
    dtype: str  # as the header spells it: "BF16"
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return _BITS[self.dtype] * math.prod(self.shape) // 8


class Stamp(NamedTuple):
    """What tells that a file was changed: enough for a file that nobody disguises."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns)


def check_unchanged(path: Path, stamp: Stamp) -> None:
    """Raises OSError when a file is not the one that was planned with."""
    try:
        same = Stamp.of(path) == stamp
    except FileNotFoundError:
        same = False
    if not same:
        raise OSError(f"{path} was changed while it was being converted; begin again")


@dataclass(frozen=True)
class Shard:
    """A readable file: every tensor's description and where its bytes begin in the file."""

    path: Path
    tensors: dict[str, TensorInfo]  # in the order of the data
    offsets: dict[str, int]  # absolute
    stamp: Stamp
    header_sha256: str

    @property
    def output_name(self) -> str:
        return self.path.name

    def read(self, name: str) -> Tensor:
        """One floating-point tensor, in memory of its own."""
        info = self.tensors[name]
        assert sys.byteorder == "little", "safetensors data is little-endian"
        buffer = bytearray(info.nbytes)
        done = 0
        for chunk in self.chunks(name):
            buffer[done : done + len(chunk)] = chunk
            done += len(chunk)
        if not buffer:
            return torch.empty(info.shape, dtype=FLOAT_DTYPES[info.dtype])
        return torch.frombuffer(buffer, dtype=FLOAT_DTYPES[info.dtype]).view(info.shape)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """One tensor's bytes as stored, a chunk at a time.

        A chunk is valid until the one after the next is asked for, so that it can be hashed
        while the next is read.
        """
        left = self.tensors[name].nbytes
        check_unchanged(self.path, self.stamp)
        size = min(CHUNK, left)
        buffers = [memoryview(bytearray(size)) for _ in range(2)]
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offsets[name])
            while left:
                got = file.readinto(buffers[0][: min(size, left)])
                if not got:
                    raise OSError(f"{self.path}: ended while {name} was read")
                left -= got
                yield buffers[0][:got]
                buffers.reverse()


def read_header(path: Path) -> Shard:
    """Read and check a file's header. Raises ValueError that says how the file is broken."""
    stamp = Stamp.of(path)
    size = stamp.size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"{path.name}: truncated, or no safetensors file ({size} bytes)")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path.name}: the header is not a JSON object")

    found = []
    for name, entry in header.items():
        if name != "__metadata__":
            found.append(_entry(path, name, entry))
    found.sort(key=lambda item: (item[1], item[2]))
    position = 0
    for info, begin, end in found:
        if begin != position or end - begin != info.nbytes:
            raise ValueError(
                f"{path.name}: {info.name} ({info.dtype} {list(info.shape)}) needs {info.nbytes} "
                f"bytes at {position}, the header says {begin} to {end}"
            )
        position = end
    base = 8 + length
    if size != base + position:
        raise ValueError(
            f"{path.name}: truncated or damaged: {size} bytes, "
            f"its header asks for {base + position}; fetch the file again"
        )
    return Shard(
        path,
        {info.name: info for info, _, _ in found},
        {info.name: base + begin for info, begin, _ in found},
        stamp,
        hashlib.sha256(raw).hexdigest(),
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict):
        raise ValueError(f"{path.name}: the header's entry {name!r} is no object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{path.name}: {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise ValueError(f"{path.name}: {name!r} has the impossible shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ValueError(f"{path.name}: {name!r} has the impossible offsets {offsets!r}")
    return TensorInfo(name, dtype, tuple(shape)), offsets[0], offsets[1]
