"""Necks: levels in, levels out."""

from .bifpn import BiFPN
from .fapn import FaPN
from .gated_fully_fusion import GatedFullyFusion

__all__ = ['BiFPN', 'FaPN', 'GatedFullyFusion']
