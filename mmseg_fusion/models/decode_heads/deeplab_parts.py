"""Parts of DeepLab that the heads of KSAC and CAA share: the image level and the decoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import resize
from torch import Tensor, nn


class DeepLabParts(BaseDecodeHead):
    """Decode head with an optional image level and DeepLabV3+'s optional decoder.

    A subclass builds these parts in the order of its layers, and joins them in
    ``_forward_feature``. The layers are attributes of the head: ``image_pool``, ``c1_bottleneck``
    and ``sep_bottleneck``. A part that is not used is None.
    """

    #: One image has one pooled value per channel, whatever its size.
    single_value_remedies = {'image_pool': 'decode_head.image_level=False'}
    image_pool: nn.Sequential | None
    c1_bottleneck: ConvModule | None
    sep_bottleneck: nn.Sequential | None

    @property
    def _layer(self) -> dict:
        """Kinds of convolution, norm and activation of every layer."""
        return dict(conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)

    def _build_image_pool(self, wanted: bool, channels: int) -> None:
        """Global average pooling and a 1x1 convolution to ``channels``."""
        self.image_pool = None
        if wanted:
            self.image_pool = nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                ConvModule(self.in_channels, channels, 1, **self._layer),
            )

    def _build_decoder(self, c1_in_channels: int, c1_channels: int) -> None:
        """A 1x1 convolution of the level at stride 4 and two separable 3x3 convolutions.

        Raises:
            ValueError: a number of channels is wrong.
        """
        if c1_in_channels < 0 or (c1_in_channels and c1_channels < 1):
            raise ValueError(
                f'{type(self).__name__}: c1_in_channels must be the channels of the level at '
                'output stride 4, or 0 for no decoder, and c1_channels positive; got '
                f'{c1_in_channels=} and {c1_channels=}'
            )
        self.c1_bottleneck = self.sep_bottleneck = None
        if c1_in_channels:
            self.c1_bottleneck = ConvModule(c1_in_channels, c1_channels, 1, **self._layer)
            self.sep_bottleneck = nn.Sequential(
                *(
                    DepthwiseSeparableConvModule(
                        channels, self.channels, 3, padding=1, **self._layer
                    )
                    for channels in (self.channels + c1_channels, self.channels)
                )
            )

    def _with_image_level(self, parts: Sequence[Tensor], x: Tensor) -> Tensor:
        """``parts`` and the image level of ``x`` (N, in_channels, H, W), concatenated."""
        if self.image_pool is None:
            return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        return torch.cat([*parts, self.image_pool(x).expand(-1, -1, *x.shape[2:])], dim=1)

    def _decoded(self, out: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """``out`` refined at the size of ``inputs[0]``, or as it is without a decoder."""
        if self.c1_bottleneck is None:
            return out
        low = self.c1_bottleneck(inputs[0])
        out = resize(out, size=low.shape[2:], mode='bilinear', align_corners=self.align_corners)
        return self.sep_bottleneck(torch.cat([out, low], dim=1))

    @abstractmethod
    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """What the classifier sees, (N, channels, ...)."""

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits; see the class for shapes."""
        return self.cls_seg(self._forward_feature(inputs))
