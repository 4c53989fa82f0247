"""Does it fit? Said before anything is loaded, from the headers of the weights' files."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..io.checkpoint import Checkpoint
from .options import UptrainOptions

ADAM = 2  # numbers kept for each trained weight
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Need:
    """Bytes that weights, gradients and the optimizer take; activations come on top."""

    student: int
    teacher: int

    @property
    def total(self) -> int:
        return self.student + self.teacher


def need(options: UptrainOptions, weights: int, trained: int, teacher: Checkpoint | None) -> Need:
    """For a student of so many `weights`, of which so many are `trained`."""
    width = 2 if options.precision == "bf16-weights" else 4
    mine = (weights + trained * (1 + ADAM)) * width
    theirs = 0
    if teacher is not None:
        stored = sum(info.nbytes for info in teacher)
        theirs = numbers(teacher) * 4 if options.precision == "float32" else stored
    return Need(student=mine, teacher=theirs)


def in_one_memory(found: Need, *, on_cpu: bool) -> Need:
    """The part of one process, or of all processes on this machine where they share its memory.

    Of what FSDP and DeepSpeed shard, at least an equal part; below stage 3 the teacher is whole.
    """
    processes, here = (int(os.environ.get(n, 1)) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    copies, parts = here if on_cpu else 1, processes if is_sharded() else 1
    whole = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") in ("0", "1", "2")
    return Need(
        student=found.student * copies // parts,
        teacher=found.teacher * copies // (1 if whole else parts),
    )


def numbers(checkpoint: Checkpoint) -> int:
    """Weights of a checkpoint."""
    return sum(math.prod(info.shape) for info in checkpoint)


def check_fits(found: Need, free: int, place: str) -> None:
    """Raises ValueError, with by how much, where `found` is more than the `free` bytes."""
    if found.total > free:
        raise ValueError(
            f"teacher ({_gb(found.teacher)}) and student with gradients and optimizer "
            f"({_gb(found.student)}) take {_gb(found.total)}, {_gb(found.total - free)} more than "
            f"the {_gb(free)} that are free on {place}; use --precision bf16-weights, "
            "--train attention, or more devices (scripts/accelerate/fsdp2.yaml)"
        )


def uses_cpu(device: str | None) -> bool:
    return device == "cpu" or not torch.cuda.is_available()


def training_device(device: str | None) -> str:
    """Where the Trainer will run: an accelerator if there is one, unless cpu is asked for."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device == "cpu" or accelerator is None else accelerator.type


def free_bytes(device: str | None) -> tuple[int, str]:
    """(free memory of the device that training will run on, what to call it)."""
    if not uses_cpu(device):
        local = int(os.environ.get("LOCAL_RANK", 0))
        return torch.cuda.mem_get_info(local)[0], torch.cuda.get_device_name(local)
    import psutil

    free: int = psutil.virtual_memory().available
    try:  # a container may hold less than its machine
        most = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, most - used + int(stat["inactive_file"]))  # files are dropped on demand
    except (OSError, ValueError, KeyError):  # no limit
        pass
    return max(free, 0), "the CPU"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def is_sharded(*by: str) -> bool:
    """Whether `accelerate launch` was told to shard the model, by FSDP or DEEPSPEED (any)."""
    names = (f"ACCELERATE_USE_{name}" for name in by or ("FSDP", "DEEPSPEED"))
    return any(os.environ.get(name, "false").lower() in ("1", "true") for name in names)
