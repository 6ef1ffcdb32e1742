"""Backbones that MMSegmentation lacks."""

from . import package_checkpoint  # noqa: F401
from .dilated_densenet import DilatedDenseNet
from .dilated_efficientnet import DilatedEfficientNet
from .scaled_efficientnet import ScaledEfficientNet
from .wider_resnet import WiderResNet
from .xception import AlignedXception

__all__ = [
    'AlignedXception',
    'DilatedDenseNet',
    'DilatedEfficientNet',
    'ScaledEfficientNet',
    'WiderResNet',
]
