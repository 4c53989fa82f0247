"""What an implementation can serve and needs, and the answer to who asks: Accepted or Rejected."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

# implementations that read a PagedCache; registry.py has the rest of what they can do
PAGE_READERS = ("triton_fa2", "triton_swa", "triton_paged_flash2", "triton_mla")


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What an implementation can serve; the columns of the table in docs/choosing.md."""

    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")
    head_dim_forward: int = 512  # largest
    head_dim_backward: int = 256
    causal: bool = True
    full: bool = True
    gqa: bool = True
    latents: bool = False  # decode over cached latents (MLA), never expanded
    window: bool = True
    sink_tokens: bool = False  # first tokens kept beside the window
    rolling_cache: bool = False  # KV memory O(window)
    softcap: bool = True
    sink_logits: bool = True  # s_aux of gpt-oss
    bias: bool = True  # dense masks and position bias, with its gradient
    padding: bool = True
    packed: bool = True
    dropout: bool = True
    backward: bool = True
    paged: bool = True  # PagedCache, for generate()
    continuous_batching: bool = False  # transformers' generate_batch and server


@dataclass(frozen=True)
class Accepted:
    """It would run: on which backend, and why that one."""

    backend: str
    reason: str
    ok: bool = True

    def to_dict(self) -> dict[str, str | bool]:
        return asdict(self)


@dataclass(frozen=True)
class Rejected:
    """It would not run: why, and what to do about it."""

    reason: str
    fix: str
    ok: bool = False

    def to_dict(self) -> dict[str, str | bool]:
        return asdict(self)


Verdict = Accepted | Rejected


@dataclass(frozen=True, kw_only=True)
class DeviceRequirement:
    """The backend that serves one torch device type, and the package it cannot do without."""

    device: str
    backend: str
    package: str | None = None
    minimum: tuple[int, int] = (0, 0)
    extra: str | None = None

    def check(self) -> Verdict:
        if self.package is None:
            return Accepted(self.backend, f"tensors on {self.device!r} run {self.backend}")
        wanted = f"{self.package}>={'.'.join(map(str, self.minimum))}"
        fix = f"pip install 'hf-attn-patch[{self.extra}]'"
        if importlib.util.find_spec(self.package) is None:
            return Rejected(
                f"tensors on {self.device!r} need {wanted}, which is not installed", fix
            )
        found = _installed(self.package)
        if found is not None and _release(found) < self.minimum:
            return Rejected(f"tensors on {self.device!r} need {wanted}; {found} is installed", fix)
        shown = f"{self.package} {found}" if found else self.package
        return Accepted(self.backend, f"tensors on {self.device!r} run {self.backend} ({shown})")


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """One DeviceRequirement for each device type that is served at all."""

    devices: tuple[DeviceRequirement, ...]

    def check(self, device_type: str) -> Verdict:
        """Verdict for a torch device type: ``"cuda"`` (ROCm's too), ``"xpu"``, ``"cpu"`` ..."""
        for requirement in self.devices:
            if requirement.device == device_type:
                return requirement.check()
        possible = ", ".join(r.device for r in self.devices)
        return Rejected(
            f"no backend for device {device_type!r}; possible: {possible}",
            f"move the model to one of {possible}, or use attn_implementation='sdpa'",
        )


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # importable without metadata, e.g. from a source tree
        return None


def _release(text: str) -> tuple[int, ...]:
    digits = []
    for part in text.split("+")[0].split(".")[:2]:
        head = "".join(c for c in part if c.isdigit())
        digits.append(int(head) if head else 0)
    return tuple(digits)
