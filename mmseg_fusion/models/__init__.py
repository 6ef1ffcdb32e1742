"""Heads, necks, losses and their blocks; importing registers them into mmseg's registry."""

from . import backbones, decode_heads, layers, losses, necks, segmentors
from .backbones import *  # noqa: F403
from .decode_heads import *  # noqa: F403
from .losses import *  # noqa: F403
from .necks import *  # noqa: F403
from .segmentors import *  # noqa: F403

__all__ = [
    'backbones',
    'decode_heads',
    'layers',
    'losses',
    'necks',
    'segmentors',
    *backbones.__all__,
    *decode_heads.__all__,
    *losses.__all__,
    *necks.__all__,
    *segmentors.__all__,
]
