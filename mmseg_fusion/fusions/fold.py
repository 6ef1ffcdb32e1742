"""Scale equalizer of multi-level feature fusion.

Kim and Kim, "Scale Equalization for Multi-Level Feature Fusion", arXiv 2402.01149, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

_NO_MEANS = (
    'a transposed convolution answers a constant input with different values in different cells, '
    'so no bias can take the means: pass bias=False'
)


def _per_channel(value: float | Sequence[float] | Tensor, name: str) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float32).detach().clone()
    if value.dim() > 1:
        raise ValueError(
            f'{name} must be one number or one number per channel, got shape {tuple(value.shape)}'
        )
    return value


class ScaleEqualizer(nn.Module):
    """Global normalization of a feature, ``(x - mean) / std`` (section 3.2 of the paper).

    Mean and standard deviation are constants that are measured once over the training set. They are
    buffers and get no gradient. The paper uses one scalar per branch, placed after the branch's
    upsampling and before the concatenation.

    Args:
        mean: global mean, a number or one per channel, in the units of the feature.
        std: global standard deviation, a positive number or one per channel.
        persistent: whether the constants are part of the state dict.

    Shape:
        Input and output (N, C, ...); ``mean`` and ``std`` are scalars or (C,).

    Raises:
        ValueError: ``std`` is not positive, a value is not finite, or a shape is wrong.

    Example:
        >>> x = torch.tensor([[[[1.0, 3.0]]]])
        >>> ScaleEqualizer(mean=2.0, std=0.5)(x)
        tensor([[[[-2.,  2.]]]])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: float | Sequence[float] | Tensor,
        std: float | Sequence[float] | Tensor,
        persistent: bool = True,
    ) -> None:
        super().__init__()
        mean, std = _per_channel(mean, 'mean'), _per_channel(std, 'std')
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise ValueError(f'mean and std must be finite, got mean={mean} and std={std}')
        if not (std > 0).all():
            raise ValueError(f'std must be positive, got {std}; a constant branch has no scale')
        self.register_buffer('mean', mean, persistent=persistent)
        self.register_buffer('std', std, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        """Equalizes ``x`` (N, C, ...)."""
        shape = (-1,) + (1,) * (x.dim() - 2)
        for name, value in (('mean', self.mean), ('std', self.std)):
            if value.dim() == 1 and value.numel() not in (1, x.shape[1]):
                raise ValueError(
                    f'{name} has {value.numel()} channels, the feature {x.shape[1]} '
                    f'(shape {tuple(x.shape)})'
                )
        # The constants follow the feature's type, so that AMP's half precision stays half.
        return (x - self.mean.to(x.dtype).view(shape)) / self.std.to(x.dtype).view(shape)

    def extra_repr(self) -> str:
        if self.std.numel() == 1:
            return f'mean={self.mean.item():.4g}, std={self.std.item():.4g}'
        return f'channels={self.std.numel()}'


def expand_branches(values: Sequence[float], channels: Sequence[int]) -> Tensor:
    """Expands one value per branch to one per channel: (B,), (B,) -> (sum(channels),), float64."""
    if len(values) != len(channels):
        raise ValueError(f'{len(values)} values for {len(channels)} branches {tuple(channels)}')
    return torch.repeat_interleave(
        torch.as_tensor(values, dtype=torch.float64), torch.as_tensor(channels)
    )


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer is a transposed convolution, whose weight has its inputs first."""
    return isinstance(layer, _ConvTransposeNd)


def broadcast_to_weight(
    per_channel: Tensor, weight: Tensor, groups: int = 1, transposed: bool = False
) -> Tensor:
    """Spreads one value per input channel over the weight of a convolution or linear layer.

    Args:
        per_channel: (C_in,).
        weight: (C_out, C_in / groups, ...) as torch lays it out; of a transposed convolution
            (C_in, C_out / groups, ...).
        groups: groups of the convolution.
        transposed: whether the convolution is a transposed one.

    Returns:
        Values in the shape of ``weight``: entry (o, j, ...) belongs to the input channel
        that output o reads as its j-th.
    """
    if transposed:
        if per_channel.numel() != weight.shape[0]:
            raise ValueError(
                f'{per_channel.numel()} channels in the branches, but the layer takes '
                f'{weight.shape[0]} (transposed, weight {tuple(weight.shape)})'
            )
        return per_channel.view(-1, *([1] * (weight.dim() - 1))).expand_as(weight)
    out, per_group = weight.shape[:2]
    if per_channel.numel() != per_group * groups:
        raise ValueError(
            f'{per_channel.numel()} channels in the branches, but the layer takes '
            f'{per_group * groups} (weight {tuple(weight.shape)}, groups={groups})'
        )
    spread = per_channel.view(groups, 1, per_group).expand(groups, out // groups, per_group)
    return spread.reshape(out, per_group, *([1] * (weight.dim() - 2))).expand_as(weight)


def bias_shift(weight: Tensor, offset: Tensor, groups: int = 1) -> Tensor:
    """``sum_i w_i offset_i`` of equation 9, per output channel: the output for a constant input.

    Args:
        weight: (C_out, C_in / groups, ...).
        offset: (C_in,), one value per input channel.
        groups: groups of the convolution.

    Returns:
        (C_out,) in the weight's type.
    """
    spread = broadcast_to_weight(offset.to(weight), weight, groups)
    return (weight * spread).flatten(1).sum(1)


def fold_tensors(
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    mu: Tensor | None = None,
    groups: int = 1,
    inverse: bool = False,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Equation 9 on plain tensors: the weight and bias that make the equalizers unnecessary.

    Args:
        weight: (C_out, C_in / groups, ...); of a transposed convolution (C_in, C_out / groups,
            ...).
        bias: (C_out,) or None.
        sigma: (C_in,) standard deviation of each input channel's branch.
        mu: (C_in,) its mean, or None to leave the bias as it is.
        groups: groups of the convolution.
        inverse: reverses the operation: from folded tensors to those behind explicit equalizers.
        transposed: whether the convolution is a transposed one; it cannot take ``mu``.

    Returns:
        New tensors of the same types; the arithmetic is float64.

    Raises:
        ValueError: ``mu`` is given for a transposed convolution.
    """
    if transposed and mu is not None:
        raise ValueError(_NO_MEANS)
    sigma = sigma.double().cpu()
    old = weight.detach().cpu().double()
    spread = broadcast_to_weight(sigma, old, groups, transposed)
    new = old * spread if inverse else old / spread
    if mu is not None and bias is not None:
        # The weight behind the explicit equalizers is the one that sees mu / sigma.
        shift = bias_shift(new if inverse else old, mu.double().cpu() / sigma, groups).to(bias)
        bias = bias.detach() + shift if inverse else bias.detach() - shift
    return new.to(weight), bias


@torch.no_grad()
def fold_scale_equalizer(
    conv: nn.Module,
    channels: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    bias: bool = True,
) -> None:
    """Folds the equalizers of all branches into the fusion layer, in place (equation 9).

    ``w_i <- w_i / std_i`` and, with ``bias``, ``b <- b - sum_i w_i mean_i / std_i``. The result
    equals ``conv(cat((x_i - mean_i) / std_i))`` for a layer without padding. A zero-padded layer
    differs at the border: there the folded form pads the raw feature with 0, and the explicit form
    pads the equalized feature (section 3.2 does not say which is meant).

    Args:
        conv: convolution (any dimension, grouped, depthwise or not, transposed or not) or linear
            layer that takes the concatenation.
        channels: channels of each branch, in the order of the concatenation; their sum is the
            layer's input channels.
        mean: mean of each branch.
        std: standard deviation of each branch, positive; 1 leaves a branch as it is.
        bias: whether the means go into the layer's bias. Not needed if batch norm follows.

    Raises:
        ValueError: shapes disagree, a std is not positive, a value is not finite, or ``bias`` is
            set for a layer that has none, or for a transposed convolution.
    """
    sigma, mu = expand_branches(std, channels), expand_branches(mean, channels)
    if not (torch.isfinite(sigma).all() and torch.isfinite(mu).all() and (sigma > 0).all()):
        raise ValueError(f'std must be positive and all values finite, got {mean=} {std=}')
    if bias and is_transposed(conv):
        raise ValueError(_NO_MEANS)
    if bias and conv.bias is None:
        raise ValueError('the fusion layer has no bias to take the means: pass bias=False')
    weight, shifted = fold_tensors(
        conv.weight,
        conv.bias,
        sigma,
        mu if bias else None,
        getattr(conv, 'groups', 1),
        transposed=is_transposed(conv),
    )
    conv.weight.copy_(weight)
    if bias:
        conv.bias.copy_(shifted)


def _equalize_input(layer: nn.Module, inputs: tuple) -> tuple:
    x, *rest = inputs
    equalizer = layer.scale_equalizer
    if layer.weight.dim() > 2:
        return (equalizer(x), *rest)
    # A linear layer has its channels last.
    return (equalizer(x.movedim(-1, 1)).movedim(1, -1), *rest)


def _shift_output(layer: nn.Module, inputs: tuple, output: Tensor | list) -> Tensor | list:
    if isinstance(output, list):
        # A kernel-sharing layer gives a map per rate, each with the bias.
        return [_shift_output(layer, inputs, part) for part in output]
    # The means as they act behind the layer: so the raw feature is padded with 0, as in the
    # folded layer, and a saved checkpoint gives the same logits up to the border.
    offset = layer.scale_equalizer_offset
    shift = bias_shift(layer.weight, offset, getattr(layer, 'groups', 1)).to(output.dtype)
    if layer.weight.dim() > 2:
        shift = shift.view(-1, *([1] * (output.dim() - 2)))
    return output - shift


def constants(entry: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Divisor and offset (None if there is no bias for it) per input channel of a planned layer.

    Args:
        entry: the result of :func:`~mmseg_fusion.fusions.plan_equalization`.

    Returns:
        Two tensors (C_in,), float64.
    """
    sigma = expand_branches(entry['divisor'], entry['channels'])
    return sigma, expand_branches(entry['offset'], entry['channels']) if entry['bias'] else None


def install_equalizer(layer: nn.Module, sigma: Tensor, mu: Tensor | None) -> None:
    """Puts the explicit equalizers of all branches before a fusion layer, as constants.

    The division acts on the layer's input; the means are subtracted behind the layer. This is equal
    to zero-padding the raw feature.

    Args:
        layer: convolution or linear layer.
        sigma: (C_in,) standard deviation of each input channel's branch.
        mu: (C_in,) its mean, or None to keep the means.
    """
    device = layer.weight.device
    layer.scale_equalizer = ScaleEqualizer(0.0, sigma, persistent=False).to(device)
    layer.register_forward_pre_hook(_equalize_input)
    if mu is not None:
        offset = (mu.double() / sigma.double()).float().to(device)
        layer.register_buffer('scale_equalizer_offset', offset, persistent=False)
        layer.register_forward_hook(_shift_output)


def fold_plan(plan: dict[str, Any], layer: nn.Module) -> None:
    """Folds the constants of a planned layer into ``layer``, in place."""
    fold_scale_equalizer(
        layer, plan['channels'], plan['offset'], plan['divisor'], bias=plan['bias']
    )
