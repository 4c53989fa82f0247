"""In which order the forward's blocks should start: a model of a causal call, not a measurement.

    PYTHONPATH=.:kernels python scripts/experiments/schedule_model.py

A GPU holds a number of blocks at a time and starts the next whenever one ends. For each causal
shape of the benchmark's forward slice the blocks get a cost in cycles, their passes through the hot
loop and what a block does once, and the time to the last one's end is compared with that of an even
share for all:

    head by head    the longest of a head first, then the next head
    heavy first     the longest of as many heads as fit the cache, then the next longest (ours)
    persistent      one block per place, which takes every n-th tile of heavy first, to and fro

The matrix rate is that of an H200's data sheet; the other numbers in `Model` are guesses, the same
for all orders. The persistent loop's advantage is that it starts no blocks. Needs no GPU.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, for its packages


@dataclass(frozen=True)
class Model:
    """Blocks of 128 queries by 64 keys, head_dim 128; cycles of a multiprocessor."""

    places: int = 2 * 132  # two blocks on each multiprocessor
    block_m: int = 128
    block_n: int = 64
    cycles_pass: int = 2 * 1024  # both blocks share its tensor cores
    once: int = 1500  # the first tiles' way here, the result's way back
    start: int = 700  # to start a block


def passes(seq: int, block: int, model: Model) -> int:
    """Of the loop over keys, for a block of a causal square."""
    return -(-min(seq, (block + 1) * model.block_m) // model.block_n)


def tiles(seq: int, heads: int, together: int, model: Model) -> Iterator[int]:
    """Cost of each block, `together` heads going block by block, the longest first."""
    blocks = -(-seq // model.block_m)
    for first in range(0, heads, together):
        some = min(together, heads - first)
        for block in reversed(range(blocks)):
            cost = model.once + passes(seq, block, model) * model.cycles_pass
            yield from [cost] * some


def started_when_free(costs: Sequence[int], model: Model) -> int:
    """When the last block ends, if each starts where one has ended."""
    places = [0] * model.places
    for cost in costs:
        heapq.heapreplace(places, places[0] + model.start + cost)
    return max(places)


def to_and_fro(costs: Sequence[int], model: Model) -> int:
    """When the last place is done, if the tiles are dealt out beforehand, like cards."""
    places = [0] * model.places
    for number, cost in enumerate(costs):
        row, at = divmod(number, model.places)
        places[at if row % 2 == 0 else model.places - 1 - at] += cost
    return max(places)


def ratios(seq: int, heads: int, together: int, model: Model) -> dict[str, float]:
    """Each order's time, as a multiple of an even share of the blocks' own."""
    by_head = list(tiles(seq, heads, 1, model))
    ours = list(tiles(seq, heads, together, model))
    even = max(sum(by_head) / model.places, max(by_head))
    return {
        "head by head": started_when_free(by_head, model) / even,
        "heavy first": started_when_free(ours, model) / even,
        "persistent": to_and_fro(sorted(by_head, reverse=True), model) / even,
    }


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(argv)
    from bench.gpu import SLICES

    from hf_attn_kernels.problem import Pattern
    from hf_attn_kernels.triton.launch import heads_together

    model, causal = Model(), Pattern(scaling=1.0, window_right=0)
    for shape in SLICES["forward"]:
        if not shape.causal or shape.window is not None or shape.head_dim != 128:
            continue
        group, heads_kv = shape.heads_q // shape.heads_kv, shape.batch * shape.heads_kv
        together = heads_together(causal, heads_kv, shape.seq_k * shape.head_dim * 2 * 2) * group
        found = ratios(shape.seq_q, shape.batch * shape.heads_q, together, model)
        print(shape, *(f"{name} {ratio:.2f}" for name, ratio in found.items()), sep=", ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
