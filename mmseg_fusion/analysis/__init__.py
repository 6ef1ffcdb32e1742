"""Looking, never training: fusion tracing, counting, the variance of upsampled features."""

from ..fusions import Fusion, trace_fusions
from .counting import Counts, count, count_call

__all__ = ['Counts', 'Fusion', 'count', 'count_call', 'trace_fusions']
