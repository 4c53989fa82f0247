"""GGUF sources: dequantized into a folder of safetensors, which is then converted as any other.

transformers reads GGUF, and undoes what llama.cpp did to names and rotary rows. It builds the
whole model, so here, and only here, memory grows with the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .atomic_output import write_json
from .checkpoint import CONFIG, INDEX, SINGLE
from .reading import reading
from .safetensors_reader import FLOAT_DTYPES, TensorInfo
from .safetensors_writer import header_bytes

GGUF = ".gguf"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}  # all other types: float16


def is_gguf(source: Path) -> bool:
    return source.suffix.lower() == GGUF and source.is_file()


@contextmanager
def described(file: Path) -> Iterator[Path]:
    """A temporary folder with what the dequantized checkpoint will be: config and headers.

    Its weights file has the right header and size, but is a hole: a plan needs no more. Raises
    ValueError when transformers cannot read the file, ImportError without gguf.
    """
    config, dtype = _open(file)
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), reading(file):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    name = next(key for key, value in FLOAT_DTYPES.items() if value == dtype)
    parameters = model.named_parameters()  # a tied one has one name
    infos = [TensorInfo(key, name, tuple(p.shape)) for key, p in parameters]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_json(folder / CONFIG, _without_quantization(config.to_dict()))
        header = header_bytes(infos, {"format": "pt"})
        with (folder / SINGLE).open("xb") as weights:
            weights.write(header)
            weights.truncate(len(header) + sum(info.nbytes for info in infos))
        yield folder


def dequantize(file: Path, folder: Path) -> None:
    """Write the GGUF `file` as a safetensors checkpoint into `folder`, with its tokenizer."""
    _, dtype = _open(file)
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with reading(file):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
        )
    model, found = loaded
    if found["missing_keys"]:  # transformers would fill them with random numbers
        raise ValueError(f"{file.name} lacks {', '.join(sorted(found['missing_keys'])[:3])}")
    # Dequantized it is, but save_pretrained goes by these two.
    if "quantization_config" in vars(model.config):
        del model.config.quantization_config
    if "hf_quantizer" in vars(model):
        del model.hf_quantizer
    model.save_pretrained(folder, max_shard_size="5GB")
    if "tokenizer.ggml.model" in GGUFReader(file).fields:
        with reading(file):
            AutoTokenizer.from_pretrained(
                file.parent, gguf_file=file.name, trust_remote_code=False
            ).save_pretrained(folder)
    if not any((folder / weights).exists() for weights in (SINGLE, INDEX)):
        raise OSError(f"{folder}: transformers wrote no safetensors")


def _open(file: Path) -> tuple[Any, torch.dtype]:
    """The configuration, and the dtype that holds the weight matrices after dequantization."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ImportError("GGUF sources need the gguf package: pip install gguf") from None
    from transformers import AutoConfig

    try:
        with reading(file):
            reader = GGUFReader(file)
            config = AutoConfig.from_pretrained(
                file.parent, gguf_file=file.name, trust_remote_code=False
            )
    except (ValueError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file.name} cannot be read as GGUF: {first}") from None
    kinds = {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1}
    # A 16-bit scale times a few bits fits float16 but for its last rounding.
    dtype = _DTYPES.get(kinds.pop(), torch.float16) if len(kinds) == 1 else torch.float16
    return config, dtype


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}
