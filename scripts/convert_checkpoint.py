"""Change a checkpoint's KV heads; the same as `hf-attn convert`."""

import sys

from hf_attn_patch.cli import app


def main() -> None:
    app(["convert", *sys.argv[1:]], prog_name="convert_checkpoint.py")


if __name__ == "__main__":
    main()
