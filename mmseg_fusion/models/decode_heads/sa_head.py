"""Decode head with self-attention, the baseline of class-aware regularization."""

from __future__ import annotations

from collections.abc import Sequence

from mmcv.cnn import ConvModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor

from ..layers.attention import SelfAttention


@MODELS.register_module()
class SAHead(BaseDecodeHead):
    """Self-attention head of the thesis' chapter 4 ("SA" in its tables 4.1 and 4.5).

    3x3 convolution to ``channels``, plus its self-attention (:class:`SelfAttention`: query, key
    and value by 1x1 convolutions with bias, logits not divided by the root of their channels, no
    gamma), 3x3 convolution, dropout, classifier.

    mmseg's ``NLHead`` is a relative: it embeds query and key in half of the channels and has an
    output convolution that starts at 0.

    Args:
        qk_channels: channels of query and key.
        **kwargs: arguments of ``BaseDecodeHead``; the thesis has ``channels=512``.

    Shape:
        Inputs: levels of the backbone, of which ``in_index`` is taken, (N, in_channels, H, W);
        logits (N, num_classes, H, W). The attention takes (H W)^2 weights per image where no
        fused kernel runs.

    Raises:
        ValueError: ``qk_channels`` is less than 1.
    """

    def __init__(self, qk_channels: int = 64, **kwargs) -> None:
        super().__init__(**kwargs)
        conv = dict(
            kernel_size=3,
            padding=1,
            conv_cfg=self.conv_cfg,
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg,
        )
        self.in_conv = ConvModule(self.in_channels, self.channels, **conv)
        self.attention = SelfAttention(
            self.channels,
            self.channels,
            qk_channels,
            share_qk=False,
            conv_cfg=self.conv_cfg,
            norm_cfg=None,
            act_cfg=None,
        )
        self.out_conv = ConvModule(self.channels, self.channels, **conv)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits of the level ``in_index``."""
        x = self.in_conv(self._transform_inputs(inputs))
        return self.cls_seg(self.out_conv(x + self.attention(x)))
