"""Decode head of kernel-sharing atrous convolution (KSAC).

Ye Huang's thesis (University of Technology Sydney, 2022), chapter 2; "See More Than Once:
Kernel-Sharing Atrous Convolution for Semantic Segmentation", arXiv 1908.09443.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..layers.image_pool import check_pooled_batch
from ..layers.kernel_sharing import Implementation, KernelSharingAtrousConv


@MODELS.register_module()
class KSACHead(BaseDecodeHead):
    """Kernel-sharing atrous convolution in DeepLab's place for ASPP (thesis section 2.2).

    Three parts on one feature (figure 2.3): the pyramid with its shared kernel
    (:class:`~mmseg_fusion.models.layers.KernelSharingAtrousConv`), a 1x1 convolution, and the
    image-level feature, that is global average pooling and a 1x1 convolution. Concatenated, they
    are projected to ``channels`` by a 1x1 convolution. Every convolution is followed by norm and
    ReLU. The decoder of table 2.1's column "D" is that of DeepLabV3+: the pyramid is brought to
    output stride 4, concatenated with the backbone's feature there, reduced to 48 channels, and
    refined by two separable 3x3 convolutions.

    Differs from the paper: figure 2.3 names the three parts and not how they are joined; chosen,
    concatenation and 1x1 projection as in DeepLab. MMSegmentation's ``ASPPHead`` projects by a
    3x3 convolution. The decoder's separable convolutions are chosen as well: those of
    MMSegmentation's ``DepthwiseSeparableASPPHead``, which it has with and without a decoder, and
    this head only with one.

    Args:
        dilations: rates of the pyramid, in pixels of the level: (6, 12, 18) at output stride 16,
            twice that at 8. (1, 6, 12, 18, 24) is better still (table 2.2).
        image_level: whether there is an image-level branch.
        c1_in_channels: channels of ``inputs[0]``, the level at output stride 4, for the decoder;
            0 for no decoder.
        c1_channels: what the decoder reduces them to.
        implementation: how the pyramid is computed, see
            :class:`~mmseg_fusion.models.layers.KernelSharingAtrousConv`.
        **kwargs: arguments of ``BaseDecodeHead``; ``conv_cfg`` is that of all convolutions, the
            decoder's separable ones too, but the shared one and the classifier, which are plain.

    Shape:
        ``inputs``: levels (N, C_i, H_i, W_i), the pyramid's chosen by ``in_index``. Output
        (N, num_classes, H, W) of that level or, with a decoder, of ``inputs[0]``.

    Raises:
        ValueError: a rate or ``implementation`` is wrong, ``c1_in_channels`` is negative, or the
            image-level branch is trained with batch norm on a batch of one.
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
        if c1_in_channels < 0 or (c1_in_channels and c1_channels < 1):
            raise ValueError(
                'KSACHead: c1_in_channels must be the channels of the level at output stride 4, '
                'or 0 for no decoder, and c1_channels positive; got '
                f'{c1_in_channels=} and {c1_channels=}'
            )
        common = dict(norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)
        conv = dict(conv_cfg=self.conv_cfg, **common)
        self.pyramid = KernelSharingAtrousConv(
            self.in_channels, self.channels, dilations, implementation, **common
        )
        self.point = ConvModule(self.in_channels, self.channels, 1, **conv)
        self.image_pool = None
        if image_level:
            self.image_pool = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), ConvModule(self.in_channels, self.channels, 1, **conv)
            )
        parts = 3 if image_level else 2
        self.bottleneck = ConvModule(parts * self.channels, self.channels, 1, **conv)
        self.c1_bottleneck = self.sep_bottleneck = None
        if c1_in_channels:
            self.c1_bottleneck = ConvModule(c1_in_channels, c1_channels, 1, **conv)
            self.sep_bottleneck = nn.Sequential(
                DepthwiseSeparableConvModule(
                    self.channels + c1_channels, self.channels, 3, padding=1, **conv
                ),
                DepthwiseSeparableConvModule(self.channels, self.channels, 3, padding=1, **conv),
            )

    def _pooled(self, x: Tensor) -> Tensor:
        """The image-level feature, (N, C_in, H, W) -> (N, channels, 1, 1)."""
        check_pooled_batch('KSACHead', self.image_pool[1].norm, x)
        return self.image_pool(x)

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """What the classifier sees, (N, channels, H, W)."""
        x = self._transform_inputs(inputs)
        parts = [self.pyramid(x), self.point(x)]
        if self.image_pool is not None:
            size = x.shape[2:]
            pooled = self._pooled(x)
            parts.append(
                resize(pooled, size=size, mode='bilinear', align_corners=self.align_corners)
            )
        feats = self.bottleneck(torch.cat(parts, dim=1))
        if self.c1_bottleneck is None:
            return feats
        low = self.c1_bottleneck(inputs[0])
        feats = resize(feats, size=low.shape[2:], mode='bilinear', align_corners=self.align_corners)
        return self.sep_bottleneck(torch.cat([feats, low], dim=1))

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits (N, num_classes, H, W)."""
        return self.cls_seg(self._forward_feature(inputs))
