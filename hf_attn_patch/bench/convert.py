"""Converter throughput and peak memory beside `cp` of the same checkpoint, in the same run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_attn_converters.io.safetensors_reader import TensorInfo

HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, VOCAB = 4096, 11008, 32, 128, 32000  # Llama 7B's
KV_BEFORE, KV_AFTER = 32, 8

# fmt: off
COLUMNS = [
    "impl", "source_bytes", "written_bytes", "shards", "layers", "kv_before", "kv_after", "rounds",
    "p20_ms", "p50_ms", "p80_ms", "mb_s", "of_cp", "peak_anon_bytes", "peak_rss_bytes",
    "group_bytes", "limit_bytes", "device", "threads", "torch", "triton", "transformers", "commit",
    "date",
]
# fmt: on

CONVERT = f"""
import json, sys
from hf_attn_converters import convert
result = convert(sys.argv[1], sys.argv[2], num_key_value_heads={KV_AFTER}, method="mean")
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({{"seconds": result.seconds, "hwm": int(status["VmHWM"].split()[0]) * 1024}}))
"""


@dataclass
class Sample:
    """One run: `seconds` without the interpreter's start, memory at its highest."""

    seconds: float
    peak_anon: int | None = None
    peak_rss: int | None = None


def make_source(folder: Path, gigabytes: float, shards: int) -> int:
    """Write a Llama-shaped checkpoint of about that size; returns its number of layers.

    Dense bytes, all written: a file with holes would flatter `cp`, which skips them.
    """
    from hf_attn_converters.io.safetensors_reader import TensorInfo
    from hf_attn_converters.io.safetensors_writer import write_file

    def weight(name: str, *shape: int) -> TensorInfo:
        return TensorInfo(f"model.{name}.weight", "BF16", shape)

    def layer(n: int) -> list[TensorInfo]:
        block, square = f"layers.{n}", (HIDDEN, HIDDEN)
        return [
            *(weight(f"{block}.self_attn.{role}_proj", *square) for role in "qkvo"),
            weight(f"{block}.mlp.gate_proj", INTERMEDIATE, HIDDEN),
            weight(f"{block}.mlp.up_proj", INTERMEDIATE, HIDDEN),
            weight(f"{block}.mlp.down_proj", HIDDEN, INTERMEDIATE),
            weight(f"{block}.input_layernorm", HIDDEN),
            weight(f"{block}.post_attention_layernorm", HIDDEN),
        ]

    ends = [
        weight("embed_tokens", VOCAB, HIDDEN),
        TensorInfo("lm_head.weight", "BF16", (VOCAB, HIDDEN)),
    ]
    per_layer = sum(info.nbytes for info in layer(0))
    layers = max(1, round((gigabytes * 1e9 - sum(i.nbytes for i in ends)) / per_layer))
    infos = [
        ends[0],
        *(i for n in range(layers) for i in layer(n)),
        weight("norm", HIDDEN),
        ends[1],
    ]
    total, done = sum(info.nbytes for info in infos), 0
    files: list[list[TensorInfo]] = [[] for _ in range(shards)]
    for info in infos:
        files[min(shards - 1, done * shards // total)].append(info)
        done += info.nbytes
    block = memoryview(_small_numbers(8 << 20))

    def data(info: TensorInfo) -> Iterable[memoryview]:
        left = info.nbytes
        while left:
            yield block[: min(left, len(block))]
            left -= min(left, len(block))

    weight_map = {}
    for i, file in enumerate(file for file in files if file):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write_file(folder / name, file, data, metadata={"format": "pt"})
        weight_map.update({info.name: name for info in file})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_BEFORE,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return layers


def _small_numbers(count: int) -> bytes:
    """Random finite bfloat16 numbers, as bytes."""
    import torch

    from hf_attn_converters.io.safetensors_writer import tensor_bytes

    torch.manual_seed(0)
    return bytes(tensor_bytes(torch.randn(count // 2).mul(0.02).bfloat16()))


def run_convert(source: Path, target: Path) -> Sample:
    """Convert in a process of its own, its memory watched from outside."""
    command = [sys.executable, "-c", CONVERT, str(source), str(target)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.01)
        assert process.stdout is not None
        answer = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"convert ended with {process.returncode}")
    found = json.loads(answer)
    return Sample(found["seconds"], peak, found["hwm"])


def _anonymous(pid: int) -> int:
    """Memory that is no file's, in bytes; 0 when the process has just ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def run_cp(source: Path, target: Path) -> Sample:
    """`cp -r`, then fsync of each file, as the converter does."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", *map(str, sorted(target.iterdir()))], check=True)
    return Sample(time.perf_counter() - start)


CONTENDERS: dict[str, Callable[[Path, Path], Sample]] = {
    "hf_attn_converters": run_convert,
    "cp": run_cp,
}


def measure(
    work: Path, gigabytes: float, shards: int, rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row per contender, all run in turn in every round."""
    from .results import environment, percentiles

    source, target = work / "source", work / "target"
    source.mkdir()
    layers = make_source(source, gigabytes, shards)
    samples: dict[str, list[Sample]] = {name: [] for name in CONTENDERS}
    written: dict[str, int] = {}
    for turn in range(rounds + 1):  # the first warms the source's pages and does not count
        for name in sorted(CONTENDERS, reverse=bool(turn % 2)):
            os.sync()
            sample = CONTENDERS[name](source, target)
            written[name] = _size(target)
            shutil.rmtree(target)
            say(f"round {turn}: {name} {sample.seconds:.2f} s")
            if turn:
                samples[name].append(sample)
    group = 4 * HIDDEN * HIDDEN * 2
    speeds = {
        name: written[name] / percentiles(s.seconds for s in runs).p50_ms / 1e6
        for name, runs in samples.items()
    }
    rows = []
    for name, runs in samples.items():
        anon = [s.peak_anon for s in runs if s.peak_anon is not None]
        rss = [s.peak_rss for s in runs if s.peak_rss is not None]
        row: dict[str, Any] = {
            "impl": name,
            "source_bytes": _size(source),
            "written_bytes": written[name],
            "shards": shards,
            "layers": layers,
            "kv_before": KV_BEFORE,
            "kv_after": KV_AFTER,
            "rounds": rounds,
            **{
                k: round(v, 1)
                for k, v in asdict(percentiles(s.seconds * 1e3 for s in runs)).items()
            },
            "mb_s": round(speeds[name], 1),
            "of_cp": round(speeds[name] / speeds["cp"], 3),
            "peak_anon_bytes": max(anon, default=""),
            "peak_rss_bytes": max(rss, default=""),
            "group_bytes": group,
            "limit_bytes": 2 * group + (300 << 20),
            **asdict(environment()),
        }
        rows.append(row)
    return rows


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def run(
    *,
    gigabytes: float = 4,
    shards: int = 8,
    rounds: int = 3,
    folder: Path | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure the converter and `cp`; append their rows to the CSV `out`.

    Args:
        gigabytes, shards: of the source, a Llama-shaped checkpoint made for this.
        rounds: counted runs of each.
        folder: where to work, with room for the source and one result; the temporary folder.

    Raises:
        ValueError: not Linux, too little disk, or a count below 1.
        RuntimeError: the converter failed.
    """
    if sys.platform != "linux":
        raise ValueError("memory is read from /proc, which only Linux has")
    needed = int(gigabytes * 2.2e9)
    free = shutil.disk_usage(folder or tempfile.gettempdir()).free
    if gigabytes <= 0 or shards < 1 or rounds < 1 or needed > free:
        raise ValueError(
            f"needs {needed:,} bytes of disk ({free:,} free), 1 shard and 1 round or more"
        )
    with tempfile.TemporaryDirectory(dir=folder) as work:
        rows = measure(Path(work), gigabytes, shards, rounds, say)
    if out is not None:
        from .results import append_table

        append_table(out, COLUMNS, rows)
    return rows
