"""Uptrain a checkpoint in one process or many; the options of `hf-attn uptrain`.

    accelerate launch --config_file scripts/accelerate/fsdp2.yaml scripts/uptrain.py --student ...
    torchrun --nproc_per_node 8 scripts/uptrain.py recipe.yaml --resume

A first argument that ends in .json or .yaml names a file of options; those that follow it count
before the file's. Texts add up.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn_patch.cli.common import FAILED, MISUSE
from hf_attn_patch.cli.uptrain import OURS, run

if TYPE_CHECKING:
    from transformers import HfArgumentParser

    from hf_attn_converters.uptrain import UptrainOptions

FILES = (".json", ".yaml", ".yml")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options, as_json = parse(sys.argv[1:] if argv is None else argv)
        run(options, json=as_json)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISUSE if isinstance(error, ValueError) else FAILED
    return 0


def parse(argv: Sequence[str]) -> tuple[UptrainOptions, bool]:
    """(options, whether the result is wanted as JSON)

    Raises ValueError for a file that holds no options, SystemExit for words that are none.
    """
    from hf_attn_converters.uptrain import UptrainOptions

    words = list(argv)
    if words and words[0].endswith(FILES):
        words = [*words_of(Path(words[0])), *words[1:]]
    given = vars(parser().parse_args(words))
    as_json: bool = given.pop("json")
    return UptrainOptions(**given | {"text": tuple(given["text"])}), as_json


def parser() -> HfArgumentParser:
    """transformers' parser over the fields of UptrainOptions."""
    from transformers import HfArgumentParser

    from hf_attn_converters.uptrain import UptrainOptions

    [text] = [f for f in fields(UptrainOptions) if f.name == "text"]
    # it reads several words for a list only, not for a tuple
    several: Any = ("text", list[str], field(metadata={**text.metadata, "action": "extend"}))
    known: Any = make_dataclass(
        "Known", [several], bases=(UptrainOptions,), frozen=True, kw_only=True
    )
    about = (__doc__ or "").partition("\n")[0]
    made = HfArgumentParser(known, description=about, allow_abbrev=False)
    made.add_argument(
        "--json", action="store_true", help="Print JSON, and nothing else, to stdout."
    )
    made.set_defaults(attn_implementation=OURS)
    return made


def words_of(file: Path) -> Iterator[str]:
    """A file's options as words of the command line, so that its values are read as those are."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            found = json.loads(text)
        else:
            import yaml

            found = yaml.safe_load(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no options, but {type(found).__name__}")
    for name, value in found.items():
        if isinstance(value, list):
            yield from (f"--{name}", *map(str, value))
        elif value is not None:
            yield f"--{name}={value}"


if __name__ == "__main__":
    sys.exit(main())
