"""Old place of the tracer of fusions, until version 0.3: see :mod:`mmseg_fusion.fusions`."""

import warnings

from ..fusions.state import kept_state
from ..fusions.trace import Fusion, FusionTracer, select_fusions, trace_fusions

__all__ = ['Fusion', 'FusionTracer', 'kept_state', 'select_fusions', 'trace_fusions']

warnings.warn(
    'mmseg_fusion.analysis.fusion has moved: import from mmseg_fusion.fusions',
    DeprecationWarning,
    stacklevel=2,
)
