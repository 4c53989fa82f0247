"""convert(): source folder -> converted folder, one layer's tensors in memory at a time."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import CONFIG, INDEX
from .layer import config_after, convert_layer
from .output import atomic_folder, write_json
from .plan import ConversionPlan, Work, plan_conversion
from .safetensors_file import TensorInfo, tensor_bytes, write_file

# (bytes done, bytes in all, tensor just written)
Progress = Callable[[int, int, str], None]

RECORD = "conversion.json"  # how the folder was made, beside its config.json


@dataclass(frozen=True)
class ConvertResult:
    plan: ConversionPlan
    dry_run: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            **self.plan.to_json(),
            "dry_run": self.dry_run,
            "seconds": round(self.seconds, 3),
        }


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    num_key_value_heads: int,
    method: str = "mean",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Write to `dst` the checkpoint `src` with another number of KV heads.

    More heads (a multiple) is exact: each head is repeated. Fewer are merged by `method`, see
    `METHODS`. The stored dtype is kept; arithmetic is one precision wider. `dst` appears under
    its name only when complete, with tokenizer, templates and licence copied. With `dry_run`
    nothing is written and the result carries the plan.

    Raises ValueError for misuse or bad input, OSError when the disk refuses or is too small.
    """
    start = time.perf_counter()
    work = plan_conversion(src, dst, num_key_value_heads=num_key_value_heads, method=method)
    plan = work.plan
    if not dry_run:
        if plan.disk_needed > plan.disk_free:
            raise OSError(
                errno.ENOSPC,
                f"{plan.target} needs {plan.disk_needed:,} bytes, {plan.disk_free:,} are free",
            )
        with atomic_folder(Path(dst)) as folder:
            _write(work, folder, progress or (lambda done, total, name: None))
    return ConvertResult(plan, dry_run, time.perf_counter() - start)


def _write(work: Work, folder: Path, progress: Progress) -> None:
    for file in work.source.side_files():
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(work.source.folder / file, folder / file)
    tensors = _Tensors(work)
    done, weight_map = 0, {}
    for shard in work.source.shards:
        kept = [work.info_after(i) for n, i in shard.tensors.items() if n not in work.dropped]

        def data(info: TensorInfo) -> Iterator[memoryview]:
            nonlocal done
            yield from tensors.chunks(info.name)
            done += info.nbytes
            progress(done, work.plan.bytes_after, info.name)

        write_file(folder / shard.path.name, kept, data, metadata={"format": "pt"})
        weight_map.update({info.name: shard.path.name for info in kept})
    if work.source.sharded:
        index = {"metadata": {"total_size": work.plan.bytes_after}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    record = folder / RECORD
    record.unlink(missing_ok=True)  # the source's own, if it was converted too
    write_json(record, _record(work.plan))
    write_json(folder / CONFIG, config_after(work))


class _Tensors:
    """The output's tensors: copied as bytes, or computed layer by layer."""

    def __init__(self, work: Work) -> None:
        self.work = work
        # A layer's results that wait for their turn: its tensors may lie in two shards.
        self.ready: dict[str, Tensor] = {}

    def chunks(self, name: str) -> Iterator[memoryview]:
        place = self.work.changed.get(name)
        if place is None:
            return self.work.source.chunks(name)
        if name not in self.ready:
            self.ready.update(convert_layer(self.work, place.layer))
        return iter([tensor_bytes(self.ready.pop(name))])


def _record(plan: ConversionPlan) -> dict[str, Any]:
    """Provenance without paths: a folder is passed on, its maker's file system is not."""
    public = replace(plan, source=Path(plan.source).name, target=Path(plan.target).name)
    left_out = ("disk_needed", "disk_free")
    return {k: v for k, v in public.to_json().items() if k not in left_out}
