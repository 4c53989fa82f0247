"""What a model will cost to serve, from its config alone: KV bytes, roofline times, largest batch.

>>> from hf_attn_patch.estimate import estimate, find_device, read_shape
>>> shape = read_shape("model")                                        # doctest: +SKIP
>>> estimate(shape, find_device("h100"), batch=8, context=4096).decode.seconds   # doctest: +SKIP
"""

from .devices import DEVICES, Device, find_device
from .measured import Beside, beside
from .roofline import Estimate, Pass, estimate, kv_head_choices
from .shape import Layer, Shape, read_shape

__all__ = [
    "DEVICES",
    "Beside",
    "Device",
    "Estimate",
    "Layer",
    "Pass",
    "Shape",
    "beside",
    "estimate",
    "find_device",
    "kv_head_choices",
    "read_shape",
]
