"""Compare checkpoints and implementations side by side; the same as `hf-attn compare`."""

import sys

from hf_attn_patch.cli import app


def main() -> None:
    app(["compare", *sys.argv[1:]], prog_name="compare_generation.py")


if __name__ == "__main__":
    main()
