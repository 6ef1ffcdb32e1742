"""A fully convolutional head whose gradient does not reach the features."""

from __future__ import annotations

from collections.abc import Sequence

from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS
from torch import Tensor

from ..layers.single_value import explains_single_values


@MODELS.register_module()
@explains_single_values
class DetachedFCNHead(FCNHead):
    """MMSegmentation's FCN head behind a stop-gradient: a probe of a backbone's features.

    Huang et al., "High-level Feature Guided Decoding for Semantic Segmentation", arXiv 2303.08646,
    section 5.1. While an upsampler trains the backbone, this head measures how good the high-level
    features still are.

    Args:
        **kwargs: arguments of ``FCNHead``.

    Shape:
        As ``FCNHead``; no gradient reaches its inputs.

    Example:
        >>> head = DetachedFCNHead(in_channels=32, channels=8, num_classes=4)
        >>> feature = torch.rand(2, 32, 9, 7, requires_grad=True)
        >>> head([feature]).sum().backward()
        >>> feature.grad is None
        True
    """

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits (N, num_classes, H, W)."""
        return super().forward([x.detach() for x in inputs])
