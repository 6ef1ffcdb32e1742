"""Old place of the measurement of branches, until version 0.3: see :mod:`mmseg_fusion.fusions`."""

import warnings

from ..fusions.statistics import (
    BranchStatistics,
    measure_branches,
    measuring,
    reduce_statistics,
    split_batches,
)

__all__ = [
    'BranchStatistics',
    'measure_branches',
    'measuring',
    'reduce_statistics',
    'split_batches',
]

warnings.warn(
    'mmseg_fusion.analysis.branch_statistics has moved: import from mmseg_fusion.fusions',
    DeprecationWarning,
    stacklevel=2,
)
