"""Necks: levels in, levels out."""

from .bifpn import BiFPN

__all__ = ['BiFPN']
