"""Every name of transformers that this package touches and that transformers may change at will.

One table: what the name must look like, in which releases it is there, and what does not work
without it. A module's rows are looked at when somebody imports the module anyway
(:mod:`..import_hooks`), which costs some attribute look-ups; `hf-attn check` imports all of them
and reads the sources too. On a release newer than any that was tested, or where a row is not as it
should be, one warning says so. What is missing is refused where it is used; the rest works.

This file imports nothing but the standard library.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

from .releases import NEWEST_TRANSFORMERS, installed, short

logger = logging.getLogger("transformers.hf_attn_patch")  # shown as transformers' own warnings are

EVERY = ("triton_fa2", "triton_swa", "triton_paged_flash2", "triton_mla")
FLASH = ("triton_paged_flash2",)

# what a name must look like
FUNCTION = "a function"
CLASS = "a class"
DICT = "a dict"
ANY = "there"
INNER = "a function inside another"  # masks are told by these
ATTRIBUTE = "set on a class's objects"  # seen in its source only


@dataclass(frozen=True, kw_only=True)
class PrivateName:
    """One name: where it is, what it must look like, and what it is for."""

    module: str
    name: str  # within the module, dotted
    looks: str  # one of the kinds above
    takes: tuple[str, ...] = ()  # parameters of a function; variables that an inner one closes over
    since: tuple[int, int] = (5, 17)
    until: tuple[int, int] | None = None  # the last release that has it
    without: str = ""  # what does not work then
    needed_by: tuple[str, ...] = ()  # implementations that are not registered then

    @property
    def full_name(self) -> str:
        return f"{self.module}.{self.name}"

    def of_release(self, release: tuple[int, int]) -> bool:
        return self.since <= release and (self.until is None or release <= self.until)

    def wrong(self, module: ModuleType, thorough: bool = False) -> str | None:
        """What is not as it should be; None if nothing is. Sources are read if `thorough`."""
        if self.looks in (INNER, ATTRIBUTE):
            *path, last = self.name.split(".")
        else:
            path, last = self.name.split("."), ""
        found: Any = module
        for part in path:
            try:
                found = getattr(found, part)
            except AttributeError:
                return "is gone"
        if self.looks == ATTRIBUTE:
            return _attribute_wrong(found, last) if thorough else None
        if self.looks == INNER:
            return _inner_wrong(found, last, self.takes)
        if self.looks == DICT and not isinstance(found, dict):
            return f"is a {type(found).__name__} and no dict"
        if self.looks == CLASS and not isinstance(found, type):
            return "is no class"
        if self.looks == FUNCTION:
            return "is no function" if not callable(found) else _lacks(found, self.takes)
        return None


def _lacks(function: Any, parameters: tuple[str, ...]) -> str | None:
    if not parameters:
        return None
    has = inspect.signature(function).parameters
    gone = [p for p in parameters if p not in has]
    return f"takes no {', '.join(gone)}" if gone else None


def _inner_wrong(outer: Any, name: str, closes_over: tuple[str, ...]) -> str | None:
    code = getattr(outer, "__code__", None)
    inner = [c for c in getattr(code, "co_consts", ()) if isinstance(c, CodeType)]
    match = next((c for c in inner if c.co_name == name), None)
    if match is None:
        return "is gone"
    gone = [v for v in closes_over if v not in match.co_freevars]
    return f"does not close over {', '.join(gone)}" if gone else None


def _attribute_wrong(owner: Any, name: str) -> str | None:
    try:
        sources = [inspect.getsource(c) for c in owner.__mro__ if c.__module__ != "builtins"]
    except (OSError, TypeError):
        return None  # no source to read: said when it is used
    assigned = rf"\bself\.{re.escape(name)}\s*(=|:)|^    (def )?{re.escape(name)}\b"
    found = any(re.search(assigned, source, re.MULTILINE) for source in sources)
    return None if found else "is not set"


_MASKS = "transformers.masking_utils"
_FLASH = "transformers.modeling_flash_attention_utils"
_MODELS = "transformers.modeling_utils"
_BATCHING = "transformers.generation.continuous_batching"
_FALCON = "transformers.models.falcon.modeling_falcon"
_AUTO = "transformers.models.auto"
_DENSE = "such masks become dense: right, and slower"
_REGISTER = "no implementation can be registered"
_FLASH_NAME = "names with 'flash' cannot be served, and so continuous batching cannot"
_PAGES = "continuous batching (generate_batch) is refused"
_ENCODERS = "converted encoders load with trust_remote_code=True only"


def _allocator(name: str, **options: Any) -> PrivateName:
    return PrivateName(
        module=f"{_BATCHING}.cache_allocators.full_attention",
        name=f"FullAttentionCacheAllocator.{name}",
        looks=ATTRIBUTE,
        since=(5, 23),
        without=_PAGES,
        **options,
    )


def _leaf(outer: str, inner: str, *closes_over: str) -> PrivateName:
    return PrivateName(
        module=_MASKS, name=f"{outer}.{inner}", looks=INNER, takes=closes_over, without=_DENSE
    )


PRIVATE_NAMES: tuple[PrivateName, ...] = (
    # registering
    PrivateName(module=_MODELS, name="AttentionInterface._global_mapping", looks=DICT,
                without=_REGISTER, needed_by=EVERY),
    PrivateName(module=_MASKS, name="AttentionMaskInterface._global_mapping", looks=DICT,
                without=_REGISTER, needed_by=EVERY),
    PrivateName(module=_MODELS, name="PreTrainedModel._can_set_attn_implementation", looks=FUNCTION,
                without="models that ignore the name cannot be told from others", needed_by=EVERY),
    PrivateName(module=_MODELS, name="PreTrainedModel._supports_sdpa", looks=ANY,
                without="models for eager attention only are not refused"),
    PrivateName(module=_MODELS, name="PreTrainedModel._supports_flash_attn", looks=ANY,
                without="models for eager attention only are not refused"),
    PrivateName(module="transformers.configuration_utils",
                name="PreTrainedConfig._attn_implementation", looks=ANY, needed_by=EVERY,
                without="nothing tells which implementation a model runs with"),
    # masks
    PrivateName(module=_MASKS, name="sdpa_mask", looks=FUNCTION, needed_by=EVERY,
                takes=("batch_size", "q_length", "kv_length", "mask_function", "attention_mask"),
                without="no mask can be built"),
    PrivateName(module=_MASKS, name="causal_mask_function", looks=FUNCTION, needed_by=EVERY,
                without="causal masks are not known"),
    PrivateName(module=_MASKS, name="and_masks", looks=FUNCTION, needed_by=EVERY,
                without="windows cannot be narrowed"),
    PrivateName(module=_MASKS, name="or_masks", looks=FUNCTION, needed_by=("triton_swa",),
                without="no first tokens (sinks) beside a window"),
    PrivateName(module=_MASKS, name="sliding_window_overlay", looks=FUNCTION,
                needed_by=("triton_swa",), without="no window on models without one"),
    PrivateName(module=_MASKS, name="bidirectional_mask_function", looks=FUNCTION, without=_DENSE),
    _leaf("sliding_window_overlay", "inner_mask", "sliding_window"),
    _leaf("sliding_window_bidirectional_overlay", "inner_mask", "sliding_window"),
    _leaf("packed_sequence_mask_function", "inner_mask", "packed_sequence_mask"),
    _leaf("and_masks", "and_mask", "mask_functions"),
    # output_attentions
    PrivateName(module="transformers.utils.output_capturing", name="_active_collector", looks=ANY,
                without="output_attentions=True in a config does nothing: pass it with the call"),
    # names with "flash"
    PrivateName(module=_FLASH, name="_lazy_imports", looks=FUNCTION, takes=("implementation",),
                without=_FLASH_NAME, needed_by=FLASH),
    PrivateName(module=_FLASH, name="_loaded_implementation", looks=ANY,
                without=_FLASH_NAME, needed_by=FLASH),
    PrivateName(module=_FLASH, name="_pad_input", looks=FUNCTION, without=_FLASH_NAME,
                needed_by=FLASH),
    PrivateName(module=_FLASH, name="_unpad_input", looks=FUNCTION, without=_FLASH_NAME,
                needed_by=FLASH),
    # continuous batching
    PrivateName(module=f"{_BATCHING}.continuous_api", name="PagedAttentionCache", looks=CLASS,
                without=_PAGES),
    PrivateName(module=f"{_BATCHING}.cache", name="PagedAttentionCache.update", looks=FUNCTION,
                takes=("layer_idx", "kwargs"), since=(5, 19), without=_PAGES),
    PrivateName(module=f"{_BATCHING}.cache", name="PagedAttentionCache.layer_to_allocator",
                looks=ATTRIBUTE, since=(5, 23), without=_PAGES),
    PrivateName(module=f"{_BATCHING}.cache", name="PagedAttentionCache.config",
                looks=ATTRIBUTE, since=(5, 19), without=_PAGES),
    _allocator("_kv_page_views"),
    _allocator("index"),
    _allocator("layer_indices"),
    _allocator("layer_type"),
    _allocator("sentinel_index"),
    _allocator("tokens_per_page"),
    _allocator("write_trash_index"),
    PrivateName(module=f"{_BATCHING}.cache", looks=ATTRIBUTE, until=(5, 18), without=_PAGES,
                name="PagedAttentionCache.layer_index_to_group_indices"),
    # families
    PrivateName(module=_FALCON, name="FALCON_ATTENTION_CLASSES", looks=DICT,
                without="Falcon is refused"),
    PrivateName(module=_FALCON, name="FalconAttention", looks=CLASS, without="Falcon is refused"),
    PrivateName(module=_FALCON, name="apply_rotary_pos_emb", looks=FUNCTION,
                without="Falcon is refused"),
    PrivateName(module="transformers.models.deepseek_v3.modeling_deepseek_v3",
                name="DeepseekV3Attention.expand_kv", looks=FUNCTION,
                without="triton_mla is refused: nothing hands the latents over"),
    PrivateName(module=f"{_AUTO}.configuration_auto", name="CONFIG_MAPPING._mapping", looks=DICT,
                without=_ENCODERS),
    PrivateName(module=f"{_AUTO}.configuration_auto", name="CONFIG_MAPPING._modules", looks=DICT,
                without=_ENCODERS),
    *(
        PrivateName(module=f"{_AUTO}.modeling_auto", name=f"AutoModel._model_mapping.{name}",
                    looks=ANY, without=_ENCODERS)
        for name in ("_model_mapping", "_modules", "_reverse_config_mapping")
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Missing:
    """A name that is not as it should be."""

    wanted: PrivateName
    wrong: str

    def __str__(self) -> str:
        return f"{self.wanted.full_name} {self.wrong}: {self.wanted.without}"


_missing: dict[PrivateName, str] = {}
_said: set[str] = set()


def rows(table: tuple[PrivateName, ...] | None = None) -> Iterator[PrivateName]:
    """Those that the installed release should have; of an unknown release all newer ones."""
    release = installed("transformers")
    for row in PRIVATE_NAMES if table is None else table:
        if release is None or row.of_release(release):
            yield row


def modules() -> list[str]:
    """The modules that the rows are in, each once."""
    return list(dict.fromkeys(row.module for row in rows()))


def look(module_name: str, thorough: bool = False) -> list[Missing]:
    """Look at one module's names, if it has been imported, and keep what is missing."""
    module = sys.modules.get(module_name)
    found = []
    for row in rows():
        if row.module == module_name and module is not None:
            wrong = row.wrong(module, thorough)
            if wrong is None:
                _missing.pop(row, None)
            else:
                _missing[row] = wrong
                found.append(Missing(row, wrong))
    return found


def look_at_all() -> tuple[int, list[Missing]]:
    """Import every module and look thoroughly: how many names were looked at, what is missing."""
    found = []
    for name in modules():
        try:
            importlib.import_module(name)
        except ImportError:
            found += [Missing(row, "is gone") for row in rows() if row.module == name]
            _missing.update({m.wanted: m.wrong for m in found if m.wanted.module == name})
        else:
            found += look(name, thorough=True)
    return len(list(rows())), found


def missing() -> list[Missing]:
    """What was found missing so far."""
    return [Missing(row, wrong) for row, wrong in _missing.items()]


def missing_for(implementation: str) -> list[Missing]:
    """What was found missing that an implementation cannot do without."""
    return [m for m in missing() if implementation in m.wanted.needed_by]


def refusal(implementation: str) -> tuple[str, str] | None:
    """(reason, fix) why this release of transformers cannot be given an implementation."""
    gone = missing_for(implementation)
    if not gone:
        return None
    newest = short(NEWEST_TRANSFORMERS)
    return (
        f"in transformers {version()} {gone[0]}",
        f"pip install 'transformers<={newest}.*', the newest that was tested, or use "
        "attn_implementation='sdpa'",
    )


def require(full_name: str) -> None:
    """Check a name where it is used.

    Raises:
        ValueError: it was found missing.
    """
    for m in missing():
        if m.wanted.full_name == full_name:
            raise ValueError(
                f"in transformers {version()} {m}. The newest release that was tested is "
                f"{short(NEWEST_TRANSFORMERS)}; attn_implementation='sdpa' works with every one."
            )


def version() -> str:
    """Of the installed transformers."""
    return str(getattr(sys.modules.get("transformers"), "__version__", "of unknown release"))


def warn() -> None:
    """Say once what is missing so far, or that the release is newer than any that was tested."""
    release = installed("transformers")
    newer = release is not None and release > NEWEST_TRANSFORMERS
    new = [str(m) for m in missing() if m.wanted.full_name not in _said]
    if new or (newer and "release" not in _said):
        listed = "".join(f"\n- {line}" for line in new) or " Every name that it needs is there."
        tested = "newer than" if newer else "not as expected by"
        logger.warning(
            f"transformers {version()} is {tested} what hf-attn-patch was tested with (up to "
            f"{short(NEWEST_TRANSFORMERS)}).{' Not there:' if new else ''}{listed}\n"
            "`hf-attn check` looks at everything."
        )
    _said.update({"release"} if newer else (), (m.wanted.full_name for m in missing()))
