"""convert(): source folder -> converted folder, one layer's tensors in memory at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card import version
from .conversion import EXACT, ConversionPlan, Work
from .heads.plan import plan_conversion
from .io.atomic_output import SOURCE, Partial, atomic_folder, check_destination, partial_folder
from .io.gguf import dequantize as write_dequantized
from .io.gguf import described, is_gguf
from .io.journal import sha256_of
from .io.safetensors_reader import Stamp
from .io.text import public_name, read_file
from .mla import plan_latents
from .verify import Text, Verification, verify_output
from .writer import Progress, computed_layers, stored_layers, write_about, write_weights

if TYPE_CHECKING:
    from .calibration import Calibration

HEADS, LATENTS = "heads", "mla"  # what attention becomes


@dataclass(frozen=True)
class ConvertResult:
    plan: ConversionPlan
    dry_run: bool
    seconds: float
    calibration: Mapping[str, Any] | None = None  # how the method was calibrated
    verification: Verification | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            **self.plan.to_json(),
            "dry_run": self.dry_run,
            "seconds": round(self.seconds, 3),
            "calibration": self.calibration,
            "verification": self.verification.to_json() if self.verification else None,
        }


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    num_key_value_heads: int | None = None,
    to: str = HEADS,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    method: str | None = None,
    calibration: Calibration | None = None,
    group_heads: bool = False,
    tensor_parallel_size: int | None = None,
    dequantize: bool = False,
    resume: bool = False,
    verify: bool = False,
    verify_text: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    layer_progress: Progress | None = None,
) -> ConvertResult:
    """Write to `dst` the checkpoint `src` with another number of KV heads, or with latents.

    More heads (a multiple) is exact: each head is repeated. Fewer are merged by `method`, see
    `METHODS`; `calibration` says on what text a calibrated method measures. By default it is
    "csvd+fit" where `calibration` has a text, else "csvd", on text that the model writes itself.
    `group_heads` first puts those heads next to each other that lose least by sharing.

    ``to="mla"`` makes of a llama, mistral or qwen2 a dense deepseek_v3 that caches, for all heads
    together, a latent of `kv_lora_rank` and a rotated key of `qk_rope_head_dim` columns; methods
    "mla" and "mla+fit", chosen by the same rule: see `mla`.

    `src` is a folder with safetensors or `pytorch_model.bin`, or, with `dequantize`, a GGUF file.
    The stored dtype is kept; arithmetic is one precision wider.

    `dst` appears under its name only when complete, with tokenizer, templates and licence
    copied. An interrupted conversion leaves `DST.partial/`; the same call with `resume` continues
    there and gives the same bytes. With `verify` the result is loaded and compared with the
    source on a small text before it gets its name. With `dry_run` nothing is written and the
    result carries the plan. `progress` counts bytes written, `layer_progress` layers calibrated.

    Raises ValueError for misuse or bad input, OSError when the disk refuses or is too small or
    the source changes underway, RuntimeError when the verification fails.
    """
    start = time.perf_counter()
    source, target = Path(src), Path(dst)
    wanted = Wanted(to, num_key_value_heads, kv_lora_rank, qk_rope_head_dim, group_heads)
    wanted.check()

    def plan(folder: Path) -> Work:
        chosen = method or default_method(calibration, to)
        return wanted.plan(folder, target, chosen, tensor_parallel_size)

    with ExitStack() as stack:
        if is_gguf(source):
            if not dequantize:
                raise ValueError(
                    f"{source} is GGUF: pass --dequantize (dequantize=True) to convert its "
                    "dequantized weights, or convert the original checkpoint"
                )
            check_destination(source, target)
            work = plan(stack.enter_context(described(source)))
            origin: dict[str, Any] = {source.name: [*Stamp.of(source)]}
            # Dequantized weights lie beside the result until it is complete.
            work = _renamed(work, source, extra_bytes=work.plan.bytes_before)
        else:
            if dequantize:
                raise ValueError(f"{source} is no GGUF file: leave out --dequantize")
            work = plan(source)
            origin = work.source.fingerprint()
        calibrated = work.method.calibrated and work.plan.method != EXACT
        if calibration is not None and not calibrated:
            raise ValueError(
                f"the method {work.plan.method} needs no calibration: leave the text out"
            )
        if calibrated:
            new = [n for i in work.source if i.name in work.changed for n in work.infos_after(i)]
            work = _renamed(work, source, extra_bytes=sum(info.nbytes for info in new))
        text = None
        if verify_text is not None:
            text = Text(read_file(Path(verify_text)), public_name(verify_text))
        if dry_run:
            return ConvertResult(work.plan, True, time.perf_counter() - start)
        head = {
            "version": version(),
            "kv_heads": num_key_value_heads,
            "latents": [kv_lora_rank, qk_rope_head_dim] if to == LATENTS else None,
            "method": work.plan.method,
            "group_heads": group_heads,
            "calibration": _identity(calibration) if calibrated else None,
            "config": _sha256(work.source.config),
            "weights": origin,
        }
        _check_space(work.plan, target)
        with atomic_folder(target, head, resume=resume) as partial:
            if is_gguf(source):
                work = _renamed(plan(_dequantized(source, partial)), source)
            record, found = None, None
            if calibrated:
                from .layerwise import calibrate_layers

                work, record = calibrate_layers(work, partial.layers, calibration, layer_progress)
            layers = stored_layers(partial.layers) if calibrated else computed_layers(work)
            write_weights(work, partial, layers, progress or (lambda done, total, name: None))
            if verify:
                found = _verified(work, partial.folder, text)
            write_about(work, partial.folder, calibration=record, verification=found)
            work.source.check_unchanged()
    return ConvertResult(work.plan, False, time.perf_counter() - start, record, found)


def _verified(work: Work, folder: Path, text: Text | None) -> Verification:
    try:
        return verify_output(work, folder, text)
    except (ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        # From inside transformers: the result is at fault, not what the user asked for.
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"verification failed: {first}") from error


def default_method(calibration: Calibration | None, to: str = HEADS) -> str:
    """The best method for what is at hand: fitting needs a text that is worth it."""
    closed = "mla" if to == LATENTS else "csvd"
    fits = calibration is not None and calibration.text is not None
    return f"{closed}+fit" if fits else closed


@dataclass(frozen=True)
class Wanted:
    """What was asked for: KV heads or latents, each with its own numbers."""

    to: str
    num_key_value_heads: int | None
    kv_lora_rank: int | None
    qk_rope_head_dim: int | None
    group_heads: bool

    def check(self) -> None:
        """Raises ValueError where the numbers of one are missing, or those of the other given."""
        latents = {
            "kv_lora_rank": self.kv_lora_rank,
            "qk_rope_head_dim": self.qk_rope_head_dim,
        }
        heads = {
            "num_key_value_heads": self.num_key_value_heads,
            "group_heads": self.group_heads or None,
        }
        if self.to not in (HEADS, LATENTS):
            raise ValueError(f"to is {self.to!r}; possible: {HEADS!r}, {LATENTS!r}")
        if self.to == HEADS and self.num_key_value_heads is None:
            raise ValueError(
                "say how many KV heads (--num-key-value-heads), or ask for latents (--to mla)"
            )
        needed, foreign = (latents, heads) if self.to == LATENTS else ({}, latents)
        if missing := [_option(name) for name, value in needed.items() if value is None]:
            raise ValueError(f"--to mla needs {' and '.join(missing)}")
        if given := [_option(name) for name, value in foreign.items() if value is not None]:
            other = LATENTS if self.to == HEADS else HEADS
            raise ValueError(f"{' and '.join(given)} goes with --to {other}, not --to {self.to}")

    def plan(self, source: Path, target: Path, method: str, devices: int | None) -> Work:
        if self.to == HEADS:
            assert self.num_key_value_heads is not None
            return plan_conversion(
                source,
                target,
                num_key_value_heads=self.num_key_value_heads,
                method=method,
                group_heads=self.group_heads,
                tensor_parallel_size=devices,
            )
        assert self.kv_lora_rank is not None and self.qk_rope_head_dim is not None
        return plan_latents(
            source,
            target,
            kv_lora_rank=self.kv_lora_rank,
            qk_rope_head_dim=self.qk_rope_head_dim,
            method=method,
            tensor_parallel_size=devices,
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _dequantized(source: Path, partial: Partial) -> Path:
    """The source as safetensors; an interrupted run's is used again if it is complete."""
    folder = partial.folder / SOURCE
    if not folder.exists():
        fresh = folder.with_name(SOURCE + ".new")
        write_dequantized(source, fresh)
        fresh.rename(folder)
    return folder


def _renamed(work: Work, source: Path, *, extra_bytes: int = 0) -> Work:
    """A plan that speaks of the source as the user named it, with room for working files."""
    needed = work.plan.disk_needed + extra_bytes
    return replace(work, plan=replace(work.plan, source=str(source), disk_needed=needed))


def _check_space(plan: ConversionPlan, target: Path) -> None:
    # What an earlier run left is either used or cleared: it is room that this one has.
    left = sum(path.stat().st_size for path in _files(partial_folder(target)))
    if plan.disk_needed > plan.disk_free + left:
        raise OSError(
            errno.ENOSPC,
            f"{plan.target} needs {plan.disk_needed:,} bytes, {plan.disk_free + left:,} are free",
        )


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file()) if folder.exists() else iter(())


def _identity(calibration: Calibration | None) -> dict[str, Any] | None:
    """A calibration as the journal's first line keeps it: a text counts by its content."""
    if calibration is None:
        return None
    fields = {name: str(value) for name, value in asdict(calibration).items()}
    if calibration.text is not None and Path(calibration.text).is_file():
        fields["text"] = sha256_of(Path(calibration.text))
    return fields


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
