"""Semantic FPN and Ultra Semantic FPN, as heads on the backbone's levels.

Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, arXiv 1901.02446; Huang et al.,
"High-level Feature Guided Decoding for Semantic Segmentation", arXiv 2303.08646, section 3.3.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from mmcv.cnn import ConvModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..layers.levels import check_levels, resize_to
from ..layers.single_value import explains_single_values


class TopDown(nn.Module):
    """Lateral convolutions and top-down sums, the pyramid of the published costs (table 9).

    Args:
        in_channels: channels of the levels, finest first.
        channels: of the pyramid.
        kernel_size: of the lateral convolutions, which have a bias and neither norm nor activation,
            as MMSegmentation's FPN.

    Shape:
        Tensors (N, in_channels[i], H_i, W_i) to (N, channels, H_i, W_i).
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, kernel_size: int, conv_cfg: dict | None
    ) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(
            ConvModule(
                c, channels, kernel_size, padding=kernel_size // 2, conv_cfg=conv_cfg, act_cfg=None
            )
            for c in in_channels
        )

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The pyramid, finest first."""
        levels = [conv(x) for conv, x in zip(self.lateral_convs, inputs)]
        for i in range(len(levels) - 2, -1, -1):
            # Nearest, as FPN.
            above = resize(levels[i + 1], levels[i].shape[2:], mode='nearest')
            levels[i] = levels[i] + above
        return levels


@MODELS.register_module()
@explains_single_values
class SemanticFPNHead(BaseDecodeHead):
    """Semantic FPN from the backbone's levels, pyramid included (Panoptic FPN, section 3).

    The pyramid's level i, 0 the finest, passes max(1, i) blocks of 3x3 convolution, norm,
    activation and, for i > 0, bilinear upsampling to the next finer level; the branches are summed
    at the finest level and classified. MMSegmentation has the same model as the neck ``FPN`` and
    ``FPNHead``. Here it is one head, so that :class:`HFGDHead` can contain it and detach the
    backbone's levels, the last of which may come from an encoder.

    The last upsampling is applied once, to the sum of the branches, since bilinear interpolation is
    linear.

    Args:
        pyramid: config of a neck that makes the pyramid, ``dict(type='FPN', num_outs=4)`` for
            MMSegmentation's or ``dict(type='FaPN')``; ``in_channels`` and ``out_channels`` or
            ``channels`` come from the head, the configs of its layers do not. Default: lateral
            convolutions and top-down sums without FPN's 3x3 output convolutions (chosen: with these
            the costs would be a quarter above table 9 of HFGD).
        lateral_kernel_size: of the default pyramid's lateral convolutions.
        extra_upsampling: adds one block with upsampling to twice the size, for an output stride of
            2; it takes no finer level of the backbone.
        fuse_conv: adds a 1x1 convolution, norm and activation behind the sum.
        **kwargs: arguments of ``BaseDecodeHead``. ``channels`` is the width of pyramid and
            branches: HFGD has 256, Panoptic FPN 128 for the branches.

    Shape:
        Inputs: levels (N, C_i, H_i, W_i) listed by ``in_index``, finest first. Logits
        (N, num_classes, H_0, W_0), with ``extra_upsampling`` (N, num_classes, 2 H_0, 2 W_0).

    Raises:
        ValueError: ``in_channels`` or ``in_index`` is no list of levels, or ``pyramid`` gives
            another number of them.

    Example:
        >>> head = SemanticFPNHead(in_channels=[16, 32], channels=8, num_classes=4)
        >>> head([torch.rand(2, 16, 16, 16), torch.rand(2, 32, 8, 8)]).shape
        torch.Size([2, 4, 16, 16])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 256,
        *,
        pyramid: dict | None = None,
        lateral_kernel_size: int = 1,
        extra_upsampling: bool = False,
        fuse_conv: bool = False,
        in_index: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        in_index = check_levels(type(self).__name__, in_channels, in_index, kwargs)
        super().__init__(
            in_channels=in_channels,
            channels=channels,
            in_index=in_index,
            input_transform='multiple_select',
            **kwargs,
        )
        conv = dict(conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)
        if pyramid is None:
            self.pyramid: nn.Module = TopDown(
                self.in_channels, channels, lateral_kernel_size, self.conv_cfg
            )
        else:
            if not isinstance(pyramid, dict) or 'type' not in pyramid:
                raise ValueError(
                    f'{type(self).__name__}: pyramid must be the config of a neck, such as '
                    f"dict(type='FPN', num_outs={len(in_channels)}), got {pyramid!r}"
                )
            # MMSegmentation's necks say out_channels, those here channels.
            kind = pyramid['type']
            kind = MODELS.get(kind) if isinstance(kind, str) else kind
            takes = inspect.signature(kind).parameters if kind else ()
            width = 'out_channels' if 'out_channels' in takes else 'channels'
            self.pyramid = MODELS.build(
                {'in_channels': list(self.in_channels), width: channels, **pyramid}
            )
        self.branches = nn.ModuleList(
            nn.ModuleList(
                ConvModule(channels, channels, 3, padding=1, **conv)
                for _ in range(max(1, i) + extra_upsampling)
            )
            for i in range(len(self.in_channels))
        )
        self.extra_upsampling = extra_upsampling
        self.fuse_conv = ConvModule(channels, channels, 1, **conv) if fuse_conv else None

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """What the classifier sees."""
        levels = self.pyramid(self._transform_inputs(inputs))
        if len(levels) != len(self.branches):
            raise ValueError(
                f'{type(self).__name__}: pyramid gives {len(levels)} levels for '
                f'{len(self.branches)} branches, one per entry of in_channels; set pyramid.num_outs'
            )
        sizes = [x.shape[2:] for x in levels]
        finest = sizes[0]
        # Branches that end with the same upsampling wait for it together.
        waiting: list[tuple[Sequence[int], Tensor]] = []
        for i, (x, branch) in enumerate(zip(levels, self.branches)):
            if self.extra_upsampling:
                *blocks, last = branch
                for step, block in enumerate(blocks):
                    x = block(x)
                    if i:
                        x = resize_to(x, sizes[i - 1 - step], self.align_corners)
                x = last(x)
            else:
                for step, block in enumerate(branch):
                    if step:
                        x = resize_to(x, sizes[i - step], self.align_corners)
                    x = block(x)
            if waiting and waiting[-1][0] == x.shape[2:]:
                x = x + waiting.pop()[1]
            waiting.append((x.shape[2:], x))
        out = waiting[0][1]
        for _, x in waiting[1:]:
            out = out + resize_to(x, finest, self.align_corners)
        if self.extra_upsampling:
            out = resize_to(out, [2 * n for n in finest], self.align_corners)
        return out if self.fuse_conv is None else self.fuse_conv(out)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits; see the class for shapes."""
        return self.cls_seg(self._forward_feature(inputs))


@MODELS.register_module()
@explains_single_values
class USFPNHead(SemanticFPNHead):
    """Ultra Semantic FPN (HFGD, section 3.3 and figure 5).

    :class:`SemanticFPNHead` with leading 3x3 instead of 1x1 convolutions, a 1x1 convolution with
    norm and activation behind the sum (as in the authors' library), and 256 channels throughout.
    With ``output_stride=2`` every branch has one more block of convolution and upsampling.

    Args:
        output_stride: 4 or 2, for a backbone whose finest level has stride 4.
        **kwargs: arguments of :class:`SemanticFPNHead` but ``extra_upsampling``.

    Shape:
        As :class:`SemanticFPNHead`.

    Raises:
        ValueError: another ``output_stride``.

    Example:
        >>> head = USFPNHead(in_channels=[16, 32], channels=8, num_classes=4)
        >>> head([torch.rand(2, 16, 16, 16), torch.rand(2, 32, 8, 8)]).shape
        torch.Size([2, 4, 16, 16])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 256,
        *,
        output_stride: int = 4,
        lateral_kernel_size: int = 3,
        fuse_conv: bool = True,
        **kwargs: Any,
    ) -> None:
        if output_stride not in (2, 4):
            raise ValueError(f'USFPNHead: output_stride must be 4 or 2, got {output_stride!r}')
        super().__init__(
            in_channels,
            channels,
            lateral_kernel_size=lateral_kernel_size,
            extra_upsampling=output_stride == 2,
            fuse_conv=fuse_conv,
            **kwargs,
        )
