"""Feature-aligned pyramid network (FaPN): FPN with feature selection and feature alignment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule, build_activation_layer, build_conv_layer
from mmengine.model import BaseModule, caffe2_xavier_init
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..layers.deform_conv import Implementation, ModulatedDeformConv2d
from ..layers.levels import resize_to
from ..layers.single_value import explains_single_values


class FeatureSelection(nn.Module):
    """Feature selection module (FaPN, section 3): weights channels, then reduces their number.

    ``project(x + x * sigmoid(importance(mean of x)))``, two 1x1 convolutions without bias or norm.

    Args:
        in_channels: of the backbone's level.
        channels: of the result.
        conv_cfg: kind of the convolutions.

    Shape:
        (N, in_channels, H, W) to (N, channels, H, W).
    """

    def __init__(self, in_channels: int, channels: int, conv_cfg: dict | None) -> None:
        super().__init__()
        self.importance = build_conv_layer(conv_cfg, in_channels, in_channels, 1, bias=False)
        self.project = build_conv_layer(conv_cfg, in_channels, channels, 1, bias=False)
        for conv in (self.importance, self.project):
            caffe2_xavier_init(conv)

    def forward(self, x: Tensor) -> Tensor:
        importance = self.importance(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.project(x + x * importance)


class FeatureAlignment(nn.Module):
    """Feature alignment module (FaPN, section 3): aligns the level above with this level.

    A deformable convolution samples the enlarged level above, at offsets that are computed from
    both levels. The convolution that computes the offsets starts at zero, which gives no
    displacement and a mask of 1/2.

    Args:
        channels: of both levels and of the result.
        deformable_groups: number of groups of channels with separate offsets.
        norm_cfg: norm behind the 1x1 convolution that compares the two levels.
        act_cfg: activation behind the deformable convolution.
        conv_cfg: kind of the ordinary convolutions.
        implementation: of the deformable convolution.

    Shape:
        - selected: (N, channels, H, W), the level itself.
        - above: (N, channels, h, w), enlarged to (H, W) if it is of another size.
        - output: (N, channels, H, W), aligned and not yet added to ``selected``.
    """

    def __init__(
        self,
        channels: int,
        deformable_groups: int,
        norm_cfg: dict | None,
        act_cfg: dict,
        conv_cfg: dict | None,
        implementation: Implementation,
    ) -> None:
        super().__init__()
        plain = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg, act_cfg=None)
        self.compare = ConvModule(2 * channels, channels, 1, bias=False, **plain)
        caffe2_xavier_init(self.compare.conv)
        self.deform = ModulatedDeformConv2d(
            channels,
            channels,
            3,
            padding=1,
            deformable_groups=deformable_groups,
            implementation=implementation,
        )
        # Per group and tap the two offsets and the mask.
        self.parts = [2 * 9 * deformable_groups, 9 * deformable_groups]
        self.offset_mask = build_conv_layer(conv_cfg, channels, sum(self.parts), 3, padding=1)
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)
        self.activation = build_activation_layer(act_cfg)

    def forward(self, selected: Tensor, above: Tensor) -> Tensor:
        above = resize_to(above, selected.shape[2:])
        both = self.compare(torch.cat((selected, 2 * above), 1))
        offset, mask = self.offset_mask(both).split(self.parts, 1)
        return self.activation(self.deform(above, offset, mask.sigmoid()))


@MODELS.register_module()
@explains_single_values
class FaPN(BaseModule):
    """Feature-aligned pyramid network (Huang et al., ICCV 2021, arXiv 2108.07058, section 3).

    The network runs top-down, as FPN does. The topmost level goes through a 1x1 convolution. Every
    level below goes through :class:`FeatureSelection`; the sum of the level above is aligned to it
    by :class:`FeatureAlignment`, both are added, and a 3x3 convolution gives the output. FPN has a
    1x1 convolution instead of the selection, and nearest-neighbour upsampling instead of the
    alignment.

    Args:
        in_channels: channels of the backbone's levels, finest first.
        channels: of the pyramid.
        num_outs: number of output levels, finest first; None for all. Set it for a head that takes
            fewer levels: then every 3x3 convolution gets a gradient, as DistributedDataParallel
            requires.
        deformable_groups: number of groups of channels with separate offsets, a divisor of
            ``channels``.
        norm_cfg: norm of the topmost level's 1x1, of the 1x1 in front of the offsets and of the
            output's 3x3 convolutions, which have a bias if there is no norm (except that of the
            offsets). Default: none, as FPN.
        act_cfg: activation of the aligned level.
        conv_cfg: kind of all convolutions except the deformable ones.
        implementation: of the deformable convolutions, see
            :func:`~mmseg_fusion.models.layers.deform_conv.modulated_deform_conv2d`.
        init_cfg: initial weights. If it covers every convolution, it also covers those of the
            offsets, which otherwise start at zero.

    Shape:
        - inputs: ``len(in_channels)`` tensors (N, in_channels[i], H_i, W_i), finest first, of any
          sizes.
        - output: ``num_outs`` tensors (N, channels, H_i, W_i).

    Raises:
        ValueError: fewer than two levels, ``num_outs`` out of range, channels that
            ``deformable_groups`` does not divide, an unknown ``implementation``, or another number
            of inputs than ``in_channels``.

    As in the authors' code for detection, the level above counts twice in the offsets, the
    selection has no norm, the convolution in front of the offsets has its own norm, and the topmost
    level has no 3x3 convolution. Differs from that code: no further level is pooled on top, and the
    topmost 1x1 convolution starts as the other convolutions do; theirs has PyTorch's default
    weights. The authors' pixel decoder for MaskFormer has another form: a 1x1 convolution with norm
    instead of the selection, and one norm that the convolutions of offsets and output share.

    Example:
        >>> neck = FaPN([16, 32], channels=8)
        >>> [tuple(y.shape) for y in neck((torch.rand(2, 16, 16, 16), torch.rand(2, 32, 8, 8)))]
        [(2, 8, 16, 16), (2, 8, 8, 8)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_outs: int | None = None,
        deformable_groups: int = 8,
        norm_cfg: dict | None = None,
        act_cfg: dict = dict(type='ReLU'),  # noqa: B006
        conv_cfg: dict | None = None,
        implementation: Implementation = 'auto',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not isinstance(in_channels, (list, tuple)) or len(in_channels) < 2:
            raise ValueError(
                'FaPN: in_channels must list the channels of two levels or more, finest first, got '
                f'{in_channels!r}; change model.neck.in_channels'
            )
        num_outs = len(in_channels) if num_outs is None else num_outs
        if not 1 <= num_outs <= len(in_channels):
            raise ValueError(
                f'FaPN: num_outs must be between 1 and the {len(in_channels)} levels of '
                f'in_channels, got {num_outs}; change model.neck.num_outs'
            )
        if deformable_groups < 1 or channels % deformable_groups:
            raise ValueError(
                f'FaPN: deformable_groups must be a divisor of channels={channels}, got '
                f'{deformable_groups}; change model.neck.deformable_groups or model.neck.channels'
            )
        self.in_channels = list(in_channels)
        self.channels = channels
        self.num_outs = num_outs
        plain = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg, act_cfg=None)
        lower = self.in_channels[:-1]
        top = ConvModule(self.in_channels[-1], channels, 1, **plain)
        self.laterals = nn.ModuleList(
            [*(FeatureSelection(c, channels, conv_cfg) for c in lower), top]
        )
        self.alignments = nn.ModuleList(
            FeatureAlignment(
                channels, deformable_groups, norm_cfg, act_cfg, conv_cfg, implementation
            )
            for _ in lower
        )
        self.outputs = nn.ModuleList(
            ConvModule(channels, channels, 3, padding=1, **plain) for _ in lower[:num_outs]
        )
        for module in (top, *self.outputs):
            caffe2_xavier_init(module.conv)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The pyramid's levels, finest first."""
        if len(inputs) != len(self.in_channels):
            raise ValueError(
                f'FaPN: expected {len(self.in_channels)} levels (in_channels={self.in_channels}), '
                f'got {len(inputs)}; set the out_indices of the backbone or neck.in_channels'
            )
        levels = [lateral(x) for lateral, x in zip(self.laterals, inputs)]
        for i in range(len(levels) - 2, -1, -1):
            levels[i] = levels[i] + self.alignments[i](levels[i], levels[i + 1])
        outs = [output(x) for output, x in zip(self.outputs, levels)]
        return tuple(outs + levels[len(outs) : self.num_outs])
