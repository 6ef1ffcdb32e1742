"""Decode head of ESeg: a weighted sum of all levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmcv.cnn import DepthwiseSeparableConvModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..layers.single_value import explains_single_values


@MODELS.register_module()
@explains_single_values
class ESegHead(BaseDecodeHead):
    r"""Softmax-weighted sum of the levels, one separable convolution, classifier (ESeg, figure 3).

    :math:`O = \sum_i \frac{e^{w_i}}{\sum_j e^{w_j}} \mathrm{Upsample}(P_i)`, one learnable weight
    per level, bilinear upsampling to the finest level (arXiv 2203.12683).

    A scalar commutes with the upsampling, so each level is scaled before it is enlarged. In eval
    mode the sum is formed in place.

    Args:
        **kwargs: arguments of ``BaseDecodeHead``; ``in_channels`` and ``in_index`` are lists,
            finest level first, all ``in_channels`` equal to ``channels``.

    Shape:
        - inputs: levels of the pyramid, of which ``in_index`` are taken, (N, channels, H_i, W_i).
        - logits: (N, num_classes, H_0, W_0) in the size of the first level.

    Raises:
        ValueError: the levels have not all ``channels`` channels.

    Chosen: the weights start equal; the separable convolution is depthwise 3x3, pointwise, norm,
    activation, with no norm or activation in between.

    Example:
        >>> head = ESegHead(in_channels=[8, 8], in_index=[0, 1], channels=8, num_classes=4)
        >>> head([torch.rand(2, 8, 16, 16), torch.rand(2, 8, 8, 8)]).shape
        torch.Size([2, 4, 16, 16])
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(input_transform='multiple_select', **kwargs)
        if any(c != self.channels for c in self.in_channels):
            raise ValueError(
                f'ESegHead adds its levels: all in_channels must be channels={self.channels}, got '
                f'{list(self.in_channels)}; set decode_head.channels to the channels of the neck'
            )
        self.level_weights = nn.Parameter(torch.zeros(len(self.in_channels)))
        self.conv = DepthwiseSeparableConvModule(
            self.channels,
            self.channels,
            3,
            padding=1,
            conv_cfg=self.conv_cfg,
            dw_norm_cfg=None,
            dw_act_cfg=None,
            pw_norm_cfg=self.norm_cfg,
            pw_act_cfg=self.act_cfg,
            # Nothing is between the two: a bias in front of the pointwise convolution is its own.
            bias=False,
        )

    def fuse(self, levels: Sequence[Tensor]) -> Tensor:
        """The weighted sum in the size of the first level."""
        weights = self.level_weights.softmax(0).to(levels[0].dtype).unbind()
        size = tuple(levels[0].shape[2:])
        out = weights[0] * levels[0]
        in_place = not torch.is_grad_enabled()
        for weight, level in zip(weights[1:], levels[1:]):
            x = weight * level
            if tuple(x.shape[2:]) != size:
                x = resize(x, size=size, mode='bilinear', align_corners=self.align_corners)
            out = out.add_(x) if in_place else out + x
        return out

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits; see the class for shapes."""
        return self.cls_seg(self.conv(self.fuse(self._transform_inputs(inputs))))
