"""Checkpoint converters: MHA, GQA and MQA in both directions, streamed from disk to disk.

>>> from hf_attn_converters import convert
>>> convert("model", "model-mqa", num_key_value_heads=1)        # doctest: +SKIP

Methods that need no data need torch only: no model is built, and neither transformers nor triton
is imported. Calibration, GGUF and `verify` go through transformers.
"""

from .conversion import ConversionPlan
from .convert import ConvertResult, convert
from .families import FAMILIES, FamilySpec, family_of
from .heads.plan import plan_conversion
from .merge import METHODS, MergeMethod
from .verify import Verification, verify_output
from .writer import Progress

__all__ = [
    "FAMILIES",
    "METHODS",
    "ConversionPlan",
    "ConvertResult",
    "FamilySpec",
    "MergeMethod",
    "Progress",
    "Verification",
    "convert",
    "family_of",
    "plan_conversion",
    "verify_output",
]
