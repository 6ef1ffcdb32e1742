"""Context-augmented encoder (CAE) of the high-level feature guided decoder.

Huang et al., "High-level Feature Guided Decoding for Semantic Segmentation", arXiv 2303.08646.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import ConvModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor

from ..layers.attention import SelfAttention
from ..layers.single_value import explains_single_values


@MODELS.register_module()
@explains_single_values
class ContextAugmentedEncoder(BaseDecodeHead):
    """Wide linear layer, self-attention, trailing convolution, at output stride 32 (section 3.2).

    The head is a 1x1 convolution to ``wide_channels``, a 1x1 convolution to ``attention_channels``,
    self-attention whose result is added to its input, and a 1x1 convolution to ``channels``. Each
    convolution has norm and activation. Such heads usually begin with a 3x3 convolution; at output
    stride 32 the receptive field is large enough without it. The self-attention is regularized by
    class-aware regularization where the model is ``type='CAREncoderDecoder'``:
    ``car=dict(layer='out_conv')`` for this head alone, ``car=dict(layer='encoder.out_conv')`` as
    the encoder of :class:`HFGDHead`.

    It can be used as a decode head (table 4, "Our CAE" without upsampler), or as the encoder of
    :class:`HFGDHead`, which removes its classifier.

    Args:
        wide_channels: width of the wide linear layer.
        attention_channels: width of the self-attention.
        qk_channels: channels of query and key.
        **kwargs: arguments of ``BaseDecodeHead``; ``channels`` (256) is the width of the result.

    Shape:
        Inputs: levels, of which ``in_index`` is taken, (N, in_channels, H, W); logits
        (N, num_classes, H, W).

    Raises:
        ValueError: a width is less than 1.

    Chosen: norm and activation behind both linear layers (without an activation the two would be
    one); the trailing convolution is 1x1, as CAR makes it. Query and key of 64, value of 512, the
    residual and unscaled logits are those of the authors' SA (CAR).

    Example:
        >>> encoder = ContextAugmentedEncoder(
        ...     in_channels=32, channels=8, num_classes=4, wide_channels=16, attention_channels=16
        ... )
        >>> encoder([torch.rand(2, 32, 9, 7)]).shape
        torch.Size([2, 4, 9, 7])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 256,
        *,
        wide_channels: int = 2048,
        attention_channels: int = 512,
        qk_channels: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels=in_channels, channels=channels, **kwargs)
        if min(wide_channels, attention_channels) < 1:
            raise ValueError(
                'ContextAugmentedEncoder: wide_channels and attention_channels must be at least 1, '
                f'got {wide_channels} and {attention_channels}'
            )
        conv = dict(conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)
        self.wide_conv = ConvModule(self.in_channels, wide_channels, 1, **conv)
        self.in_conv = ConvModule(wide_channels, attention_channels, 1, **conv)
        self.attention = SelfAttention(
            attention_channels,
            attention_channels,
            qk_channels,
            share_qk=False,
            conv_cfg=self.conv_cfg,
            norm_cfg=None,
            act_cfg=None,
        )
        self.out_conv = ConvModule(attention_channels, channels, 1, **conv)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits of the level ``in_index``."""
        x = self.in_conv(self.wide_conv(self._transform_inputs(inputs)))
        return self.cls_seg(self.out_conv(x + self.attention(x)))
