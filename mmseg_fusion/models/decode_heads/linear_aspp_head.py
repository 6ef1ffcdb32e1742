"""ASPP that ends in a plain convolution: the context of GFF's released model.

Li et al., "Gated Fully Fusion for Semantic Segmentation", AAAI 2020, arXiv 1904.01803.
"""

from __future__ import annotations

from typing import Any

from mmcv.cnn import ConvModule
from mmseg.models.decode_heads import ASPPHead
from mmseg.registry import MODELS

from ..layers.single_value import explains_single_values


@MODELS.register_module()
@explains_single_values
class LinearASPPHead(ASPPHead):
    """MMSegmentation's ``ASPPHead`` with neither norm nor activation behind its last convolution.

    In the authors' code no norm or activation follows the 3x3 convolution over the concatenated
    branches, and its output, with negative values, enters the gates and the fusion. ``ASPPHead``
    would remove the negative values. The convolution has PyTorch's default initial weights, as in
    the authors' code.

    Args:
        **kwargs: arguments of ``ASPPHead``.

    Shape:
        As ``ASPPHead``.

    Example:
        >>> head = LinearASPPHead(in_channels=32, channels=8, num_classes=4, dilations=(1, 2))
        >>> head([torch.rand(2, 32, 9, 7)]).shape
        torch.Size([2, 4, 9, 7])
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        bottleneck = self.bottleneck
        self.bottleneck = ConvModule(
            bottleneck.in_channels,
            bottleneck.out_channels,
            bottleneck.kernel_size,
            padding=bottleneck.padding,
            bias=False,
            conv_cfg=self.conv_cfg,
            norm_cfg=None,
            act_cfg=None,
        )
        self.bottleneck.conv.reset_parameters()

    def init_weights(self) -> None:
        """As ``ASPPHead``, but for the last convolution."""
        super().init_weights()
        self.bottleneck.conv.reset_parameters()
