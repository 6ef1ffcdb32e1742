"""Hooks."""

from .iteration_seed_hook import IterationSeedHook
from .scale_equalizer_hook import ScaleEqualizerHook

__all__ = ['IterationSeedHook', 'ScaleEqualizerHook']
