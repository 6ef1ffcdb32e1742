"""A decode head that adds levels up at the size of the finest one."""

from __future__ import annotations

from collections.abc import Sequence

from mmcv.cnn import ConvModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class SumFusionHead(BaseDecodeHead):
    """Adds levels up at the size of the finest one.

    Args:
        kernel_size: of the convolution behind the sum, odd.
        **kwargs: of BaseDecodeHead.

    Shape:
        Input: levels (N, C_i, H_i, W_i). Output: logits (N, num_classes, H_0, W_0).
    """

    def __init__(self, kernel_size: int = 3, **kwargs) -> None:
        super().__init__(input_transform='multiple_select', **kwargs)
        cfg = dict(conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)
        self.laterals = nn.ModuleList(
            ConvModule(c, self.channels, 1, **cfg) for c in self.in_channels
        )
        self.fuse = ConvModule(
            self.channels, self.channels, kernel_size, padding=kernel_size // 2, **cfg
        )

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        levels = self._transform_inputs(inputs)
        fine, *coarse = (lateral(x) for lateral, x in zip(self.laterals, levels))
        for x in coarse:
            fine = fine + resize(
                x, fine.shape[2:], mode='bilinear', align_corners=self.align_corners
            )
        return self.cls_seg(self.fuse(fine))
