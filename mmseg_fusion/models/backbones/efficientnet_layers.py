"""The common base of this package's EfficientNets: layers of mmpretrain as a backbone."""

from __future__ import annotations

from collections.abc import Sequence

from mmcv.cnn import ConvModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .pretrained_stem import PretrainedStem


def set_in_channels(net: nn.Module, in_channels: int) -> None:
    """Replaces the RGB stem of a network of mmpretrain by one for other images, in place."""
    old = net.layers[0]
    if in_channels == old.in_channels:
        return
    net.layers[0] = ConvModule(
        in_channels,
        old.out_channels,
        old.kernel_size,
        stride=old.stride,
        padding=old.kernel_size[0] // 2,
        conv_cfg=net.conv_cfg,
        norm_cfg=net.norm_cfg,
        act_cfg=net.act_cfg,
    )


class EfficientNetLayers(PretrainedStem):
    """A chain of layers, some of whose outputs are levels.

    Args:
        layers: stem, groups of blocks, last convolution.
        out_indices: numbers of the returned layers, in ascending order; layers behind the last are
            left out.
        frozen_stages: how many layers are frozen, counted from the stem.
        norm_eval: norm layers use their running statistics in training, too.
        init_cfg: initial weights.

    Attributes:
        out_channels: channels of each returned level.
        out_strides: stride of each returned level.

    Raises:
        ValueError: an index or number of stages is out of range; the message names the class.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        out_indices: Sequence[int],
        frozen_stages: int,
        norm_eval: bool,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        super().__init__(init_cfg)
        name, indices = type(self).__name__, tuple(out_indices)
        if not indices or list(indices) != sorted(set(indices) & set(range(len(layers)))):
            raise ValueError(
                f'{name}: out_indices are rising numbers of layers, 0 to {len(layers) - 1}, e.g. '
                f'(2, 3, 4, 5), but got {out_indices!r}; change model.backbone.out_indices'
            )
        if frozen_stages not in range(indices[-1] + 2):
            raise ValueError(
                f'{name}: frozen_stages is a number of layers, 0 to {indices[-1] + 1} with '
                f'out_indices={indices}, but got {frozen_stages!r}; change '
                'model.backbone.frozen_stages'
            )
        self.out_indices = indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.layers = layers[: indices[-1] + 1]
        convs = [[m for m in layer.modules() if isinstance(m, nn.Conv2d)] for layer in self.layers]
        stride, strides = 1, []
        for layer in convs:
            for conv in layer:
                stride *= conv.stride[0]
            strides.append(stride)
        self.out_strides = tuple(strides[i] for i in indices)
        self.out_channels = tuple(convs[i][-1].out_channels for i in indices)
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The layers' features, those of ``out_indices``."""
        outs = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def train(self, mode: bool = True) -> EfficientNetLayers:
        """Sets the mode; frozen layers, and with ``norm_eval`` all norms, stay in eval mode."""
        super().train(mode)
        self._freeze()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        for layer in self.layers[: self.frozen_stages]:
            layer.eval().requires_grad_(False)
