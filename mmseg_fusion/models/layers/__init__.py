"""Blocks that several heads use."""

from ...fusions import ScaleEqualizer, fold_scale_equalizer
from .attention import (
    AxialAttention,
    ChannelizedAxialAttention,
    ChannelizedSelfAttention,
    SelfAttention,
)
from .class_aware_conv import ClassAwareConv
from .deform_conv import ModulatedDeformConv2d, modulated_deform_conv2d
from .dense_feature_pyramid import DenseFeaturePyramid
from .kernel_sharing import KernelSharingAtrousConv

__all__ = [
    'AxialAttention',
    'ChannelizedAxialAttention',
    'ChannelizedSelfAttention',
    'ClassAwareConv',
    'DenseFeaturePyramid',
    'KernelSharingAtrousConv',
    'ModulatedDeformConv2d',
    'ScaleEqualizer',
    'SelfAttention',
    'fold_scale_equalizer',
    'modulated_deform_conv2d',
]
