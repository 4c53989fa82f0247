"""Write `hf_attn_kernels` as a kernel repository for the Hugging Face hub.

    python scripts/export_hub_kernel.py DEST
    LOCAL_KERNELS=org/hf-attn-kernels=DEST/build python ...

and there `attn_implementation="org/hf-attn-kernels"`.

The kernels are Triton and PyTorch, so one source serves every version of torch: a variant for each
backend, `build/torch-cuda` and so on, each with its metadata, beside the source in `torch-ext`.
Layout: Hugging Face's `kernels` library, versions 0.16 and 0.17.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_attn_patch import __version__

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kernels" / "hf_attn_kernels"
NAME, VERSION = "hf-attn-kernels", 1  # of the published interface
# what the hub calls a backend; the package picks its own by the tensors' device
BACKENDS = ("cuda", "rocm", "xpu", "cpu")

CARD = """---
license: apache-2.0
library_name: kernels
tags: [kernel, attention, triton]
---

# hf-attn-kernels

FlashAttention-2's `flash_attn_func`, `flash_attn_varlen_func` and `flash_attn_with_kvcache`, in
Triton for GPUs and in blockwise PyTorch for CPUs, forward and backward; and `mla_decode`, attention
over cached latents. Triton 3.6 or newer is needed on a GPU.

```python
model = AutoModelForCausalLM.from_pretrained(
    name, attn_implementation="ORGANISATION/hf-attn-kernels"
)
```

Sinks (`s_aux`), softcap, windows, additive bias and paged caches are arguments of the functions.
This repository is made by `scripts/export_hub_kernel.py` of hf-attn-patch, version {version}.
"""

BUILD = """[general]
name = "{name}"
version = {version}
license = "Apache-2.0"
backends = [{backends}]

[torch-noarch]
"""


def export(destination: Path) -> list[Path]:
    """Write the repository; returns the folders of its variants. Raises ValueError if it exists."""
    if destination.exists():
        raise ValueError(f"{destination} exists already: name another folder, or remove it first")
    files = sorted(
        p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".cpp", ".h") or p.name == "py.typed"
    )
    digest = _digest(files)
    _copy(files, destination / "torch-ext" / PACKAGE.name)
    variants = []
    for backend in BACKENDS:
        folder = destination / "build" / f"torch-{backend}"
        _copy(files, folder)
        metadata = {
            "name": NAME,
            # the name that it is imported by: another source is another module
            "id": f"_{PACKAGE.name}_{backend}_{digest}",
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        variants.append(folder)
    listed = ", ".join(f'"{backend}"' for backend in BACKENDS)
    build = BUILD.format(name=NAME, version=VERSION, backends=listed)
    (destination / "build.toml").write_text(build)
    (destination / "README.md").write_text(CARD.format(version=__version__))
    shutil.copy(ROOT / "LICENSE", destination)
    return variants


def _copy(files: Sequence[Path], folder: Path) -> None:
    for file in files:
        target = folder / file.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _digest(files: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:12]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("destination", type=Path, help="a new folder")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args(argv)
    try:
        variants = export(args.destination)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    names = [str(folder) for folder in variants]
    print(json.dumps({"variants": names}) if args.json else "\n".join(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
