"""Decode head of kernel-sharing atrous convolution (KSAC).

Ye Huang's thesis (University of Technology Sydney, 2022), chapter 2; "See More Than Once:
Kernel-Sharing Atrous Convolution for Semantic Segmentation", arXiv 1908.09443.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import ConvModule
from mmseg.registry import MODELS
from torch import Tensor

from ..layers.kernel_sharing import Implementation, KernelSharingAtrousConv
from ..layers.single_value import explains_single_values
from .deeplab_parts import DeepLabParts


@MODELS.register_module()
@explains_single_values
class KSACHead(DeepLabParts):
    """DeepLab's head with kernel-sharing atrous convolution instead of ASPP (thesis section 2.2).

    Three parts on one feature (figure 2.3): the pyramid with its shared kernel
    (:class:`~mmseg_fusion.models.layers.KernelSharingAtrousConv`), a 1x1 convolution, and the
    image-level feature, that is global average pooling and a 1x1 convolution. Concatenated, they
    are projected to ``channels`` by a 1x1 convolution. Every convolution is followed by norm and
    ReLU. The decoder of column "D" in table 2.1 is that of DeepLabV3+. The pyramid is resized to
    output stride 4 and concatenated with the backbone's feature there, which is reduced to 48
    channels; two separable 3x3 convolutions follow.

    Differs from the paper: figure 2.3 names the three parts, but not how they are joined. Chosen:
    concatenation and 1x1 projection, as in DeepLab. MMSegmentation's ``ASPPHead`` projects by a 3x3
    convolution. Also chosen: the decoder's separable convolutions, as in MMSegmentation's
    ``DepthwiseSeparableASPPHead``. That head has separable convolutions with and without a decoder,
    this head only with a decoder.

    Args:
        dilations: rates of the pyramid, in pixels of the level: (6, 12, 18) at output stride 16,
            twice that at 8. (1, 6, 12, 18, 24) is better still (table 2.2).
        image_level: whether there is an image-level branch.
        c1_in_channels: channels of ``inputs[0]``, the level at output stride 4, for the decoder;
            0 for no decoder.
        c1_channels: channels to which the decoder reduces them.
        implementation: how the pyramid is computed, see
            :class:`~mmseg_fusion.models.layers.KernelSharingAtrousConv`.
        **kwargs: arguments of ``BaseDecodeHead``; ``conv_cfg`` holds for all convolutions,
            including the decoder's separable ones, except the shared convolution and the
            classifier, which are plain.

    Shape:
        ``inputs``: levels (N, C_i, H_i, W_i), the pyramid's chosen by ``in_index``. Output
        (N, num_classes, H, W) of that level or, with a decoder, of ``inputs[0]``.

    Raises:
        ValueError: a rate or ``implementation`` is wrong, ``c1_in_channels`` is negative, or the
            image-level branch is trained with batch norm on a batch of one.

    Example:
        >>> head = KSACHead(in_channels=32, channels=8, num_classes=4, dilations=(2, 3))
        >>> head([torch.rand(2, 32, 9, 7)]).shape
        torch.Size([2, 4, 9, 7])
    """

    def __init__(
        self,
        dilations: Sequence[int] = (6, 12, 18),
        image_level: bool = True,
        c1_in_channels: int = 0,
        c1_channels: int = 48,
        implementation: Implementation = 'auto',
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.pyramid = KernelSharingAtrousConv(
            self.in_channels,
            self.channels,
            dilations,
            implementation,
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg,
        )
        self.point = ConvModule(self.in_channels, self.channels, 1, **self._layer)
        self._build_image_pool(image_level, self.channels)
        parts = 3 if image_level else 2
        self.bottleneck = ConvModule(parts * self.channels, self.channels, 1, **self._layer)
        self._build_decoder(c1_in_channels, c1_channels)

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """What the classifier sees, (N, channels, H, W)."""
        x = self._transform_inputs(inputs)
        feats = self.bottleneck(self._with_image_level([self.pyramid(x), self.point(x)], x))
        return self._decoded(feats, inputs)
