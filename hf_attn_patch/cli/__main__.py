"""`python -m hf_attn_patch.cli`"""

from . import main

main()
