"""Damaged headers, indexes, pickles and journals: a ValueError or a sound reading, nothing else."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_attn_converters.io.checkpoint import INDEX, open_checkpoint
from hf_attn_converters.io.journal import Finished, Journal, read_journal
from hf_attn_converters.io.pickle_reader import read_torch_file
from hf_attn_converters.io.safetensors_reader import read_header
from hf_attn_converters.io.safetensors_writer import write_file


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("good") / "model.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4).half()}, file, metadata={"format": "pt"})
    return file


quick = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@quick
@given(position=st.integers(0, 159), byte=st.integers(0, 255))
def test_fuzz_header_bytes(position: int, byte: int, good_file: Path, tmp_path: Path) -> None:
    """Any damaged byte: a ValueError, or a header that still agrees with the file."""
    data = bytearray(good_file.read_bytes())
    data[min(position, len(data) - 1)] = byte
    check_read(data, tmp_path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**25), 10**25)
    | st.floats()
    | st.sampled_from(["F32", "BF16", "F4", "X", "dtype", ""]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner)
    ),
    max_leaves=12,
)


@quick
@given(header=json_values | st.dictionaries(st.sampled_from(["a", "__metadata__"]), json_values))
def test_fuzz_header_json(header: object, tmp_path: Path) -> None:
    raw = json.dumps(header).encode()
    check_read(struct.pack("<Q", len(raw)) + raw + bytes(16), tmp_path)


def check_read(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "fuzzed.safetensors"
    file.write_bytes(data)
    try:
        shard = read_header(file)
    except ValueError:
        return
    total = sum(info.nbytes for info in shard.tensors.values())
    first = min(shard.offsets.values(), default=len(data))
    assert first + total == len(data)


@quick
@given(index=json_values | st.dictionaries(st.just("weight_map"), json_values))
def test_fuzz_index(index: object, good_file: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError):
        open_checkpoint(tmp_path)


def test_the_reader_agrees_with_safetensors(good_file: Path, tmp_path: Path) -> None:
    shard = read_header(good_file)
    assert {i.name: (i.dtype, i.shape) for i in shard.tensors.values()} == {
        "a": ("F32", (2, 3)),
        "b": ("F16", (4,)),
    }
    data = good_file.read_bytes()
    write_file(
        tmp_path / "copy.safetensors",
        list(shard.tensors.values()),
        lambda info: [memoryview(data)[shard.offsets[info.name] :][: info.nbytes]],
        metadata={"format": "pt"},
    )
    copy, original = load_file(tmp_path / "copy.safetensors"), load_file(good_file)
    assert copy.keys() == original.keys()
    assert all(torch.equal(copy[name], original[name]) for name in copy)


@pytest.fixture(scope="module")
def good_pickle(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("good") / "pytorch_model.bin"
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(4).half()}, file)
    return file.read_bytes()


@quick
@given(position=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.integers(0, 3))
def test_fuzz_pickle(
    position: int, byte: int, cut: int, good_pickle: bytes, tmp_path: Path
) -> None:
    """A damaged byte, and in some examples a lost end."""
    data = bytearray(good_pickle)
    data[position % len(data)] = byte
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(data[: len(data) - (position % 700 if cut == 0 else 0)])
    try:
        shard = read_torch_file(file)
    except ValueError:
        return
    for name, info in shard.tensors.items():
        assert sum(len(chunk) for chunk in shard.chunks(name)) == info.nbytes


@quick
@given(cut=st.integers(0, 400), position=st.integers(0, 400), byte=st.integers(0, 255))
def test_fuzz_journal(cut: int, position: int, byte: int, tmp_path: Path) -> None:
    """Whatever a kill or a bad disk leaves: some first entries, never wrong ones without notice."""
    files = [Finished(f"model-{n}.safetensors", n, "0" * 64) for n in range(3)]
    path = tmp_path / "journal"
    Journal(path, {"method": "mean"}, {file.name: file for file in files})
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:cut])
    torn = read_journal(path)[1]
    assert list(torn.values()) == files[: len(torn)]
    data[position % len(data)] = byte
    path.write_bytes(data)
    head, found = read_journal(path)
    assert isinstance(head, dict)
    assert len(found) <= len(files)
