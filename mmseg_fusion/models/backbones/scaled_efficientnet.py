"""EfficientNet of any width and depth, and its lite variant, on mmpretrain's layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, get_args

from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...channels import check_in_channels
from .efficientnet_layers import EfficientNetLayers, set_in_channels
from .mmpretrain_backbone import mmpretrain_backbone

Variant = Literal['default', 'lite']


class FusedBlock(BaseModule):
    """Fused inverted residual without expansion: one 3x3 convolution, norm, activation.

    mmpretrain's ``EdgeResidual`` would add a 1x1 convolution behind a 3x3 convolution that does not
    change the width. EfficientNetV2 (arXiv 2104.00298) has the single convolution.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        drop_path_rate: float,
        with_cp: bool = False,
        **layer: Any,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.conv = ConvModule(in_channels, channels, 3, stride=stride, padding=1, **layer)
        self.residual = stride == 1 and in_channels == channels
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and x.requires_grad:
            out = checkpoint(self.conv, x, use_reentrant=False)
        else:
            out = self.conv(x)
        return x + self.drop_path(out) if self.residual else out


@MODELS.register_module()
class ScaledEfficientNet(EfficientNetLayers):
    """EfficientNet scaled by ``width`` and ``depth``, stages 1 to 7 (ESeg, slides' table 3).

    The layers of the default variant, and the names of their weights, are those of
    :class:`mmpretrain.models.backbones.EfficientNet`: with the factors of B0 to B8
    (1.0, 1.0; 1.0, 1.1; 1.1, 1.2; 1.2, 1.4; 1.4, 1.8; 1.6, 2.2; 1.8, 2.6; 2.0, 3.1; 2.2, 3.6) its
    ImageNet checkpoints load with
    ``init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone')``. Widths are rounded to
    multiples of 8 but never below 90 %, numbers of blocks are rounded up. No dilation.

    According to a reader's summary of the paper, the lite variant has fused blocks (a 3x3
    convolution instead of the 1x1 and the depthwise one) in every stage, ReLU, and no squeeze and
    excitation.

    Args:
        width: factor of all widths.
        depth: factor of the number of blocks in each stage.
        variant: ``'default'`` or ``'lite'``.
        out_indices: layers that are returned, rising, numbered as in mmpretrain: 2, 3, 4 and 5
            have strides 4, 8, 16 and 32 (P2 to P5: EfficientNet's stages 2, 3, 5 and 7). Layers
            behind the last are left out.
        frozen_stages: how many layers are frozen, counted from the stem; 0 for none.
        norm_eval: norm layers use their running statistics in training, too.
        drop_path_rate: stochastic depth of the last block, rising from 0 in the first.
        init_cfg: of the weights; None for mmpretrain's.
        in_channels: channels of the image.
        **kwargs: of mmpretrain's EfficientNet: ``conv_cfg``, ``norm_cfg`` (default: batch norm
            with eps 1e-3), ``act_cfg`` (default: Swish, ReLU for lite), ``with_cp``.

    Shape:
        - Input: (N, in_channels, H, W) of any size.
        - Output: a tuple with one tensor (N, ``out_channels[i]``, ceil(H / ``out_strides[i]``),
          ceil(W / ``out_strides[i]``)) per entry of ``out_indices``.

    Attributes:
        out_channels: channels of each returned level.
        out_strides: stride of each returned level.

    Raises:
        ImportError: mmpretrain is not installed.
        ValueError: an argument is none of the above.

    Chosen: the lite variant's fused convolutions are 3x3 in every stage, also where EfficientNet
    has 5x5 (neither the slides nor the counts decide this); blocks without expansion are one 3x3
    convolution.

    Example:
        >>> backbone = ScaledEfficientNet(width=0.4, depth=0.6)
        >>> [tuple(level.shape) for level in backbone.eval()(torch.zeros(1, 3, 64, 64))]
        [(1, 16, 16, 16), (1, 16, 8, 8), (1, 48, 4, 4), (1, 128, 2, 2)]
        >>> backbone.out_strides
        (4, 8, 16, 32)
    """

    def __init__(
        self,
        width: float = 1.0,
        depth: float = 1.0,
        variant: Variant = 'default',
        out_indices: Sequence[int] = (2, 3, 4, 5),
        frozen_stages: int = 0,
        norm_eval: bool = False,
        drop_path_rate: float = 0.0,
        init_cfg: dict | list[dict] | None = None,
        in_channels: int = 3,
        **kwargs: Any,
    ) -> None:
        check_in_channels('ScaledEfficientNet', in_channels)
        for name, value in (('width', width), ('depth', depth)):
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(
                    f'ScaledEfficientNet: {name} is a factor above 0, but got {value!r}; change '
                    f'model.backbone.{name}'
                )
        if variant not in get_args(Variant):
            raise ValueError(
                f'ScaledEfficientNet: variant is one of {get_args(Variant)}, but got {variant!r}; '
                'change model.backbone.variant'
            )
        base = mmpretrain_backbone('EfficientNet', 'ScaledEfficientNet')
        # mmpretrain finds the settings by name in its class: a class of our own has our names.
        lite = variant == 'lite'
        settings = copy.deepcopy(base.layer_settings['b'])
        if lite:
            kwargs.setdefault('act_cfg', dict(type='ReLU'))
            for block in (block for stage in settings[1:-1] for block in stage):
                # Kernel, channels, ratio of squeeze and excitation, stride, expansion, kind.
                block[0], block[2], block[5] = 3, 0, 1
        scaled = type(
            'Scaled',
            (base,),
            dict(layer_settings={'b': settings}, arch_settings={'b': (width, depth, None)}),
        )
        net = scaled('b', drop_path_rate=drop_path_rate, **kwargs)
        set_in_channels(net, in_channels)
        if lite:
            _contract(net)
        super().__init__(
            net.layers, out_indices, frozen_stages, norm_eval, init_cfg or net.init_cfg
        )


def _contract(net: nn.Module) -> None:
    """Replaces the fused blocks of a network that expand nothing."""
    layer = dict(conv_cfg=net.conv_cfg, norm_cfg=net.norm_cfg, act_cfg=net.act_cfg)
    for stage in net.layers[1:-1]:
        for i, block in enumerate(stage):
            first, last = block.conv1.conv, block.conv2.conv
            if first.in_channels == first.out_channels:
                rate = getattr(block.drop_path, 'drop_prob', 0.0)
                stage[i] = FusedBlock(
                    first.in_channels,
                    last.out_channels,
                    first.stride[0],
                    rate,
                    net.with_cp,
                    **layer,
                )
