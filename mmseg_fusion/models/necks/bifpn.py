"""Bidirectional feature pyramid network (BiFPN) over many levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmengine.model import BaseModule
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Fusion = Literal['fast', 'softmax', 'sum']

#: Batch norm of EfficientDet, with momentum in PyTorch's sense.
BATCH_NORM = dict(type='BN', momentum=0.01, eps=1e-3)
#: Keeps the fast fusion's denominator away from zero.
EPSILON = 1e-4


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``; a batch norm that sees a single value in training uses its running statistics.

    The topmost levels of a small image have a single cell. With a batch of one, such a level has no
    variance, and PyTorch raises an error. SyncBatchNorm over several processes sees more than one
    value, and is not changed.
    """
    alone = isinstance(norm, _BatchNorm) and norm.training and x.numel() == x.shape[1]
    if alone and isinstance(norm, nn.SyncBatchNorm) and torch.distributed.is_initialized():
        alone = torch.distributed.get_world_size(norm.process_group) < 2
    if not alone or norm.running_mean is None:
        return norm(x)
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )


class _NormedConv(nn.Module):
    """1x1 convolution and norm."""

    def __init__(self, in_channels: int, channels: int, norm_cfg: dict) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm = build_norm_layer(norm_cfg, channels)[1]

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.norm, self.conv(x))


class FusionNode(nn.Module):
    """A node of BiFPN: weighted sum, activation, separable 3x3 convolution, norm.

    Args:
        channels: of every input and of the output.
        num_inputs: how many features are fused.
        fusion: ``'fast'`` weighs them with ``relu(w) / (sum(relu(w)) + 1e-4)``, ``'softmax'`` with
            ``softmax(w)``, ``'sum'`` not at all.
        norm_cfg: norm behind the convolution.
        act_cfg: activation in front of it.

    Shape:
        ``num_inputs`` tensors (N, channels, H, W) of one size; result of that size.
    """

    def __init__(
        self, channels: int, num_inputs: int, fusion: Fusion, norm_cfg: dict, act_cfg: dict
    ) -> None:
        super().__init__()
        self.fusion = fusion
        self.weights = None if fusion == 'sum' else nn.Parameter(torch.ones(num_inputs))
        # Never in place: an input may be another node's as well.
        self.activation = build_activation_layer(_not_inplace(act_cfg))
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.norm = build_norm_layer(norm_cfg, channels)[1]

    def fusion_weights(self) -> Tensor | None:
        """The factors of the inputs, (num_inputs,); None where they are only added."""
        if self.weights is None:
            return None
        if self.fusion == 'softmax':
            return self.weights.softmax(0)
        positive = self.weights.relu()
        return positive / (positive.sum() + EPSILON)

    def forward(self, *inputs: Tensor) -> Tensor:
        weights = self.fusion_weights()
        if weights is not None:
            inputs = tuple(w * x for w, x in zip(weights.to(inputs[0].dtype).unbind(), inputs))
        x = inputs[0]
        for other in inputs[1:]:
            x = x + other
        return normalize(self.norm, self.pointwise(self.depthwise(self.activation(x))))


def _not_inplace(act_cfg: dict) -> dict:
    inplace = act_cfg['type'] in ('ReLU', 'LeakyReLU', 'ReLU6', 'SiLU', 'ELU', 'HSwish', 'HSigmoid')
    return dict(act_cfg, inplace=False) if inplace else act_cfg


class BiFPNLayer(nn.Module):
    """One repeat of BiFPN: top-down over all levels but the last, then bottom-up.

    Levels are numbered from 0 (finest) to L - 1. The top-down node of level i takes the level and
    the enlarged node above. The bottom-up node of level i takes the level, its top-down node and
    the pooled node below; that of the last level takes the level and the pooled node below. The
    top-down node of level 0 is the output of that level. There are L - 1 nodes in each direction,
    14 in total for eight levels.

    Args:
        channels: of every level.
        num_levels: L, at least 2.
        num_outs: how many levels come out, finest first.
        fusion, norm_cfg, act_cfg: of every node.
    """

    def __init__(
        self,
        channels: int,
        num_levels: int,
        num_outs: int,
        fusion: Fusion,
        norm_cfg: dict,
        act_cfg: dict,
    ) -> None:
        super().__init__()
        node = dict(fusion=fusion, norm_cfg=norm_cfg, act_cfg=act_cfg)
        last = num_levels - 1
        self.top_down = nn.ModuleList(FusionNode(channels, 2, **node) for _ in range(last))
        self.bottom_up = nn.ModuleList(
            FusionNode(channels, 2 if i == last else 3, **node) for i in range(1, num_outs)
        )

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        down = list(levels)
        for i in range(len(levels) - 2, -1, -1):
            above = enlarge(down[i + 1], levels[i].shape[2:])
            down[i] = self.top_down[i](levels[i], above)
        outs = down[:1]
        for i, node in enumerate(self.bottom_up, start=1):
            below = shrink(outs[-1], levels[i].shape[2:])
            own = (levels[i],) if i == len(levels) - 1 else (levels[i], down[i])
            outs.append(node(*own, below))
        return outs


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest neighbour, as EfficientDet's top-down path."""
    return x if tuple(x.shape[2:]) == tuple(size) else resize(x, size=tuple(size), mode='nearest')


def shrink(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Max pooling 3x3 of stride 2, as EfficientDet's bottom-up path."""
    # A level of another size than half comes from a backbone of other strides.
    return enlarge(F.max_pool2d(x, 3, 2, 1), size)


@MODELS.register_module()
class BiFPN(BaseModule):
    """Bidirectional feature pyramid over P2 to P9 (ESeg, arXiv 2203.12683, figure 3).

    A 1x1 convolution with norm maps every level of the backbone to ``channels``. Each further level
    is average pooled from the level below, with a 1x1 convolution and norm. The bidirectional
    fusion of EfficientDet (arXiv 1911.09070, section 3) follows ``num_repeats`` times. There is no
    dilated convolution; the receptive field comes from the pooled levels.

    Args:
        in_channels: channels of the backbone's levels, finest first.
        channels: of the pyramid.
        num_repeats: how often the levels are fused down and up.
        num_levels: levels of the pyramid, 8 for P2 to P9; at least the number of input levels.
        num_outs: number of output levels, finest first; None for all. Set it for a head that takes
            fewer levels: the last repeat then has no unused nodes, which DistributedDataParallel
            would refuse.
        fusion: weights of a node's inputs, ``'fast'`` (EfficientDet's default), ``'softmax'`` or
            ``'sum'``.
        norm_cfg: norm of every layer. Default: EfficientDet's batch norm.
        act_cfg: activation of the nodes. Default: Swish.
        init_cfg: initial weights.

    Shape:
        - inputs: ``len(in_channels)`` tensors (N, in_channels[i], H_i, W_i), finest first, each
          level half the size of the one before (rounded up) or of any other size.
        - output: ``num_outs`` tensors (N, channels, ...), each pooled level half the size of the
          one before, rounded up, down to a single cell.

    Raises:
        ValueError: no level, fewer levels than come in, less than one repeat, an unknown
            ``fusion``, or another number of inputs than ``in_channels``.

    Differs from EfficientDet: average pooling for the added levels, as in the slides, and one 1x1
    convolution per level instead of one per edge, which agrees with the published counts. Chosen:
    2x2 average pooling, and max pooling in the bottom-up path as in EfficientDet.

    Example:
        >>> neck = BiFPN([16, 32], channels=8, num_repeats=1, num_levels=3)
        >>> [tuple(y.shape) for y in neck((torch.rand(2, 16, 16, 16), torch.rand(2, 32, 8, 8)))]
        [(2, 8, 16, 16), (2, 8, 8, 8), (2, 8, 4, 4)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_repeats: int,
        num_levels: int = 8,
        num_outs: int | None = None,
        fusion: Fusion = 'fast',
        norm_cfg: dict = BATCH_NORM,
        act_cfg: dict = dict(type='Swish'),  # noqa: B006
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not isinstance(in_channels, (list, tuple)):
            raise ValueError(
                'BiFPN: in_channels must list the channels of the levels, finest first, got '
                f'{in_channels!r}; change model.neck.in_channels'
            )
        num_outs = num_levels if num_outs is None else num_outs
        if not in_channels or num_levels < max(len(in_channels), 2):
            raise ValueError(
                f'BiFPN: num_levels must be at least the number of in_channels, and at least 2; '
                f'got num_levels={num_levels} with in_channels={list(in_channels)}; change '
                'model.neck.num_levels'
            )
        if not 1 <= num_outs <= num_levels:
            raise ValueError(
                f'BiFPN: num_outs must be between 1 and num_levels={num_levels}, got {num_outs}; '
                'change model.neck.num_outs'
            )
        if num_repeats < 1:
            raise ValueError(f'BiFPN: num_repeats must be at least 1, got {num_repeats}')
        if fusion not in get_args(Fusion):
            raise ValueError(f'BiFPN: fusion must be one of {get_args(Fusion)}, got {fusion!r}')
        self.in_channels = list(in_channels)
        self.channels = channels
        self.num_levels = num_levels
        self.laterals = nn.ModuleList(_NormedConv(c, channels, norm_cfg) for c in in_channels)
        added = num_levels - len(self.in_channels)
        self.extras = nn.ModuleList(_NormedConv(channels, channels, norm_cfg) for _ in range(added))
        self.layers = nn.ModuleList(
            BiFPNLayer(channels, num_levels, outs, fusion, norm_cfg, act_cfg)
            for outs in [num_levels] * (num_repeats - 1) + [num_outs]
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The fused levels, finest first."""
        if len(inputs) != len(self.in_channels):
            raise ValueError(
                f'BiFPN: expected {len(self.in_channels)} levels (in_channels={self.in_channels}), '
                f'got {len(inputs)}; set the out_indices of the backbone or neck.in_channels'
            )
        levels = [lateral(x) for lateral, x in zip(self.laterals, inputs)]
        for extra in self.extras:
            # Windows at the border average what is there.
            pooled = F.avg_pool2d(levels[-1], 2, ceil_mode=True, count_include_pad=False)
            levels.append(extra(pooled))
        for layer in self.layers:
            levels = layer(levels)
        return tuple(levels)
