"""Side by side: what a conversion or another implementation costs in quality and buys in speed.

>>> from hf_attn_patch.compare import CompareOptions, compare
>>> result = compare("model", ["model@triton_fa2", "model-mqa"],
...                  CompareOptions(text=Path("some.txt")))            # doctest: +SKIP
>>> result.quality[1].kl_mean                                          # doctest: +SKIP
"""

from ..loading import ModelSpec, parse_spec
from .options import CompareOptions, Comparison
from .report import markdown, table
from .run import compare
from .verdict import Verdict, verdicts

__all__ = [
    "CompareOptions",
    "Comparison",
    "ModelSpec",
    "Verdict",
    "compare",
    "markdown",
    "parse_spec",
    "table",
    "verdicts",
]
