"""Analysis of models without training: counts, pictures of features, variance of upsampling."""

from ..fusions import Fusion, trace_fusions
from .counting import Counts, count, count_call

__all__ = ['Counts', 'Fusion', 'count', 'count_call', 'trace_fusions']
