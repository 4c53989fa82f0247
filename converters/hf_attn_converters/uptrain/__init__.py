"""Uptraining: a converted checkpoint learns again from the one that it was converted from.

>>> from hf_attn_converters.uptrain import UptrainOptions, uptrain
>>> uptrain(UptrainOptions(student="model-mqa", teacher="model", text=("corpus.txt",),
...                        output="model-mqa-uptrained"))     # doctest: +SKIP

On transformers' Trainer and accelerate: one process, or many under `accelerate launch`. An
attention implementation that transformers does not know must be registered by the caller.
"""

from .hooks import Diverged, Estimate, Hooks
from .options import LOSSES, PRECISIONS, TRAINED, UptrainOptions
from .record import UPTRAIN_RECORD, recovered
from .run import UptrainResult, uptrain

__all__ = [
    "LOSSES",
    "PRECISIONS",
    "TRAINED",
    "UPTRAIN_RECORD",
    "Diverged",
    "Estimate",
    "Hooks",
    "UptrainOptions",
    "UptrainResult",
    "recovered",
    "uptrain",
]
