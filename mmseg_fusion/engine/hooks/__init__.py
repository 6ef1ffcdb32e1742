"""Hooks."""

from .scale_equalizer_hook import ScaleEqualizerHook

__all__ = ['ScaleEqualizerHook']
