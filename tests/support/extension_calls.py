"""What tests of the compiled CPU extension share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_attn_kernels.cpu import extension, extension_prefill


def count_prefills(patch: pytest.MonkeyPatch) -> list[object]:
    """A list that grows by each call of the compiled prefill from now on, however small and on
    whichever processor."""
    patch.setattr(extension_prefill, "CAPABILITY", "")
    patch.setattr(
        extension_prefill, "LEAST_PRODUCTS", dict.fromkeys(extension_prefill.LEAST_PRODUCTS, 0)
    )
    served: list[object] = []

    def counted(call: object) -> int:
        served.append(call)
        run = extension.library(extension.PREFILL)
        assert run is not None
        return run(call)

    def library(name: str) -> object:
        return extension.library(name) and counted

    patch.setattr(extension_prefill, "library", library)
    return served


def pretend(patch: pytest.MonkeyPatch, capability: str, pairs: bool) -> None:
    """As if torch had found a processor of this kind; one that multiplies pairs of bfloat16."""
    patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: pairs)


def pages(rows: list[Tensor], size: int, spare: int = 2) -> tuple[Tensor, Tensor]:
    """Shuffled pages ``[pages, size, H, D]``, NaN where nothing is, and their table."""
    counts = [-(-len(row) // size) for row in rows]
    order = torch.randperm(sum(counts) + spare).tolist()
    pool = torch.full((len(order), size, *rows[0].shape[1:]), float("nan")).to(rows[0].dtype)
    table = torch.full((len(rows), max(counts)), -1, dtype=torch.int32)
    for b, row in enumerate(rows):
        for block, part in enumerate(row.split(size)):
            table[b, block] = page = order.pop()
            pool[page, : len(part)] = part
    return pool, table
