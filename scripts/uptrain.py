"""Uptrain a checkpoint; the same as `hf-attn uptrain`, for `accelerate launch` and `torchrun`."""

import sys

from hf_attn_patch.cli import app


def main() -> None:
    app(["uptrain", *sys.argv[1:]], prog_name="uptrain.py")


if __name__ == "__main__":
    main()
