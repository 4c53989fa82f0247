"""Output appears complete or not at all, and memory stays small."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import contents, edit_config, tiny_checkpoint

import hf_attn_converters
from hf_attn_converters import conversion as work_module
from hf_attn_converters import writer as writer_module
from hf_attn_converters.heads.layer import convert_layer
from hf_attn_converters.heads.plan import Work
from hf_attn_converters.io import atomic_output as output_module
from hf_attn_converters.io.checkpoint import INDEX
from hf_attn_converters.io.journal import sha256_of
from hf_attn_converters.io.safetensors_reader import CHUNK, TensorInfo, read_header
from hf_attn_converters.io.safetensors_writer import tensor_bytes, write_file

convert = functools.partial(hf_attn_converters.convert, method="mean")  # needs no data


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, where the converters can be imported."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


KILLED = """
    import os, signal, sys
    from hf_attn_converters import convert
    count = 0
    def progress(done, total, name):
        global count
        count += 1
        if count == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
    convert(sys.argv[1], sys.argv[2], num_key_value_heads=1, method="mean", progress=progress)
"""


def test_a_kill_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4, shard_size="10KB")
    before = contents(source)
    done = run_python(KILLED, source, tmp_path / "b", 9)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "b").exists()
    assert (tmp_path / "b.partial").exists()
    assert not (tmp_path / "b.partial" / "config.json").exists()
    assert contents(source) == before

    convert(source, tmp_path / "b", num_key_value_heads=1)  # the next run replaces the remains
    convert(source, tmp_path / "undisturbed" / "b", num_key_value_heads=1)
    assert not (tmp_path / "b.partial").exists()
    assert contents(tmp_path / "b") == contents(tmp_path / "undisturbed" / "b")


def test_an_error_cleans_up(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)

    def stop(done: int, total: int, name: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "b", num_key_value_heads=1, progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    monkeypatch.setattr(work_module, "free_bytes", lambda target: 1000)
    with pytest.raises(OSError, match=r"needs .* bytes, 1,000 are free") as caught:
        convert(source, tmp_path / "b", num_key_value_heads=1)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.skipif(os.name != "posix", reason="needs a file size limit")
def test_a_write_that_fails(tmp_path: Path) -> None:
    """The disk was large enough when asked, and then refuses."""
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    done = run_python(
        """
        import resource, sys
        from hf_attn_converters import convert
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            convert(sys.argv[1], sys.argv[2], num_key_value_heads=1, method="mean")
        except OSError as error:
            sys.exit(f"refused: {error}")
        """,
        source,
        tmp_path / "b",
    )
    assert done.returncode == 1
    assert "refused" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4, shard_size="10KB")
    seen: list[tuple[int, int, str]] = []
    result = convert(
        source, tmp_path / "b", num_key_value_heads=2, progress=lambda *step: seen.append(step)
    )
    assert seen[-1][0] == seen[-1][1] == result.plan.bytes_after
    assert len({name for _, _, name in seen}) == len(seen) == result.plan.tensors
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_an_empty_destination_is_used(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    (tmp_path / "b").mkdir()
    convert(source, tmp_path / "b", num_key_value_heads=1)
    assert (tmp_path / "b" / "config.json").exists()


def test_a_stranger_s_partial_folder_is_left_alone(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "thesis.txt").write_text("three years of work")
    with pytest.raises(ValueError, match="not ours"):
        convert(source, tmp_path / "b", num_key_value_heads=1)
    assert (tmp_path / "b.partial" / "thesis.txt").exists()


def test_the_marker_does_not_stay(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4)
    convert(source, tmp_path / "b", num_key_value_heads=1)
    assert not (tmp_path / "b" / output_module.MARKER).exists()


@pytest.fixture
def converted_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that are computed, in order."""
    layers: list[int] = []

    def watched(work: Work, layer: int) -> dict[str, torch.Tensor]:
        layers.append(layer)
        return convert_layer(work, layer)

    monkeypatch.setattr(writer_module, "convert_layer", watched)
    return layers


def test_a_layer_that_straddles_files_is_computed_once(
    tmp_path: Path, converted_layers: list[int]
) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4, layers=4, shard_size="10KB")
    index = json.loads((source / INDEX).read_text())["weight_map"]
    files = [{f for n, f in index.items() if f".{i}.self_attn" in n} for i in range(4)]
    assert max(map(len, files)) > 1
    convert(source, tmp_path / "b", num_key_value_heads=1)
    assert converted_layers == [0, 1, 2, 3]


def test_a_file_sorted_by_role_does_not_fill_the_memory(
    tmp_path: Path, converted_layers: list[int]
) -> None:
    """All K before all V: layers are computed again rather than all held."""
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4, layers=4)
    convert(source, tmp_path / "by-layer", num_key_value_heads=1)
    converted_layers.clear()
    shard = read_header(source / "model.safetensors")
    by_role = sorted(shard.tensors.values(), key=lambda info: info.name.split(".")[3:])
    write_file(tmp_path / "sorted", by_role, lambda i: shard.chunks(i.name), {"format": "pt"})
    (tmp_path / "sorted").replace(source / "model.safetensors")
    convert(source, tmp_path / "b", num_key_value_heads=1)
    assert len(converted_layers) == 8
    mine, other = (load_file(tmp_path / f / "model.safetensors") for f in ("b", "by-layer"))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_the_hash_is_of_what_was_written(tmp_path: Path) -> None:
    """Hashing goes on while the next chunk is read: no buffer is taken back too early."""
    rows = (3 * CHUNK + 40) // 4
    info = TensorInfo("x", "F32", (rows,))
    data = torch.arange(rows, dtype=torch.float32)
    write_file(tmp_path / "a.safetensors", [info], lambda _: [tensor_bytes(data)], {})
    shard = read_header(tmp_path / "a.safetensors")
    done = write_file(tmp_path / "b.safetensors", [info], lambda i: shard.chunks(i.name), {})
    assert done.sha256 == sha256_of(tmp_path / "b.safetensors")
    assert torch.equal(load_file(tmp_path / "b.safetensors")["x"], data)


MEMORY = """
    import resource, sys
    import hf_attn_converters
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = peak()
    hf_attn_converters.convert(sys.argv[1], sys.argv[2], num_key_value_heads=1, method="mean")
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A 256 MB checkpoint, whose largest tensor has 128 MB, within 64 MB."""
    hidden, rows = 1024, 1 << 16
    source = tiny_checkpoint(tmp_path / "a", heads=16, kv_heads=16, head_dim=64, layers=1)
    edit_config(source, vocab_size=rows, tie_word_embeddings=False)
    (source / "model.safetensors").unlink()
    base = "model.layers.0.self_attn"
    tensors = {f"{base}.{r}_proj.weight": torch.randn(hidden, hidden).bfloat16() for r in "qkvo"}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.zeros(rows, hidden, dtype=torch.bfloat16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    done = run_python(MEMORY, source, tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 << 20
