"""A source checkpoint: its folder checked at the door, its tensors read lazily by header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .pickle_reader import read_torch_file
from .reading import check_counts
from .safetensors_reader import Stamp, TensorInfo, check_unchanged, read_header

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Not carried over: weights in any format, their indexes, and what the output writes itself.
_WEIGHT_SUFFIXES = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx")
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Any of these and AutoTokenizer finds the rest itself.
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
)
_FOLDERS = ("additional_chat_templates",)  # the one folder that belongs to a tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether text can be read with what lies in a checkpoint's folder."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


class Shard(Protocol):
    """One weights file, in whatever format."""

    @property
    def path(self) -> Path: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    @property
    def stamp(self) -> Stamp: ...
    @property
    def header_sha256(self) -> str: ...
    @property
    def output_name(self) -> str: ...

    def read(self, name: str) -> Tensor: ...
    def chunks(self, name: str) -> Iterator[memoryview]: ...


@dataclass(frozen=True, kw_only=True)
class _Format:
    """How a folder may hold its weights: one file, or shards with an index."""

    single: str
    index: str
    suffix: str
    read: Callable[[Path], Shard]


# In transformers' own order, should a folder hold several.
_FORMATS = (
    _Format(single=SINGLE, index=INDEX, suffix=".safetensors", read=read_header),
    _Format(
        single="pytorch_model.bin",
        index="pytorch_model.bin.index.json",
        suffix=".bin",
        read=read_torch_file,
    ),
)


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    sharded: bool  # has an index

    def __iter__(self) -> Iterator[TensorInfo]:
        for shard in self.shards:
            yield from shard.tensors.values()

    def shard_of(self, name: str) -> Shard:
        return next(shard for shard in self.shards if name in shard.tensors)

    def read(self, name: str) -> Tensor:
        return self.shard_of(name).read(name)

    def chunks(self, name: str) -> Iterator[memoryview]:
        return self.shard_of(name).chunks(name)

    def check_unchanged(self) -> None:
        """Raises OSError when a weights file changed since it was opened."""
        for shard in self.shards:
            check_unchanged(shard.path, shard.stamp)

    def fingerprint(self) -> dict[str, Any]:
        """What the weights are, told by headers and files: cheap at any size."""
        return {shard.path.name: [*shard.stamp, shard.header_sha256] for shard in self.shards}

    def headers_sha256(self) -> str:
        """One hash over the headers (names, dtypes, shapes, offsets) of all weights files."""
        lines = (f"{shard.header_sha256}  {shard.path.name}\n" for shard in self.shards)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def side_files(self) -> list[Path]:
        """Tokenizer, chat template, generation config, licence...: paths below the folder."""
        files = [
            path
            for path in sorted(self.folder.iterdir())
            if path.is_file()
            and path.suffix.lower() not in _WEIGHT_SUFFIXES
            and not path.name.endswith(".index.json")
            and path.name != CONFIG
        ]
        for name in _FOLDERS:
            files += [path for path in sorted((self.folder / name).glob("*")) if path.is_file()]
        return [path.relative_to(self.folder) for path in files]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder in the Hugging Face format. Reads config, index and headers, no weights.

    Raises ValueError for whatever cannot be converted as it is, with what to do about it.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder; for a model on the hub: hf download NAME --local-dir {folder}"
        )
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an unmerged adapter; merge it first (peft: model.merge_and_unload())"
        )
    config = _read_json(folder / CONFIG)
    check_counts(config, folder)
    _refuse_quantized(folder, config)
    for form in _FORMATS:
        if (folder / form.single).exists():
            return Checkpoint(folder, config, (form.read(folder / form.single),), sharded=False)
        if (folder / form.index).exists():
            return Checkpoint(folder, config, _open_sharded(folder, form), sharded=True)
    raise ValueError(_what_instead(folder))


def _refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization
    if isinstance(quantization, dict):
        method = quantization.get("quant_method", quantization)
    raise ValueError(
        f"{folder} is quantized ({method}); convert the original checkpoint, or load this one, "
        "call model.dequantize() and save_pretrained (transformers has it for most methods)"
    )


def _open_sharded(folder: Path, form: _Format) -> tuple[Shard, ...]:
    index = form.index
    weight_map = _read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map")
    files = sorted({str(file) for file in weight_map.values()})
    for file in files:
        # By name only: in a hub cache every file is a link that leads out of its folder.
        if Path(file).name != file or file in ("", ".", "..") or "\\" in file or "\0" in file:
            raise ValueError(f"{index}: {file!r} leads out of the folder; refused")
        if not file.endswith(form.suffix):
            raise ValueError(f"{index}: {file!r} is no {form.suffix} file")
    if missing := [file for file in files if not _is_file(folder / file)]:
        raise ValueError(f"{index} names {len(missing)} absent file(s): {', '.join(missing[:3])}")
    shards = tuple(form.read(folder / file) for file in files)
    found = {(name, shard.path.name) for shard in shards for name in shard.tensors}
    promised = {(name, str(file)) for name, file in weight_map.items()}
    if found != promised:
        name, file = min(found ^ promised)
        verb = "lacks" if (name, file) in promised else "does not name"
        who = file if verb == "lacks" else index
        raise ValueError(f"{who} {verb} {name} ({file}); the checkpoint is inconsistent")
    return shards


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _what_instead(folder: Path) -> str:
    if found := sorted(folder.glob("*.gguf")):
        return f"{folder} holds GGUF weights; name the file: {found[0]}"
    if any(any(folder.glob(pattern)) for pattern in _PICKLES):
        return (
            f"{folder} holds pickles, but neither pytorch_model.bin nor its index; save the "
            "model as safetensors first: model.save_pretrained(...) where you trust the source"
        )
    return f"{folder} holds neither {SINGLE} nor {INDEX}, nor the same as pytorch_model.bin"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value
