"""One pickled weights file (`pytorch_model.bin`): tensors mapped from disk, code refused."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .safetensors_reader import CHUNK, FLOAT_DTYPES, Stamp, TensorInfo, check_unchanged
from .safetensors_writer import tensor_bytes

_DTYPES = {
    **{dtype: name for name, dtype in FLOAT_DTYPES.items()},
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class TorchShard:
    """A file of `torch.save`, with the same face as a safetensors `Shard`.

    Tensors that share memory (tied weights) stay separate names: each is written by itself.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    stamp: Stamp
    header_sha256: str  # over names, dtypes and shapes, as a pickle has no header
    values: Mapping[str, Tensor]  # mapped: the bytes stay on disk until they are read

    @property
    def output_name(self) -> str:
        return self.path.with_suffix(".safetensors").name.replace("pytorch_model", "model", 1)

    def read(self, name: str) -> Tensor:
        """One floating-point tensor, in memory of its own."""
        check_unchanged(self.path, self.stamp)
        return self.values[name].detach().clone(memory_format=torch.contiguous_format)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """One tensor's bytes, row-major, a chunk at a time."""
        check_unchanged(self.path, self.stamp)
        if not self.values[name].numel():
            return
        data = tensor_bytes(self.values[name].detach().contiguous())
        for begin in range(0, len(data), CHUNK):
            yield data[begin : begin + CHUNK]


def read_torch_file(path: Path) -> TorchShard:
    """Open a `torch.save` file without running code from it.

    Raises ValueError when it is damaged, needs code, or holds anything but tensors by name.
    """
    stamp = Stamp.of(path)
    values = _load(path)
    if not isinstance(values, Mapping):
        raise ValueError(f"{path.name} holds a {type(values).__name__}, not tensors by name")
    tensors: dict[str, TensorInfo] = {}
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path.name}: {name!r} is a {type(value).__name__}, not a tensor; a training "
                "checkpoint? Save model.state_dict() alone, or use save_pretrained"
            )
        if value.dtype not in _DTYPES or value.layout != torch.strided:
            raise ValueError(
                f"{path.name}: {name} is a {value.dtype} tensor ({value.layout}); possible: "
                f"{', '.join(_DTYPES.values())}, strided"
            )
        tensors[name] = TensorInfo(name, _DTYPES[value.dtype], tuple(value.shape))
    listing = repr([(i.name, i.dtype, i.shape) for i in tensors.values()])
    return TorchShard(path, tensors, stamp, hashlib.sha256(listing.encode()).hexdigest(), values)


def _load(path: Path) -> Any:
    mapped = _is_zip(path)  # torch before 1.6 wrote another form, which is read whole
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path.name}: refused: {_reason(str(error))}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails anywhere inside torch.load
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path.name} is damaged or truncated: {first}") from None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _reason(message: str) -> str:
    """The one thing in torch's long message that a user can act on."""
    if found := re.search(r"GLOBAL ([\w.]+)", message):
        return (
            f"the pickle asks for {found[1]}, which is code; if you trust whoever made it, load "
            "it there and save_pretrained as safetensors"
        )
    return message.splitlines()[0] if message else "no tensors-only pickle"
