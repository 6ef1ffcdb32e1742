"""Context prior head of CPNet, a baseline of class-aware regularization.

Yu et al., "Context Prior for Scene Segmentation", CVPR 2020, arXiv 2004.01547, section 3.
"""

from __future__ import annotations

import torch
from mmcv.cnn import ConvModule, build_activation_layer, build_norm_layer
from mmengine.model import BaseModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from mmseg.utils import ConfigType, SampleList
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from ..layers.single_value import explains_single_values


class AggregationModule(BaseModule):
    """Fully separable convolution (CPNet, "Aggregation Module"): k x k cells at 4 k per channel.

    A 3x3 convolution to ``channels``; then depthwise k x 1 and 1 x k in both orders, summed, norm
    and activation.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        kernel_size: k, odd.
        conv_cfg: kind of convolution.
        norm_cfg: kind of norm, or None.
        act_cfg: kind of activation.

    Shape:
        (N, in_channels, H, W) to (N, channels, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int = 11,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.reduce_conv = ConvModule(
            in_channels,
            channels,
            3,
            padding=1,
            conv_cfg=conv_cfg,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
        )
        tall, wide = (kernel_size, 1), (1, kernel_size)
        self.tall_wide, self.wide_tall = (
            nn.Sequential(
                *(
                    ConvModule(
                        channels,
                        channels,
                        size,
                        padding=(size[0] // 2, size[1] // 2),
                        groups=channels,
                        conv_cfg=conv_cfg,
                        act_cfg=None,
                    )
                    for size in order
                )
            )
            for order in ((tall, wide), (wide, tall))
        )
        self.norm = build_norm_layer(norm_cfg, channels)[1] if norm_cfg else nn.Identity()
        self.activation = build_activation_layer(act_cfg) if act_cfg else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Aggregates the neighbourhood of each cell of ``x`` (N, in_channels, H, W)."""
        x = self.reduce_conv(x)
        return self.activation(self.norm(self.tall_wide(x) + self.wide_tall(x)))


@MODELS.register_module()
@explains_single_values
class CPHead(BaseDecodeHead):
    """Context prior head of CPNet (CVPR 2020, section 3), for features at output stride 8.

    The aggregated feature ("Aggregation Module") predicts, for each cell of a grid, which cells
    have the same class. This prediction is the context prior P, with one channel per cell,
    supervised by the affinity loss ("Affinity Loss"). P and 1 - P gather the features of the same
    class and of the other classes; both contexts, each through a 1x1 convolution, are concatenated
    with the input feature ("Context Prior Layer"), and a 3x3 convolution leads to the classifier.

    Args:
        prior_channels: channels of the aggregated feature and of the contexts.
        prior_size: height and width of the grid that P relates, or one number for both.
        am_kernel_size: kernel size of the aggregation module, odd.
        loss_prior_decode: config of the loss of P, or None for none.
        **kwargs: arguments of :class:`mmseg.models.decode_heads.decode_head.BaseDecodeHead`;
            ``channels`` is the width of the last convolution.

    Shape:
        Input (N, C, H, W) at ``in_index``; logits (N, out_channels, h, w) of the grid; P
        (N, S, S) with S the number of cells.

    Raises:
        ValueError: ``am_kernel_size`` is even, or a size is not positive.

    Differs from the authors' code, whose feature must be as large as the grid (64 x 64 in their
    config). Here a feature of any other size is resized to the grid bilinearly, as the authors of
    CAR do. They do not align corners; here ``align_corners`` decides. If the feature is much larger
    than the grid, test in sliding windows (``test_cfg=dict(mode='slide', ...)``). The product with
    1 - P is computed as the mean feature minus the product with P.

    Example:
        >>> head = CPHead(
        ...     in_channels=32, channels=8, num_classes=4, prior_channels=16, prior_size=(9, 7)
        ... )
        >>> head([torch.rand(2, 32, 9, 7)]).shape
        torch.Size([2, 4, 9, 7])
    """

    def __init__(
        self,
        *,
        prior_channels: int = 512,
        prior_size: int | tuple[int, int] = 64,
        am_kernel_size: int = 11,
        loss_prior_decode: dict | None = dict(type='AffinityLoss'),  # noqa: B006  (only read)
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        size = tuple(_pair(prior_size))
        if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise ValueError(
                f'prior_size must be one or two positive numbers of cells, got {prior_size!r}'
            )
        if am_kernel_size < 1 or am_kernel_size % 2 == 0:
            raise ValueError(f'am_kernel_size must be odd, got {am_kernel_size}')
        self.prior_channels = prior_channels
        self.prior_size = size
        parts = dict(conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)
        self.aggregation = AggregationModule(
            self.in_channels, prior_channels, am_kernel_size, **parts
        )
        self.prior_conv = ConvModule(
            prior_channels, size[0] * size[1], 1, **{**parts, 'act_cfg': None}
        )
        self.intra_conv = ConvModule(prior_channels, prior_channels, 1, **parts)
        self.inter_conv = ConvModule(prior_channels, prior_channels, 1, **parts)
        self.bottleneck = ConvModule(
            self.in_channels + 2 * prior_channels, self.channels, 3, padding=1, **parts
        )
        self.loss_prior_decode = MODELS.build(loss_prior_decode) if loss_prior_decode else None

    def _forward_feature(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The feature before the classifier, and the logits (N, S, *prior_size) of P."""
        x = self._transform_inputs(inputs)
        if tuple(x.shape[2:]) != self.prior_size:
            x = resize(
                x,
                size=self.prior_size,
                mode='bilinear',
                align_corners=self.align_corners,
                warning=False,
            )
        aggregated = self.aggregation(x)
        prior = self.prior_conv(aggregated)
        value = aggregated.flatten(2)
        # The factor inside the product keeps the sum over thousands of cells in float16's range.
        intra = torch.baddbmm(
            value.new_zeros(1, 1, 1),
            value,
            prior.sigmoid().flatten(2),
            beta=0,
            alpha=1 / value.shape[2],
        )
        inter = value.mean(2, keepdim=True) - intra
        context = [
            conv(y.unflatten(2, self.prior_size))
            for conv, y in ((self.intra_conv, intra), (self.inter_conv, inter))
        ]
        return self.bottleneck(torch.cat([x, *context], dim=1)), prior

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Logits (N, out_channels, h, w) in the size of the grid."""
        return self.cls_seg(self._forward_feature(inputs)[0])

    def feature_and_losses(
        self, inputs: list[Tensor], batch_data_samples: SampleList
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The feature before the classifier, and the loss of the prior."""
        feature, prior = self._forward_feature(inputs)
        if self.loss_prior_decode is None:
            return feature, {}
        label = self._stack_batch_gt(batch_data_samples).squeeze(1)
        loss = self.loss_prior_decode(prior, label, ignore_index=self.ignore_index)
        return feature, {self.loss_prior_decode.loss_name: loss}

    def loss(
        self, inputs: list[Tensor], batch_data_samples: SampleList, train_cfg: ConfigType
    ) -> dict[str, Tensor]:
        """The losses of the logits, and that of the prior."""
        feature, losses = self.feature_and_losses(inputs, batch_data_samples)
        return {**self.loss_by_feat(self.cls_seg(feature), batch_data_samples), **losses}
