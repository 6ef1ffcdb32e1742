"""Looking, never training: fusion tracing, branch statistics, counting."""

from .fusion import Fusion, trace_fusions

__all__ = ['Fusion', 'trace_fusions']
