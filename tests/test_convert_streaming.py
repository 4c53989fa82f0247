"""Output appears complete or not at all, and memory stays small."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import contents, edit_config, tiny_checkpoint

from hf_attn_converters import convert
from hf_attn_converters import output as output_module
from hf_attn_converters import plan as plan_module


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
    convert(sys.argv[1], sys.argv[2], num_key_value_heads=1, progress=progress)
"""


@pytest.mark.parametrize("after", [1, 9, 20], ids=lambda n: f"after-{n}-tensors")
def test_a_kill_leaves_nothing_under_the_final_name(after: int, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "a", kv_heads=4, shard_size="10KB")
    before = contents(source)
    done = run_python(KILLED, source, tmp_path / "b", after)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "b").exists()
    assert (tmp_path / "b.partial").exists()
    assert not (tmp_path / "b.partial" / "config.json").exists()
    assert contents(source) == before

    convert(source, tmp_path / "b", num_key_value_heads=1)  # the next run replaces the remains
    convert(source, tmp_path / "undisturbed", num_key_value_heads=1)
    assert not (tmp_path / "b.partial").exists()
    mine, other = (contents(tmp_path / d) for d in ("b", "undisturbed"))
    assert {k: v for k, v in mine.items() if k != "conversion.json"} == {
        k: v for k, v in other.items() if k != "conversion.json"
    }


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
    monkeypatch.setattr(plan_module, "free_bytes", lambda target: 1000)
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
            convert(sys.argv[1], sys.argv[2], num_key_value_heads=1)
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


MEMORY = """
    import resource, sys
    import hf_attn_converters
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = peak()
    hf_attn_converters.convert(sys.argv[1], sys.argv[2], num_key_value_heads=1)
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
