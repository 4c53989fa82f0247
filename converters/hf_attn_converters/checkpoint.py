"""A source checkpoint: its folder checked at the door, its tensors read lazily by header."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .safetensors_file import Shard, TensorInfo, read_header, read_tensor, tensor_chunks

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Not carried over: weights in any format, their indexes, and what the output writes itself.
_WEIGHT_SUFFIXES = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx")
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FOLDERS = ("additional_chat_templates",)  # the one folder that belongs to a tokenizer


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
        return read_tensor(self.shard_of(name), name)

    def chunks(self, name: str) -> Iterator[memoryview]:
        return tensor_chunks(self.shard_of(name), name)

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
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, dict) else method
        raise ValueError(
            f"{folder} is quantized ({method}); convert the original or a dequantized checkpoint"
        )
    if (folder / SINGLE).exists():  # transformers' order, should both be there
        return Checkpoint(folder, config, (read_header(folder / SINGLE),), sharded=False)
    if (folder / INDEX).exists():
        return Checkpoint(folder, config, _open_sharded(folder), sharded=True)
    raise ValueError(_what_instead(folder))


def _open_sharded(folder: Path) -> tuple[Shard, ...]:
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{INDEX}: no weight_map")
    files = sorted({str(file) for file in weight_map.values()})
    for file in files:
        # By name only: in a hub cache every file is a link that leads out of its folder.
        if Path(file).name != file or file in ("", ".", "..") or "\\" in file or "\0" in file:
            raise ValueError(f"{INDEX}: {file!r} leads out of the folder; refused")
        if not file.endswith(".safetensors"):
            raise ValueError(f"{INDEX}: {file!r} is no safetensors file")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{INDEX} names {len(missing)} absent file(s): {', '.join(missing[:3])}")
    shards = tuple(read_header(folder / file) for file in files)
    found = {(name, shard.path.name) for shard in shards for name in shard.tensors}
    promised = {(name, str(file)) for name, file in weight_map.items()}
    if found != promised:
        name, file = min(found ^ promised)
        verb = "lacks" if (name, file) in promised else "does not name"
        who = file if verb == "lacks" else INDEX
        raise ValueError(f"{who} {verb} {name} ({file}); the checkpoint is inconsistent")
    return shards


def _what_instead(folder: Path) -> str:
    if any(any(folder.glob(pattern)) for pattern in _PICKLES):
        return (
            f"{folder} holds pickled weights only, which may run code; save them as safetensors "
            "first: model.save_pretrained(...) from a source that you trust"
        )
    if any(folder.glob("*.gguf")):
        return f"{folder} holds GGUF weights; load them with gguf_file= and save_pretrained first"
    return f"{folder} holds neither {SINGLE} nor {INDEX}"


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
