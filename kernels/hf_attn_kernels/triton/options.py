"""Ways of doing the same work: which are ruled out, to look for a fault or to compare.

From outside: ``HF_ATTN_TRITON_WITHOUT=descriptors,heavy_first``; and ``HF_ATTN_TRITON_WITH=gluon``
for a way that is taken only where it is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator

WITHOUT, WITH = "HF_ATTN_TRITON_WITHOUT", "HF_ATTN_TRITON_WITH"
WAYS = ("gluon", "descriptors", "heavy_first")  # that can be ruled out; pointers serve every call
ON_REQUEST = ("gluon",)  # it has never run on a GPU

# of the process, not of a context: autograd runs the backward in a thread of its own
_without: frozenset[str] = frozenset()
_with: frozenset[str] = frozenset()


@contextlib.contextmanager
def without(*ways: str) -> Iterator[None]:
    """Rule out `ways` for the whole process, as long as this lasts.

    Raises:
        ValueError: a way that does not exist.
    """
    global _without
    before, _without = _without, _without | _known(ways, "without")
    try:
        yield
    finally:
        _without = before


@contextlib.contextmanager
def asked_for(*ways: str) -> Iterator[None]:
    """Let `ways` of ON_REQUEST take part, as :func:`without` rules some out; errors as there."""
    global _with
    before, _with = _with, _with | _known(ways, "asked_for")
    try:
        yield
    finally:
        _with = before


def ruled_out(way: str) -> bool:
    """Whether `way` is not to be used now. Raises ValueError if a variable names no way."""
    if way in _without or way in _listed(WITHOUT, os.environ.get(WITHOUT, "")):
        return True
    asked = way in _with or way in _listed(WITH, os.environ.get(WITH, ""))
    return way in ON_REQUEST and not asked


@functools.lru_cache
def _listed(variable: str, value: str) -> frozenset[str]:
    return _known(filter(None, value.split(",")), variable)


def _known(ways: Iterable[str], where: str) -> frozenset[str]:
    found = frozenset(ways)
    unknown = sorted(found - set(WAYS))
    if unknown:
        raise ValueError(f"{where} names {unknown[0]!r}; possible: {', '.join(WAYS)}")
    return found
