"""Backbones that MMSegmentation lacks."""

from .dilated_efficientnet import DilatedEfficientNet
from .scaled_efficientnet import ScaledEfficientNet
from .xception import AlignedXception

__all__ = ['AlignedXception', 'DilatedEfficientNet', 'ScaledEfficientNet']
