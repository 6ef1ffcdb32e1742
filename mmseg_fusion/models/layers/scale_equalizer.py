"""Old place of the scale equalizer, until version 0.3: see :mod:`mmseg_fusion.fusions`."""

import warnings

from ...fusions.fold import (
    ScaleEqualizer,
    bias_shift,
    broadcast_to_weight,
    expand_branches,
    fold_scale_equalizer,
    fold_tensors,
)

__all__ = [
    'ScaleEqualizer',
    'bias_shift',
    'broadcast_to_weight',
    'expand_branches',
    'fold_scale_equalizer',
    'fold_tensors',
]

warnings.warn(
    'mmseg_fusion.models.layers.scale_equalizer has moved: import from mmseg_fusion.fusions',
    DeprecationWarning,
    stacklevel=2,
)
