"""Necks: levels in, levels out."""

from .bifpn import BiFPN
from .gated_fully_fusion import GatedFullyFusion

__all__ = ['BiFPN', 'GatedFullyFusion']
