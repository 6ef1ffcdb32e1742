"""Blocks that several heads use."""

from .scale_equalizer import ScaleEqualizer, fold_scale_equalizer

__all__ = ['ScaleEqualizer', 'fold_scale_equalizer']
