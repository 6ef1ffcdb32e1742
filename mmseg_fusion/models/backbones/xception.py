"""Aligned Xception, the backbone of DeepLabV3+, for any output stride.

Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation",
arXiv 1802.02611, figure 4; a backbone of KSAC (Neurocomputing 2021, arXiv 1908.09443) and of CAA.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...channels import check_in_channels
from .pretrained_stem import PretrainedStem

#: Blocks of the middle flow, by depth.
MIDDLE_BLOCKS = {41: 8, 65: 16}
#: Names of parameters in timm's Xception, whose files hold the weights that DeepLab published.
TIMM_BLOCK = re.compile(r'blocks\.(\d+)\.(?:stack\.conv(\d)\.(conv|bn)_(dw|pw)|shortcut)\.(.+)')


class XceptionBlock(nn.Module):
    """Three separable convolutions and a shortcut around them; the last one has the stride.

    Batch norm follows each depthwise and each pointwise convolution. ReLU precedes each separable
    convolution, and the shortcut takes the input before the first ReLU. With ``activate_inside`` a
    ReLU follows each batch norm instead.

    Args:
        in_channels: channels of the input.
        channels: output channels of the three convolutions.
        stride: of the third convolution and of the shortcut.
        dilation: of the three depthwise convolutions.
        shortcut: ``'conv'``: a 1x1 convolution with batch norm; ``'identity'``; ``None``: none.
        activate_inside: ReLU after each depthwise and pointwise convolution, none before.
        norm_cfg: config of the norm layers.

    Shape:
        (N, in_channels, H, W) -> a pair, the second convolution's output
        (N, channels[1], H, W) and the block's (N, channels[2], ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        stride: int = 1,
        dilation: int = 1,
        shortcut: Literal['conv', 'identity'] | None = 'identity',
        activate_inside: bool = False,
        norm_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # Not in place: the shortcut and the levels need what stands before the ReLU.
        act_cfg = dict(type='ReLU', inplace=False)
        self.convs = nn.ModuleList()
        width = in_channels
        for i, out in enumerate(channels):
            self.convs.append(
                DepthwiseSeparableConvModule(
                    width,
                    out,
                    3,
                    stride=stride if i == len(channels) - 1 else 1,
                    padding=dilation,
                    dilation=dilation,
                    norm_cfg=norm_cfg,
                    act_cfg=act_cfg if activate_inside else None,
                )
            )
            width = out
        self.activate_before = None if activate_inside else nn.ReLU()
        self.has_shortcut = shortcut is not None
        self.shortcut = nn.Identity()
        if shortcut == 'conv':
            self.shortcut = ConvModule(
                in_channels, width, 1, stride=stride, norm_cfg=norm_cfg, act_cfg=None
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outs = []
        out = x
        for conv in self.convs:
            if self.activate_before is not None:
                out = self.activate_before(out)
            out = conv(out)
            outs.append(out)
        return outs[-2], out + self.shortcut(x) if self.has_shortcut else out


@MODELS.register_module()
class AlignedXception(PretrainedStem):
    """Xception-65 as DeepLabV3+ modified it (arXiv 1802.02611, figure 4), with dilation.

    Two 3x3 convolutions; an entry flow of three blocks (128, 256, 728), each with stride 2; a
    middle flow of 16 blocks (728) with identity shortcuts; an exit flow of a block (728, 1024,
    1024) with stride 2 and of three separable convolutions (1536, 1536, 2048) without a shortcut.
    There is no max pooling.

    ``output_stride`` 16 removes the stride of the exit flow, and 8 also that of the third entry
    block. Layers behind a convolution that lost its stride are dilated instead. With the same
    weights, the features of output stride 32 are therefore exactly those of 16 and 8 at every
    second or fourth position.

    Levels: 0 has stride 4 and 256 channels, the low-level feature of DeepLabV3+'s decoder (second
    convolution of the second entry block); 1 has stride 8 and 728 channels (second convolution of
    the third entry block, chosen likewise); 2 is the middle flow's output, 728 channels at stride
    16, or 8; 3 is the exit flow's, 2048 channels at the output stride. Level 0 is taken before the
    ReLU that follows it, as in the authors' code, and so are 1 and 2 (chosen).

    Chosen where the paper's figure leaves it open, as in the published code of DeepLab: ReLU
    before each separable convolution of entry and middle flow and of the exit block, and inside
    the last three separable convolutions instead; dilation starts behind the convolution that
    lost its stride; padding by the dilation on every side. No multi-grid rates.

    ImageNet weights: DeepLab's own, as timm publishes them for its ``xception41.tf_in1k`` and
    ``xception65.tf_in1k``, load without conversion
    (``init_cfg=dict(type='Pretrained', checkpoint=...)``). They need
    ``norm_cfg=dict(type='SyncBN', eps=1e-3)`` and images normalized with mean and standard
    deviation 127.5. On top of a config with ``model.pretrained``, set ``model.pretrained=None``:
    MMSegmentation moves those weights into the backbone.

    Args:
        depth: 65, or 41 with 8 blocks in the middle flow.
        output_stride: of the last level: 8, 16 or 32.
        in_channels: channels of the image.
        out_indices: levels to return.
        norm_cfg: config of the norm layers, default: ``dict(type='BN', requires_grad=True)``.
        frozen_stages: parameters and statistics that stay as they are: 0: the stem; 1: also the
            first two entry blocks; 2: also the third; 3: also the middle flow; 4: everything;
            -1: none.
        norm_eval: keep the batch norms in eval mode during training.
        init_cfg: where weights come from; default: Kaiming for convolutions, 1 for norms.

    Shape:
        (N, in_channels, H, W) in pixels -> tuple of (N, 256 | 728 | 728 | 2048, h, w), each side
        divided by the level's stride and rounded up.

    Raises:
        ValueError: an argument is not one of those listed.

    Example:
        >>> backbone = AlignedXception(41, output_stride=16)
        >>> [tuple(level.shape) for level in backbone.eval()(torch.zeros(1, 3, 33, 65))]
        [(1, 256, 9, 17), (1, 728, 5, 9), (1, 728, 3, 5), (1, 2048, 3, 5)]
    """

    def __init__(
        self,
        depth: Literal[41, 65] = 65,
        output_stride: Literal[8, 16, 32] = 16,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        norm_cfg: dict[str, Any] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(
            init_cfg
            or [
                dict(type='Kaiming', layer='Conv2d'),
                dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm']),
            ]
        )
        check_in_channels('AlignedXception', in_channels)
        if depth not in MIDDLE_BLOCKS:
            raise ValueError(
                f'AlignedXception: depth must be one of {sorted(MIDDLE_BLOCKS)}, got {depth}; '
                'edit backbone.depth'
            )
        if output_stride not in (8, 16, 32):
            raise ValueError(
                f'AlignedXception: output_stride must be 8, 16 or 32, got {output_stride}; '
                'edit backbone.output_stride'
            )
        if not out_indices or not set(out_indices) <= {0, 1, 2, 3}:
            raise ValueError(
                'AlignedXception: out_indices must name levels from 0 to 3, '
                f'got {tuple(out_indices)}; edit backbone.out_indices'
            )
        if frozen_stages not in range(-1, 5):
            raise ValueError(
                f'AlignedXception: frozen_stages must be from -1 to 4, got {frozen_stages}; '
                'edit backbone.frozen_stages'
            )
        self.depth = depth
        self.output_stride = output_stride
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        norm_cfg = norm_cfg or dict(type='BN', requires_grad=True)

        self.stem = nn.Sequential(
            ConvModule(in_channels, 32, 3, stride=2, padding=1, norm_cfg=norm_cfg),
            ConvModule(32, 64, 3, padding=1, norm_cfg=norm_cfg),
        )
        current, rate, width = 2, 1, 64

        def strided(channels: Sequence[int]) -> XceptionBlock:
            nonlocal current, rate, width
            stride = 2 if current < output_stride else 1
            block = XceptionBlock(width, channels, stride, rate, 'conv', norm_cfg=norm_cfg)
            current, rate, width = current * stride, rate * (2 // stride), channels[-1]
            return block

        self.entry_flow = nn.ModuleList(strided([c, c, c]) for c in (128, 256, 728))
        self.middle_flow = nn.ModuleList(
            XceptionBlock(728, [728] * 3, dilation=rate, norm_cfg=norm_cfg)
            for _ in range(MIDDLE_BLOCKS[depth])
        )
        self.exit_flow = nn.ModuleList([strided([728, 1024, 1024])])
        self.exit_flow.append(
            XceptionBlock(
                1024,
                [1536, 1536, 2048],
                dilation=rate,
                shortcut=None,
                activate_inside=True,
                norm_cfg=norm_cfg,
            )
        )
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        _, x = self.entry_flow[0](x)
        low, x = self.entry_flow[1](x)
        middle, x = self.entry_flow[2](x)
        for block in self.middle_flow:
            _, x = block(x)
        levels = [low, middle, x]
        for block in self.exit_flow:
            _, x = block(x)
        levels.append(x)
        return tuple(levels[i] for i in self.out_indices)

    def train(self, mode: bool = True) -> AlignedXception:
        """Sets the mode; frozen stages, and norms with ``norm_eval``, stay in eval mode."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        entry, middle = len(self.entry_flow), len(self.middle_flow)
        flows = [f'entry_flow.{i}' for i in range(entry)]
        flows += [f'middle_flow.{i}' for i in range(middle)]
        flows += [f'exit_flow.{i}' for i in range(len(self.exit_flow))]
        for key in [k for k in state_dict if k.startswith(prefix)]:
            name = key[len(prefix) :]
            if name.startswith('head.fc.'):
                del state_dict[key]
                continue
            block_name = TIMM_BLOCK.fullmatch(name)
            if block_name is None:
                continue
            block, conv, kind, part, rest = block_name.groups()
            if int(block) >= len(flows):
                raise ValueError(
                    f'the weights have a block {key}, Xception-{self.depth} has {len(flows)}; '
                    'edit backbone.depth or the checkpoint'
                )
            inner = f'shortcut.{rest}'
            if conv is not None:
                whole = 'depthwise_conv' if part == 'dw' else 'pointwise_conv'
                inner = f'convs.{int(conv) - 1}.{whole}.{kind}.{rest}'
            state_dict[f'{prefix}{flows[int(block)]}.{inner}'] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _freeze_stages(self) -> None:
        stages = (
            (self.stem,),
            (self.entry_flow[0], self.entry_flow[1]),
            (self.entry_flow[2],),
            (self.middle_flow,),
            (self.exit_flow,),
        )
        for stage in stages[: self.frozen_stages + 1]:
            for module in stage:
                module.eval()
                for parameter in module.parameters():
                    parameter.requires_grad_(False)
