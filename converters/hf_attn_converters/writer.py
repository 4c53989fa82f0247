"""The streaming writer: the output's files one by one, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .card import CARD, RECORD, card_text, make_record, read_card
from .conversion import Work
from .heads.layer import convert_layer
from .io.atomic_output import Partial, copy_file, sync_folder, write_json, write_text
from .io.checkpoint import CONFIG, INDEX
from .io.safetensors_reader import TensorInfo, read_header
from .io.safetensors_writer import tensor_bytes, write_file
from .verify import Verification

# (done, in all, what was done last)
Progress = Callable[[int, int, str], None]

_LAYERS_HELD = 2  # a layer may straddle two files


@dataclass(frozen=True)
class Layers:
    """The tensors that a conversion computes."""

    where: Mapping[str, int]  # name -> the layer that it is computed with
    load: Callable[[int], Mapping[str, Tensor]]  # a layer's tensors by name


def write_weights(work: Work, partial: Partial, layers: Layers, progress: Progress) -> None:
    """Write every weights file that the journal lacks, the index, and all side files.

    `progress` counts bytes. After this the folder can be loaded, but does not say how it was
    made: see `write_about`.
    """
    folder, source = partial.folder, work.source
    for file in source.side_files():
        if file.name not in (work.files_left_out | {CARD, RECORD}):
            copy_file(source.folder / file, folder / file)
    for name, text in work.extra_files.items():
        write_text(folder / name, text)
    tensors = _Tensors(work, layers)
    done, weight_map = 0, {}
    for shard in source.shards:
        source_infos = [i for n, i in shard.tensors.items() if n not in work.dropped]
        kept = [info for old in source_infos for info in work.infos_after(old)]
        if not kept:
            continue
        name = shard.output_name
        weight_map.update({info.name: name for info in kept})
        if name in partial.journal.finished:
            done += sum(info.nbytes for info in kept)
            progress(done, work.plan.bytes_after, name)
            continue

        def data(info: TensorInfo) -> Iterator[memoryview]:
            nonlocal done
            yield from tensors.chunks(info.name)
            done += info.nbytes
            progress(done, work.plan.bytes_after, info.name)

        finished = write_file(folder / name, kept, data, metadata={"format": "pt"})
        sync_folder(folder)
        partial.journal.add(finished)
    if source.sharded:
        index = {"metadata": {"total_size": work.plan.bytes_after}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    write_json(folder / CONFIG, work.form.config(work))


def write_about(
    work: Work,
    folder: Path,
    *,
    calibration: Mapping[str, Any] | None,
    verification: Verification | None,
) -> None:
    """Write how the output was made: the record, and the model card with its section."""
    found = None if verification is None else verification.to_json()
    record = make_record(work, calibration=calibration, verification=found)
    write_json(folder / RECORD, record)
    write_text(folder / CARD, card_text(read_card(work.source.folder), record))


def computed_layers(work: Work) -> Layers:
    """Layers as they are asked for, each from the source's weights alone."""
    return Layers(
        where={name: place.layer for name, place in work.changed.items()},
        load=lambda layer: convert_layer(work, layer),
    )


def stored_layers(folder: Path) -> Layers:
    """Layers computed ahead of time: `folder` holds one file for each."""
    shards = {int(path.stem): read_header(path) for path in folder.glob("[0-9]*.safetensors")}

    def load(layer: int) -> dict[str, Tensor]:
        return {name: shards[layer].read(name) for name in shards[layer].tensors}

    return Layers(
        where={name: layer for layer, shard in shards.items() for name in shard.tensors}, load=load
    )


class _Tensors:
    """The output's tensors: copied as bytes, turned into another form, or taken from layers."""

    def __init__(self, work: Work, layers: Layers) -> None:
        self.work, self.layers = work, layers
        # Results that wait for their turn, by layer. Bounded: were a file sorted by role rather
        # than by layer, layers would be computed again instead of filling the memory.
        self.waiting: dict[int, dict[str, Tensor]] = {}

    def chunks(self, name: str) -> Iterable[memoryview]:
        layer = self.layers.where.get(name)
        if layer is not None:
            return [tensor_bytes(self._of_layer(layer, name))]
        info = self.work.source.shard_of(name).tensors[name]
        turn = self.work.rewrite(info)
        if turn is not None:
            return [tensor_bytes(turn(self.work.source.read(name)))]
        return self.work.source.chunks(name)

    def _of_layer(self, layer: int, name: str) -> Tensor:
        if name not in self.waiting.get(layer, {}):
            self.waiting.pop(layer, None)
            while len(self.waiting) >= _LAYERS_HELD:
                self.waiting.pop(next(iter(self.waiting)))
            self.waiting[layer] = dict(self.layers.load(layer))
        tensor = self.waiting[layer].pop(name)
        if not self.waiting[layer]:
            del self.waiting[layer]
        return tensor
