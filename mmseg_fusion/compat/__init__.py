"""Third-party quirks, each with the version that makes it unnecessary: one file per topic.

:func:`apply` runs once when :mod:`mmseg_fusion` is imported, before anything of MMSegmentation is.
A workaround is applied only if its quirk is present, and never replaces a working part.
``python -m mmseg_fusion`` lists the applied workarounds.
"""

from __future__ import annotations

import functools
import warnings

from .class_weights import cross_entropy_class_weight
from .compiled_ops import find_loader_removed, mmcv_without_ops
from .configs import blanks_in_options, external_configs, named_models
from .determinism import deterministic_on_cuda
from .distutils_gone import distutils_removed
from .packages import (
    FAMILIES,
    OPTIONAL,
    REQUIREMENTS,
    Family,
    Package,
    check_stack,
    family,
    installed,
    remedy,
    stack,
)
from .quirk import Quirk
from .torchvision_build import torchvision_build_mismatch
from .weights_only import checkpoints_weights_only, resume_weights_only
from .whole_files import checkpoints_whole
from .without_cuda import amp_without_cuda, distributed_without_cuda

__all__ = [
    'APPLIED',
    'FAMILIES',
    'OPTIONAL',
    'QUIRKS',
    'REQUIREMENTS',
    'Family',
    'Package',
    'Quirk',
    'amp_without_cuda',
    'apply',
    'blanks_in_options',
    'check_stack',
    'checkpoints_weights_only',
    'checkpoints_whole',
    'cross_entropy_class_weight',
    'deterministic_on_cuda',
    'distributed_without_cuda',
    'distutils_removed',
    'external_configs',
    'family',
    'find_loader_removed',
    'installed',
    'mmcv_without_ops',
    'named_models',
    'remedy',
    'resume_weights_only',
    'stack',
    'torchvision_build_mismatch',
]

#: Filled by :func:`apply`.
APPLIED: list[Quirk] = []

#: In this order: what must be there before mmengine, mmpretrain and mmseg are imported is first.
QUIRKS = (
    torchvision_build_mismatch,
    mmcv_without_ops,
    find_loader_removed,
    distutils_removed,
    resume_weights_only,
    checkpoints_weights_only,
    checkpoints_whole,
    blanks_in_options,
    external_configs,
    named_models,
    distributed_without_cuda,
    amp_without_cuda,
    cross_entropy_class_weight,
    deterministic_on_cuda,
)


@functools.cache
def apply() -> tuple[Quirk, ...]:
    """Works around every quirk that is present; a second call does nothing.

    Returns:
        The quirks that were worked around, also kept in :data:`APPLIED`.

    Raises:
        ImportError: see :func:`check_stack`.
    """
    for note in check_stack():
        if not note.startswith(OPTIONAL):
            warnings.warn(note, stacklevel=3)
    for quirk in QUIRKS:
        met = quirk()
        if met is not None:
            APPLIED.append(met)
    return tuple(APPLIED)
