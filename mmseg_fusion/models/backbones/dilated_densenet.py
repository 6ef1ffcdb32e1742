"""DenseNet with dilated convolutions, on mmpretrain's layers.

Huang et al., "Densely Connected Convolutional Networks", arXiv 1608.06993; dilated as Yang et al.,
"DenseASPP for Semantic Segmentation in Street Scenes", CVPR 2018, section 4.1, do; a backbone of
GFF (AAAI 2020, arXiv 1904.01803).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ...channels import check_in_channels
from .mmpretrain_backbone import mmpretrain_backbone
from .pretrained_stem import PretrainedStem


@MODELS.register_module()
class DilatedDenseNet(PretrainedStem):
    """DenseNet of output stride 8, 16 or 32 (DenseASPP, CVPR 2018, section 4.1).

    The layers are those of :class:`mmpretrain.models.backbones.DenseNet`, and so are the names of
    the weights: its ImageNet checkpoints load with
    ``init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone')``. Average pools between
    dense blocks beyond the output stride are removed, and the 3x3 convolutions of the following
    blocks are dilated instead: at output stride 8 by 2 in the third block and by 4 in the fourth.
    On top of a config with ``model.pretrained``, set ``model.pretrained=None``: MMSegmentation
    moves those weights into the backbone.

    There is one level per dense block, taken before the transition reduces and pools it, as a
    ResNet's levels are the outputs of its stages. Chosen: a level is the block's output after the
    norm and activation with which the following transition begins. The output itself is a
    concatenation of layers of different scales, and every layer of the network that reads it begins
    with a norm. The last level, which mmpretrain ends with norm and activation, is then of the same
    kind as the others. With ``'121'`` they have 256, 512, 1024 and 1024 channels.

    Differs from the authors' code, which adds a fourth transition to half the channels and another
    norm, neither of which is pretrained. Here ``reduced_channels`` of
    :class:`~mmseg_fusion.models.decode_heads.DenseASPPHead` does this. Differs from mmpretrain: on
    a side of odd length an average pool makes a cell of the last row or column instead of dropping
    it, as in MMSegmentation's ResNetV1d, so that every level has ceil(side / stride) cells.

    Args:
        arch: ``'121'``, ``'161'``, ``'169'`` or ``'201'``, or a dict with ``growth_rate``,
            ``depths`` (layers of each dense block) and ``init_channels``.
        output_stride: the largest stride of a level: 8, 16 or 32; 32 is mmpretrain's own network.
        out_indices: dense blocks whose levels are returned, rising. Layers behind the last of them
            are left out, so that no parameter stays unused.
        frozen_stages: parameters and statistics that stay as they are: 0: the stem; ``i``: also the
            first ``i`` dense blocks and the transition behind each; -1: none.
        norm_eval: norm layers use their running statistics in training, too.
        init_cfg: of the weights; default: Kaiming for convolutions, as in the DenseNet paper, and
            1 for norms.
        in_channels: channels of the image.
        **kwargs: of mmpretrain's DenseNet, with its defaults: ``bn_size``, ``drop_rate``,
            ``compression_factor``, ``norm_cfg``, ``act_cfg``, ``memory_efficient`` (layers are
            computed again in the backward pass instead of being stored; the running statistics of a
            batch norm are then updated twice per batch).

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
        >>> backbone = DilatedDenseNet('121', output_stride=8, out_indices=(1, 3))
        >>> [tuple(level.shape) for level in backbone.eval()(torch.zeros(1, 3, 33, 65))]
        [(1, 512, 5, 9), (1, 1024, 5, 9)]
    """

    def __init__(
        self,
        arch: str | dict[str, Any] = '121',
        output_stride: Literal[8, 16, 32] = 8,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: dict | list[dict] | None = None,
        in_channels: int = 3,
        **kwargs: Any,
    ) -> None:
        check_in_channels('DilatedDenseNet', in_channels)
        super().__init__(
            init_cfg
            or [
                dict(type='Kaiming', layer='Conv2d'),
                dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm']),
            ]
        )
        densenet = mmpretrain_backbone('DenseNet', 'DilatedDenseNet')
        keys = {'growth_rate', 'depths', 'init_channels'}
        known = keys <= set(arch) if isinstance(arch, dict) else arch in densenet.arch_settings
        if not known:
            raise ValueError(
                f'DilatedDenseNet: arch is one of {", ".join(densenet.arch_settings)}, as a '
                f'string, or a dict with {", ".join(sorted(keys))}, but got {arch!r}; change '
                'model.backbone.arch'
            )
        if output_stride not in (8, 16, 32):
            raise ValueError(
                f'DilatedDenseNet: output_stride is 8, 16 or 32, but got {output_stride!r}; '
                'change model.backbone.output_stride'
            )
        net = densenet(arch, in_channels=in_channels, **kwargs)
        for stage in net.stages:
            for layer in stage.block:
                layer.call_checkpoint_bottleneck = partial(_checkpointed, layer)
        blocks, indices = len(net.stages), tuple(out_indices)
        if not indices or list(indices) != sorted(set(indices) & set(range(blocks))):
            raise ValueError(
                f'DilatedDenseNet: out_indices are rising numbers of dense blocks, 0 to '
                f'{blocks - 1}, but got {out_indices!r}; change model.backbone.out_indices'
            )
        number = indices[-1] + 1
        if frozen_stages not in range(-1, number + 1):
            raise ValueError(
                f'DilatedDenseNet: frozen_stages is -1 for none, or a number of dense blocks from '
                f'0 to {number} with out_indices={indices}, but got {frozen_stages!r}; change '
                'model.backbone.frozen_stages'
            )
        self.out_indices = indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.stem = net.stem
        self.stages = net.stages[:number]
        self.transitions = net.transitions[:number]
        # Of the last transition only what makes the level; its names stay mmpretrain's.
        parts = list(self.transitions[-1].named_children())[:2]
        self.transitions[-1] = nn.Sequential(OrderedDict(parts))
        strides = _dilate(self.stages, self.transitions, output_stride)
        last = [stage.block[-1] for stage in self.stages]
        widths = [layer.conv1.in_channels + layer.conv2.out_channels for layer in last]
        self.out_strides = tuple(strides[i] for i in indices)
        self.out_channels = tuple(widths[i] for i in indices)
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The levels of ``out_indices``."""
        x = self.stem(x)
        outs = []
        for i, (stage, transition) in enumerate(zip(self.stages, self.transitions)):
            norm, activate, *reduce = transition
            x = activate(norm(stage(x)))
            if i in self.out_indices:
                outs.append(x)
            for layer in reduce:
                x = layer(x)
        return tuple(outs)

    def train(self, mode: bool = True) -> DilatedDenseNet:
        """Sets the mode; frozen stages, and with ``norm_eval`` all norms, stay in eval mode."""
        super().train(mode)
        self._freeze()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        parts = [(self.stem,), *zip(self.stages, self.transitions)]
        for part in parts[: self.frozen_stages + 1]:
            for module in part:
                module.eval().requires_grad_(False)


def _checkpointed(layer: nn.Module, features: list[Tensor]) -> Tensor:
    """The layer's 1x1 half, computed again in the backward pass.

    mmpretrain's own leaves the kind of checkpoint to torch's default, about which torch warns, and
    which does not work with ``torch.autograd.grad``.
    """
    return checkpoint(lambda *x: layer.bottleneck_fn(x), *features, use_reentrant=False)


def _dilate(stages: nn.ModuleList, transitions: nn.ModuleList, output_stride: int) -> list[int]:
    """Drops the pools beyond ``output_stride`` and dilates the blocks behind, in place.

    Returns:
        The stride of each block.
    """
    stride, rate, strides = 4, 1, []
    for stage, transition in zip(stages, transitions):
        strides.append(stride)
        for layer in stage.block:
            layer.conv2.dilation = layer.conv2.padding = (rate, rate)
        if not hasattr(transition, 'pool'):
            continue
        if stride < output_stride:
            stride *= 2
            transition.pool.ceil_mode = True
            # torch leaves what is outside of the map out of the mean anyhow, ONNX only so.
            transition.pool.count_include_pad = False
        else:
            rate *= 2
            transition.pool = nn.Identity()
    return strides
