"""Decode heads, one method's head per file."""

from .batch_norm_after_upsampling import batch_norm_after_upsampling

__all__ = ['batch_norm_after_upsampling']
