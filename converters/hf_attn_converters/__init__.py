"""Checkpoint converters: MHA, GQA and MQA in both directions, streamed from disk to disk.

>>> from hf_attn_converters import convert
>>> convert("model", "model-mqa", num_key_value_heads=1)        # doctest: +SKIP

Needs torch only: no model is built, and neither transformers nor triton is imported.
"""

from .convert import ConvertResult, Progress, convert
from .families import FAMILIES, FamilySpec, family_of
from .merge import METHODS, MergeMethod
from .plan import ConversionPlan, plan_conversion

__all__ = [
    "FAMILIES",
    "METHODS",
    "ConversionPlan",
    "ConvertResult",
    "FamilySpec",
    "MergeMethod",
    "Progress",
    "convert",
    "family_of",
    "plan_conversion",
]
