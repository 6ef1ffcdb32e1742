"""Looking, never training: fusion tracing, counting, the variance of upsampled features."""

from .counting import Counts, count, count_call
from .fusion import Fusion, trace_fusions

__all__ = ['Counts', 'Fusion', 'count', 'count_call', 'trace_fusions']
