"""EfficientNet with dilated convolutions, on mmpretrain's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mmseg.registry import MODELS
from torch import nn

from ...channels import check_in_channels
from .efficientnet_layers import EfficientNetLayers, set_in_channels
from .mmpretrain_backbone import mmpretrain_backbone


@MODELS.register_module()
class DilatedEfficientNet(EfficientNetLayers):
    r"""EfficientNet of output stride 8, 16 or 32 (thesis tables 3.5, 3.7, 3.9 and 3.11).

    The layers are those of :class:`mmpretrain.models.backbones.EfficientNet`, and so are the names
    of the weights: its ImageNet checkpoints load with
    ``init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone')``. Strides beyond the
    output stride are removed, and the following depthwise convolutions are dilated instead. On top
    of a config with ``model.pretrained``, set ``model.pretrained=None``: MMSegmentation moves those
    weights into the backbone.

    Differs from the authors' code, which also dilates the convolution that loses its stride
    (``contract_dilation=False``). By default that convolution keeps its dilation, as in
    MMSegmentation's dilated ResNets. The network then computes the features of the pretrained
    network, at more positions.

    The authors train with ``drop_path_rate`` 0.4 for B5 and 0.5 for B7.

    Args:
        arch: ``'b0'`` to ``'b8'``, or another of mmpretrain's: ``'l2'``, ``'es'``, ``'em'``,
            ``'el'``. The widths of the levels are in :attr:`level_channels`.
        output_stride: of the last level; 32 is mmpretrain's own network.
        out_indices: layers that are returned, rising, numbered as in mmpretrain: 2 has stride 4
            (the low level of a decoder), 3 stride 8, 4 stride 16, 5 stride 32 and 6 is the 1x1
            convolution behind it, which the authors take; no stride exceeds ``output_stride``.
            Layers behind the last of them are left out, so that no parameter stays unused.
        frozen_stages: how many layers are frozen, counted from the stem; 0 for none.
        contract_dilation: the convolution that loses its stride keeps its dilation.
        norm_eval: norm layers use their running statistics in training, too.
        init_cfg: of the weights; None for mmpretrain's.
        in_channels: channels of the image.
        **kwargs: of mmpretrain's EfficientNet, with its defaults: ``conv_cfg`` (padding as in
            TensorFlow, which differs on the two sides of an image of even size; the pretrained
            weights expect it), ``norm_cfg`` (they expect ``eps=1e-3``), ``act_cfg``,
            ``drop_path_rate`` (of the last block, rising from 0 in the first), ``with_cp``.

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

    Example:
        >>> backbone = DilatedEfficientNet('b0', output_stride=16)
        >>> [tuple(level.shape) for level in backbone.eval()(torch.zeros(1, 3, 33, 65))]
        [(1, 24, 9, 17), (1, 40, 5, 9), (1, 112, 3, 5), (1, 1280, 3, 5)]
    """

    #: Channels of layers 2 to 6, by ``arch``.
    level_channels = {
        'b0': (24, 40, 112, 320, 1280),
        'b1': (24, 40, 112, 320, 1280),
        'b2': (24, 48, 120, 352, 1408),
        'b3': (32, 48, 136, 384, 1536),
        'b4': (32, 56, 160, 448, 1792),
        'b5': (40, 64, 176, 512, 2048),
        'b6': (40, 72, 200, 576, 2304),
        'b7': (48, 80, 224, 640, 2560),
        'b8': (56, 88, 248, 704, 2816),
        'l2': (104, 176, 480, 1376, 5504),
        'es': (32, 48, 144, 192, 1280),
        'em': (32, 48, 144, 192, 1280),
        'el': (40, 56, 176, 232, 1536),
    }

    def __init__(
        self,
        arch: str = 'b5',
        output_stride: Literal[8, 16, 32] = 16,
        out_indices: Sequence[int] = (2, 3, 4, 6),
        frozen_stages: int = 0,
        contract_dilation: bool = True,
        norm_eval: bool = False,
        init_cfg: dict | list[dict] | None = None,
        in_channels: int = 3,
        **kwargs,
    ) -> None:
        check_in_channels('DilatedEfficientNet', in_channels)
        if arch not in self.level_channels:
            raise ValueError(
                f'DilatedEfficientNet: arch is one of {", ".join(self.level_channels)}, but got '
                f'{arch!r}; change model.backbone.arch'
            )
        if output_stride not in (8, 16, 32):
            raise ValueError(
                f'DilatedEfficientNet: output_stride is 8, 16 or 32, but got {output_stride!r}; '
                'change model.backbone.output_stride'
            )
        net = mmpretrain_backbone('EfficientNet', 'DilatedEfficientNet')(arch, **kwargs)
        set_in_channels(net, in_channels)
        _dilate(net.layers, output_stride, contract_dilation)
        super().__init__(
            net.layers, out_indices, frozen_stages, norm_eval, init_cfg or net.init_cfg
        )


def _dilate(layers: nn.ModuleList, output_stride: int, contract: bool) -> None:
    """Takes strides beyond ``output_stride`` away and spreads the convolutions behind, in place.

    Args:
        layers: of the network, from the stem.
        output_stride: the largest stride that stays.
        contract: the convolution that loses its stride keeps its dilation.
    """
    stride, rate = 1, 1
    for conv in (m for m in layers.modules() if isinstance(m, nn.Conv2d)):
        if conv.kernel_size == (1, 1):
            continue
        before = rate
        if stride < output_stride:
            stride *= conv.stride[0]
        else:
            rate *= conv.stride[0]
            conv.stride = (1, 1)
        dilation = before if contract else rate
        conv.dilation = (dilation, dilation)
        # A convolution that pads by itself has no padding of its own.
        conv.padding = tuple(p * dilation for p in conv.padding)
