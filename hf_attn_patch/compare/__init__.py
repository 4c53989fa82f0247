"""Side by side: what a conversion or another implementation costs in quality and buys in speed.

>>> from hf_attn_patch.compare import CompareOptions, compare
>>> result = compare("model", ["model@triton_fa2", "model-mqa"],
...                  CompareOptions(text=Path("some.txt")))            # doctest: +SKIP
>>> result.quality[1].kl_mean                                          # doctest: +SKIP
"""

from .models import ModelSpec, parse_spec
from .report import markdown, table, verdicts
from .run import CompareOptions, Comparison, compare

__all__ = [
    "CompareOptions",
    "Comparison",
    "ModelSpec",
    "compare",
    "markdown",
    "parse_spec",
    "table",
    "verdicts",
]
