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
from .journal import sha256_of
from .output import SOURCE, Partial, atomic_folder, check_destination, partial_folder
from .plan import EXACT, ConversionPlan, Work, plan_conversion
from .safetensors_file import Stamp
from .sources import dequantize as write_dequantized
from .sources import described, is_gguf
from .text import public_name, read_file
from .verify import Text, Verification, verify_output
from .writer import Progress, computed_layers, stored_layers, write_about, write_weights

if TYPE_CHECKING:
    from .calibration import Calibration


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
    num_key_value_heads: int,
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
    """Write to `dst` the checkpoint `src` with another number of KV heads.

    More heads (a multiple) is exact: each head is repeated. Fewer are merged by `method`, see
    `METHODS`; `calibration` says on what text a calibrated method measures. By default it is
    "csvd+fit" where `calibration` has a text, else "csvd", on text that the model writes itself.
    `group_heads` first puts those heads next to each other that lose least by sharing.

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

    def plan(folder: Path) -> Work:
        return plan_conversion(
            folder,
            target,
            num_key_value_heads=num_key_value_heads,
            method=method or default_method(calibration),
            group_heads=group_heads,
            tensor_parallel_size=tensor_parallel_size,
        )

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
            changed = sum(work.info_after(i).nbytes for i in work.source if i.name in work.changed)
            work = _renamed(work, source, extra_bytes=changed)
        text = None
        if verify_text is not None:
            text = Text(read_file(Path(verify_text)), public_name(verify_text))
        if dry_run:
            return ConvertResult(work.plan, True, time.perf_counter() - start)
        head = {
            "version": version(),
            "kv_heads": num_key_value_heads,
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
                from .calibrated import calibrate_layers

                record = calibrate_layers(work, partial.layers, calibration, layer_progress)
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


def default_method(calibration: Calibration | None) -> str:
    """The best method for what is at hand: fitting needs a text that is worth it."""
    return "csvd+fit" if calibration is not None and calibration.text is not None else "csvd"


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
