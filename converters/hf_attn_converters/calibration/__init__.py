"""What a source model computes on a calibration text, and fitting to it.

Takes a source model and its family, never a conversion.
"""

from .tokens import Calibration

__all__ = ["Calibration"]
