"""Latents instead of KV heads: a checkpoint with multi-head latent attention (MLA).

=============== ==================================================================
plan.py         what can be converted, and what it will be
rotation.py     which pairs keep turning: one choice for all layers
factors.py      a layer's K and V as a latent and a rotated key: the mathematics
quiet_norm.py   the norm that deepseek_v3 puts on its latents, switched off
deepseek.py     the factors as the tensors and config.json of transformers' deepseek_v3
form.py         all of it as the `Form` that the rest of the converter knows
=============== ==================================================================
"""

from .plan import METHODS, plan_latents

__all__ = ["METHODS", "plan_latents"]
