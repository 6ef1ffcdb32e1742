"""Losses, and samplers of their pixels."""

from .affinity_loss import AffinityLoss
from .class_aware_regularization import ClassAwareRegularization
from .ohem_sampler import KeptMeanOHEMPixelSampler

__all__ = ['AffinityLoss', 'ClassAwareRegularization', 'KeptMeanOHEMPixelSampler']
