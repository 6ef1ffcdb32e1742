"""Heads, necks, losses and their blocks; importing registers them into mmseg's registry."""

from . import backbones, decode_heads, layers, losses, necks, segmentors

__all__ = ['backbones', 'decode_heads', 'layers', 'losses', 'necks', 'segmentors']
