"""The convolution that class-aware regularization puts in front of a classifier."""

from __future__ import annotations

from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import Conv2d, Conv2dAdaptivePadding
from mmengine.model import xavier_init
from torch import Tensor, nn

#: Convolutions that are what their weight says.
_PLAIN = (nn.Conv2d, Conv2d, Conv2dAdaptivePadding)


class ClassAwareConv(nn.Module):
    """Linear layer whose output is regularized, and the convolution behind it (thesis figure 4.3).

    The linear layer is a 1x1 convolution with bias, without norm and activation. The three losses
    of :class:`~mmseg_fusion.models.losses.ClassAwareRegularization` act on its output. A 1x1
    convolution with norm and activation replaces the head's convolution ("A" of table 4.1). For
    test, :meth:`merge` makes the two a single convolution.

    The linear layer starts as in the authors' code, with Xavier uniform weights and a bias of zero.
    No norm follows it, so its scale determines the losses at the start. PyTorch's default range is
    0.58 times as wide (at 512 to 512 channels), with which all classes seem similarly related. On
    features of 59 well separated classes inter c2c and inter c2p would then start at 0.128 and
    0.375; here they start below 0.001 and 0.01 (``tests/models/layers/test_class_aware_conv.py``).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        channels: cap on the width of the linear layer, which is ``min(in_channels, channels)``.
        linear: whether there is a linear layer. Without it there is no feature to regularize, and
            the module is the plain 1x1 convolution of row "A" in table 4.1.
        kernel_size: of the convolution behind the linear layer. 1 is the method's; 3 is the rows
            without "A" in table 4.1, and cannot be merged.
        dilation: of that convolution where its kernel is larger than 1.
        merged: whether it is built in the merged form, a single convolution.
        conv_cfg, norm_cfg, act_cfg: of the convolution behind the linear layer, as in ConvModule.

    Shape:
        - input: (N, in_channels, H, W), H and W in cells.
        - output: (N, out_channels, H, W).

    Attributes:
        features: the input of the losses, (N, min(in_channels, channels), H, W). A forward pass
            stores it while :attr:`keep_features` is true; :meth:`pop_features` returns it.

    Raises:
        ValueError: a number out of range, or ``merged`` with a kernel larger than 1.
        RuntimeError: on loading a checkpoint of the other form, merged or not.

    Example:
        >>> conv = ClassAwareConv(8, 6, channels=4)
        >>> conv(torch.rand(2, 8, 9, 7)).shape
        torch.Size([2, 6, 9, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int = 512,
        linear: bool = True,
        kernel_size: int = 1,
        dilation: int = 1,
        merged: bool = False,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(f'car.channels must be a positive integer, got {channels!r}')
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'car.kernel_size must be odd and positive, got {kernel_size!r}')
        if merged and kernel_size != 1:
            raise ValueError(_not_mergeable(kernel_size))
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        width = min(in_channels, channels)
        self.linear = None
        if linear and not merged:
            self.linear = nn.Conv2d(in_channels, width, 1)
            xavier_init(self.linear, distribution='uniform')
        self.project = ConvModule(
            width if self.linear is not None else in_channels,
            out_channels,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            conv_cfg=conv_cfg,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
        )
        if merged and self._batch_norm() is None and self.project.conv.bias is None:
            self._add_bias(torch.zeros(out_channels))
        self.keep_features = False
        self.features: Tensor | None = None

    @property
    def merged(self) -> bool:
        """Whether the module is a single, merged convolution."""
        return self.linear is None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, H, W)."""
        if self.linear is not None:
            x = self.linear(x)
            if self.keep_features:
                self.features = x
        return self.project(x)

    def pop_features(self) -> Tensor | None:
        """Returns and drops the stored features: a module that holds a graph cannot be copied."""
        features, self.features = self.features, None
        return features

    @torch.no_grad()
    def merge(self) -> ClassAwareConv:
        """Merges the linear layer and the convolution behind it, in place.

        In eval mode the output stays the same up to rounding. The product is formed in float64. The
        linear layer's bias is merged into the running mean of a batch norm. If there is another
        norm or none, it is merged into the convolution's bias.

        Raises:
            ValueError: the convolution is larger than 1x1, so that the bias would differ at the
                border; it is one that changes its weight when it runs (weight standardization);
                or the linear layer has hooks, which would be lost.
        """
        if self.linear is None:
            return self
        if self.kernel_size != 1:
            raise ValueError(_not_mergeable(self.kernel_size))
        conv = self.project.conv
        if type(conv) not in _PLAIN:
            raise ValueError(
                f'CAR merges plain convolutions; {type(conv).__name__} (conv_cfg of the head) '
                'changes its weight when it runs: deploy this model as it is.'
            )
        if self.linear._forward_pre_hooks or self.linear._forward_hooks:
            raise ValueError(
                "CAR's linear layer has hooks that merging would lose, such as those of "
                "ScaleEqualizerHook(mode='module') during training: merge the saved checkpoint."
            )
        second = conv.weight.double().flatten(1)
        weight = second @ self.linear.weight.double().flatten(1)
        shift = second @ self.linear.bias.double()
        norm = self._batch_norm()
        if norm is not None:
            norm.running_mean.sub_(shift.to(norm.running_mean))
        else:
            self._add_bias(shift if conv.bias is None else shift + conv.bias.double())
        conv.weight = nn.Parameter(weight.to(conv.weight)[:, :, None, None])
        conv.in_channels = self.in_channels
        self.linear = None
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # Both forms have project's keys: a checkpoint of the other one would load half.
        given = f'{prefix}linear.weight' in state_dict
        if f'{prefix}project.conv.weight' in state_dict and given is self.merged:
            hint = (
                'set model.car.merged=False for it (and linear=True), or merge it with '
                'tools/model_converters/merge_car.py'
                if given
                else 'set model.car.merged=True for a merged checkpoint'
            )
            raise RuntimeError(
                f"{prefix[:-1]}: the checkpoint {'has' if given else 'lacks'} CAR's linear layer, "
                f'the model {"lacks" if given else "has"} it: {hint}'
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _batch_norm(self) -> nn.Module | None:
        """The batch norm whose running mean can take over a bias."""
        norm = self.project.norm if self.project.with_norm else None
        return norm if getattr(norm, 'running_mean', None) is not None else None

    def _add_bias(self, bias: Tensor) -> None:
        self.project.conv.bias = nn.Parameter(bias.to(self.project.conv.weight))
        self.project.with_bias = True

    def extra_repr(self) -> str:
        return 'merged' if self.merged else ''


def _not_mergeable(kernel_size: int) -> str:
    return (
        f'CAR can be merged where its convolution is 1x1; car.kernel_size is {kernel_size} here. '
        'The linear bias in front of a larger kernel is missing at the border of the image, which '
        'one convolution cannot repeat: deploy this model as it is.'
    )
