"""Where this package's operators are entered in torch.

By the name that the package was imported under: a copy that was published as a hub kernel is
imported under a name of its own, and may stand beside an installed one.
"""

import torch

NAMESPACE = __name__.partition(".")[0]
OPS = getattr(torch.ops, NAMESPACE)
