"""The roofline of prefill and decode: time is what the slower of arithmetic and memory takes.

Williams, Waterman and Patterson, "Roofline" (2009); for decode, Shazeer, "Fast Transformer
Decoding" (2019): each new token reads all weights once for the whole batch, and each sequence's
keys and values once for that sequence alone. docs/estimate.md writes the formulas out.
"""

from __future__ import annotations

from dataclasses import dataclass

from .devices import Device
from .shape import Layer, Shape

USABLE = 0.9  # share of the memory for weights and cache: the rest is for activations and others


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass of the whole batch."""

    tokens: int  # computed, of all sequences together
    flops: float
    bytes: float  # weights once, and keys and values
    compute_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    @property
    def bound(self) -> str:
        return "compute" if self.compute_seconds > self.memory_seconds else "memory"

    @property
    def tokens_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, kw_only=True)
class Estimate:
    kv_heads: int
    parameters: int
    kv_bytes_per_token: int
    kv_bytes: int  # of one sequence
    weight_bytes: int
    largest_batch: int  # 0: not even one sequence fits, or the weights do not
    prefill: Pass
    decode: Pass  # of one new token for each sequence, behind `context` others


def estimate(shape: Shape, device: Device, *, batch: int, context: int) -> Estimate:
    """What `batch` sequences of `context` tokens cost. Raises ValueError for less than one."""
    for name, value in (("batch", batch), ("context", context)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    held = shape.kv_bytes(context)
    room = USABLE * 1e9 * device.gbytes - shape.weight_bytes
    return Estimate(
        kv_heads=shape.kv_heads,
        parameters=shape.parameters,
        kv_bytes_per_token=shape.kv_bytes_per_token,
        kv_bytes=held,
        weight_bytes=shape.weight_bytes,
        largest_batch=max(0, int(room // held)) if held else 0,
        prefill=_prefill(shape, device, batch, context),
        decode=_decode(shape, device, batch, context),
    )


def kv_head_choices(shape: Shape) -> list[int]:
    """Numbers of KV heads that the query heads can share, most first; none for a latent cache."""
    if shape.latent or not shape.kv_heads:
        return []
    return [n for n in range(shape.query_heads, 0, -1) if shape.query_heads % n == 0]


def _prefill(shape: Shape, device: Device, batch: int, context: int) -> Pass:
    products = sum(_width(shape, layer) * _pairs(layer, context) for layer in shape.layers)
    flops = batch * (
        2 * active(shape) * context
        + 2 * shape.head_parameters  # only the last token's logits are wanted
        + 2 * shape.query_heads * products
    )
    moved = read_weights(shape, batch * context) + batch * shape.kv_bytes(context)
    return _pass(shape, device, batch * context, flops, moved)


def _decode(shape: Shape, device: Device, batch: int, context: int) -> Pass:
    products = sum(_width(shape, layer) * layer.seen(context) for layer in shape.layers)
    flops = batch * (2 * (active(shape) + shape.head_parameters) + 2 * shape.query_heads * products)
    moved = read_weights(shape, batch) + batch * shape.read_bytes(context)
    return _pass(shape, device, batch, flops, moved)


def _width(shape: Shape, layer: Layer) -> int:
    """Numbers of a query head that are multiplied per pair: in the scores, and in the sum."""
    return shape.qk_dim + shape.v_dim if shape.latent else layer.k_dim + layer.v_dim


def _pass(shape: Shape, device: Device, tokens: int, flops: float, moved: float) -> Pass:
    return Pass(
        tokens=tokens,
        flops=flops,
        bytes=moved,
        compute_seconds=flops / device.flops_s(shape.element_size),
        memory_seconds=moved / (1e9 * device.gbytes_s),
    )


def active(shape: Shape) -> float:
    """Parameters in the layers that one token is multiplied with."""
    share = shape.experts_used / shape.experts if shape.experts else 0
    return shape.layer_parameters - (1 - share) * shape.expert_parameters


def read_weights(shape: Shape, tokens: int) -> float:
    """Bytes of weights that a pass over `tokens` reads: those of the experts it is likely to meet.

    Each token takes its experts independently, so one stays untouched with (1 - k/E)^tokens.
    """
    missed = (1 - shape.experts_used / shape.experts) ** tokens if shape.experts else 0
    read = shape.layer_parameters + shape.head_parameters - missed * shape.expert_parameters
    return shape.element_size * read


def _pairs(layer: Layer, tokens: int) -> int:
    """Pairs of query and visible key under a causal mask: the sum of min(i, window)."""
    seen = layer.seen(tokens)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen
