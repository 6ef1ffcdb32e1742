"""Decode head with self-attention, the baseline of class-aware regularization."""

from __future__ import annotations

from collections.abc import Sequence

from mmcv.cnn import ConvModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor

from ..layers.attention import SelfAttention
from ..layers.single_value import explains_single_values


@MODELS.register_module()
@explains_single_values
class SAHead(BaseDecodeHead):
    """Self-attention head of the thesis' chapter 4 ("SA" in its tables 4.1 and 4.5).

    A 3x3 convolution to ``attention_channels``; its self-attention is added to its output; a 3x3
    convolution to ``channels``, dropout and the classifier follow. The attention is
    :class:`SelfAttention`: query, key and value come from 1x1 convolutions with bias, logits are
    not divided by the root of their channels, and there is no gamma.

    mmseg's ``NLHead`` is similar, but embeds query and key in half of the channels and has an
    output convolution that starts at 0.

    Args:
        qk_channels: channels of query and key.
        attention_channels: channels of the first convolution and of the attention; default:
            ``channels``. With 512 here and ``channels=256`` the last convolution is that of section
            4.4.2.3 (ResNet-50 with CAR: 51.00 mIoU instead of 50.50).
        **kwargs: arguments of ``BaseDecodeHead``; the thesis has ``channels=512``.

    Shape:
        Inputs: levels of the backbone, of which ``in_index`` is taken, (N, in_channels, H, W);
            logits (N, num_classes, H, W). If no fused kernel runs, the attention stores (H W)^2
            weights per image.

    Raises:
        ValueError: ``qk_channels`` or ``attention_channels`` is less than 1.

    Example:
        >>> head = SAHead(in_channels=32, channels=8, num_classes=4)
        >>> head([torch.rand(2, 32, 9, 7)]).shape
        torch.Size([2, 4, 9, 7])
    """

    def __init__(
        self, qk_channels: int = 64, *, attention_channels: int | None = None, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        width = self.channels if attention_channels is None else attention_channels
        if width < 1:
            raise ValueError(
                f'SAHead: attention_channels must be at least 1, got {attention_channels}; change '
                'model.decode_head.attention_channels'
            )
        conv = dict(
            kernel_size=3,
            padding=1,
            conv_cfg=self.conv_cfg,
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg,
        )
        self.in_conv = ConvModule(self.in_channels, width, **conv)
        self.attention = SelfAttention(
            width,
            width,
            qk_channels,
            share_qk=False,
            conv_cfg=self.conv_cfg,
            norm_cfg=None,
            act_cfg=None,
        )
        self.out_conv = ConvModule(width, self.channels, **conv)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits of the level ``in_index``."""
        x = self.in_conv(self._transform_inputs(inputs))
        return self.cls_seg(self.out_conv(x + self.attention(x)))
