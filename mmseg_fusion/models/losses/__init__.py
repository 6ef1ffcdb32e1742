"""Losses."""

from .affinity_loss import AffinityLoss
from .class_aware_regularization import ClassAwareRegularization

__all__ = ['AffinityLoss', 'ClassAwareRegularization']
