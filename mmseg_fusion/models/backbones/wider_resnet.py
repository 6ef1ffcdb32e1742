"""WiderResNet-38 (A2), pre-activated, dilated: the backbone of GFF's best model on Cityscapes.

Wu et al., "Wider or Deeper: Revisiting the ResNet Model for Visual Recognition", arXiv 1611.10080;
the variant A2 and the names of the weights are those of Rota Bulò et al., "In-Place Activated
BatchNorm", arXiv 1712.02616, and of GFF's authors (arXiv 1904.01803, table 8).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

from mmcv.cnn import build_norm_layer
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ...channels import check_in_channels
from .pretrained_stem import PretrainedStem

#: Blocks of modules 2 to 7, by depth: a layer per convolution, and one for the classifier.
BLOCKS = {16: (1, 1, 1, 1, 1, 1), 20: (1, 1, 1, 3, 1, 1), 38: (3, 3, 6, 3, 1, 1)}
#: Widths of a block's convolutions in modules 2 to 7, in units of module 1's width.
WIDTHS = ((2, 2), (4, 4), (8, 8), (8, 16), (8, 16, 32), (16, 32, 64))
#: Share of channels that is dropped before a block's last convolution, by module.
DROPOUT = {6: 0.3, 7: 0.5}
#: Modules behind a max pool, and modules whose first convolution has a stride where there is room.
POOLED, STRIDED = (2, 3), (4, 5, 6)


class IdentityResidualBlock(nn.Module):
    """Residual block with norm and ReLU before each convolution, none after the sum.

    Two 3x3 convolutions, or 1x1, 3x3 and 1x1. The shortcut is the input. If stride or width change,
    it is a 1x1 convolution of the input after the block's first norm and ReLU.

    Args:
        in_channels: channels of the input.
        channels: output channels of the two or three convolutions.
        stride: of the first convolution and of the shortcut.
        dilation: of the 3x3 convolutions.
        dropout: share of channels dropped before the last convolution.
        with_cp: compute the block again in the backward pass instead of keeping its features.
        norm_cfg: config of the norm layers.

    Shape:
        (N, in_channels, H, W) -> (N, channels[-1], ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        stride: int = 1,
        dilation: int = 1,
        dropout: float = 0.0,
        with_cp: bool = False,
        norm_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp

        def norm_relu(width: int) -> nn.Sequential:
            norm = build_norm_layer(norm_cfg or dict(type='BN'), width)[1]
            # In place: nothing else takes what a norm gives.
            return nn.Sequential(norm, nn.ReLU(inplace=True))

        self.bn1 = norm_relu(in_channels)
        kernels = (3, 3) if len(channels) == 2 else (1, 3, 1)
        convs: OrderedDict[str, nn.Module] = OrderedDict()
        width = in_channels
        for i, (kernel, out) in enumerate(zip(kernels, channels), 1):
            if i > 1:
                convs[f'bn{i}'] = norm_relu(width)
            if i == len(channels) and dropout:
                convs['dropout'] = nn.Dropout2d(dropout)
            rate = dilation if kernel == 3 else 1
            convs[f'conv{i}'] = nn.Conv2d(
                width,
                out,
                kernel,
                stride=stride if i == 1 else 1,
                padding=kernel // 2 * rate,
                dilation=rate,
                bias=False,
            )
            width = out
        self.convs = nn.Sequential(convs)
        self.proj_conv = None
        if stride != 1 or width != in_channels:
            self.proj_conv = nn.Conv2d(in_channels, width, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and x.requires_grad:
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        out = self.bn1(x)
        shortcut = x if self.proj_conv is None else self.proj_conv(out)
        # In place: the backward pass of a convolution does not need what the convolution gave.
        return self.convs(out).add_(shortcut)


@MODELS.register_module()
class WiderResNet(PretrainedStem):
    """WiderResNet-38 A2 with output stride 8 (backbone of GFF's row with 83.3, table 8).

    Module 1 is a 3x3 convolution (64 channels) at the size of the image. Max pooling precedes
    modules 2 and 3. Modules 2 to 7 have 3, 3, 6, 3, 1 and 1 blocks with norm and ReLU before each
    convolution: two 3x3 convolutions of (128, 128), (256, 256), (512, 512) and (512, 1024)
    channels, then 1x1, 3x3 and 1x1 of (512, 1024, 2048) and (1024, 2048, 4096). The first
    convolutions of modules 4, 5 and 6 have stride 2, up to ``output_stride``. Modules that lose
    their stride, and all later modules, are dilated instead: with output stride 8 by 2 in module 5
    and by 4 in modules 6 and 7. In training, modules 6 and 7 drop 30 % and 50 % of the channels
    before the last convolution.

    Levels are the sums of residual blocks, without a norm or ReLU, as in the authors' model. The
    norm in front of the classifier (``bn_out``) is not part of this backbone.

    With output stride 8 the first 3x3 convolution of module 5 is dilated too, as in the authors'
    code: the same weights give other features than with output stride 32.

    ImageNet weights: ``wider_resnet38.pth.tar`` of NVIDIA/semantic-segmentation has the same names
    with the prefix ``module.``; ``tools/model_converters/wider_resnet.py`` checks it, or a
    segmentation model on this backbone, and writes a file for
    ``init_cfg=dict(type='Pretrained', checkpoint=...)``. On top of a config with
    ``model.pretrained``, set ``model.pretrained=None``: MMSegmentation moves those weights into the
    backbone.

    Depths 16 and 20 are those of the authors' code, too. They have fewer blocks (1, 1, 1, 1, 1, 1
    and 1, 1, 1, 3, 1, 1), and no published weights are known. Chosen: output stride 16, by the same
    rule, and ``base_channels``, for small models.

    Args:
        depth: 38, or 16 or 20.
        output_stride: of the last modules: 8, 16 or 32.
        in_channels: channels of the image.
        base_channels: width of module 1; all others are multiples of it.
        out_indices: modules whose output is returned, rising, from 1 to 7; those behind the last
            are left out, so that no parameter stays unused.
        norm_cfg: config of the norm layers, default: ``dict(type='BN', requires_grad=True)``.
        frozen_stages: the last module whose parameters and statistics stay as they are, with all
            before it; 0 or -1: none.
        norm_eval: keep the batch norms in eval mode during training.
        with_cp: compute each block again in the backward pass to save memory. Batch norms then
            update their statistics twice in a step, as in MMSegmentation's ResNet.
        init_cfg: where weights come from; default: Kaiming for convolutions, 1 for norms.

    Shape:
        - Input: (N, in_channels, H, W) in pixels, of any size.
        - Output: a tuple with one tensor (N, ``out_channels[i]``, ceil(H / ``out_strides[i]``),
          ceil(W / ``out_strides[i]``)) per entry of ``out_indices``. Modules 1 to 7 have 1, 2, 4,
          8, 16, 32 and 64 times ``base_channels``, and with output stride 8 the strides 1, 2, 4, 8,
          8, 8 and 8.

    Attributes:
        out_channels: channels of each returned level.
        out_strides: stride of each returned level.

    Raises:
        ValueError: an argument is not one of those listed.

    Example:
        >>> backbone = WiderResNet(16, base_channels=4, out_indices=(2, 5, 7))
        >>> [tuple(level.shape) for level in backbone.eval()(torch.zeros(1, 3, 33, 65))]
        [(1, 8, 17, 33), (1, 64, 5, 9), (1, 256, 5, 9)]
    """

    def __init__(
        self,
        depth: Literal[16, 20, 38] = 38,
        output_stride: Literal[8, 16, 32] = 8,
        in_channels: int = 3,
        base_channels: int = 64,
        out_indices: Sequence[int] = (2, 5, 7),
        norm_cfg: dict[str, Any] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(
            init_cfg
            or [
                dict(type='Kaiming', layer='Conv2d'),
                dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm']),
            ]
        )
        check_in_channels('WiderResNet', in_channels)
        if depth not in BLOCKS:
            raise ValueError(
                f'WiderResNet: depth must be one of {sorted(BLOCKS)}, got {depth}; '
                'edit backbone.depth'
            )
        if output_stride not in (8, 16, 32):
            raise ValueError(
                f'WiderResNet: output_stride must be 8, 16 or 32, got {output_stride}; '
                'edit backbone.output_stride'
            )
        if base_channels < 1:
            raise ValueError(
                f'WiderResNet: base_channels must be at least 1, got {base_channels}; '
                'edit backbone.base_channels'
            )
        indices = tuple(out_indices)
        if not indices or list(indices) != sorted(set(indices) & set(range(1, 8))):
            raise ValueError(
                'WiderResNet: out_indices must be rising numbers of modules from 1 to 7, '
                f'got {indices}; edit backbone.out_indices'
            )
        if frozen_stages not in range(-1, indices[-1] + 1):
            raise ValueError(
                f'WiderResNet: frozen_stages must be from -1 to {indices[-1]}, the last of '
                f'out_indices, got {frozen_stages}; edit backbone.frozen_stages'
            )
        self.depth = depth
        self.output_stride = output_stride
        self.out_indices = indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        norm_cfg = norm_cfg or dict(type='BN', requires_grad=True)

        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        conv = nn.Conv2d(in_channels, base_channels, 3, padding=1, bias=False)
        self.mod1 = nn.Sequential(OrderedDict(conv1=conv))
        channels, strides = [base_channels], [1]
        width, current, rate = base_channels, 1, 1
        for i, (blocks, widths) in enumerate(zip(BLOCKS[depth], WIDTHS), 2):
            if i > indices[-1]:
                break
            if i in POOLED:
                current *= 2
            stride = 2 if i in STRIDED and current < output_stride else 1
            if i in STRIDED:
                current, rate = current * stride, rate * (2 // stride)
            module: OrderedDict[str, nn.Module] = OrderedDict()
            for block in range(1, blocks + 1):
                module[f'block{block}'] = IdentityResidualBlock(
                    width,
                    [w * base_channels for w in widths],
                    stride=stride if block == 1 else 1,
                    dilation=rate,
                    dropout=DROPOUT.get(i, 0.0),
                    with_cp=with_cp,
                    norm_cfg=norm_cfg,
                )
                width = widths[-1] * base_channels
            self.add_module(f'mod{i}', nn.Sequential(module))
            channels.append(width)
            strides.append(current)
        self.out_channels = tuple(channels[i - 1] for i in indices)
        self.out_strides = tuple(strides[i - 1] for i in indices)
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        levels = []
        for i in range(1, self.out_indices[-1] + 1):
            if i in POOLED:
                x = self.pool(x)
            x = getattr(self, f'mod{i}')(x)
            if i in self.out_indices:
                levels.append(x)
        return tuple(levels)

    def train(self, mode: bool = True) -> WiderResNet:
        """Sets the mode; frozen modules, and norms with ``norm_eval``, stay in eval mode."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        for i in range(1, self.frozen_stages + 1):
            getattr(self, f'mod{i}').eval().requires_grad_(False)
