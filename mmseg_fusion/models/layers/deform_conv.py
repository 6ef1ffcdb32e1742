"""Modulated deformable convolution (DCNv2) without a compiled op of mmcv."""

from __future__ import annotations

import math
from typing import Any, Literal, Union, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from .precision import without_autocast

Implementation = Literal['auto', 'torchvision', 'pytorch']
#: One number for both sides, or (vertical, horizontal).
Pair = Union[int, tuple[int, int]]


def _devices_with_a_kernel() -> frozenset[str]:
    """Types of devices that torchvision's compiled operator runs on."""
    name = 'torchvision::deform_conv2d'
    # A schema alone proves nothing: mmseg_fusion.compat declares it where the binary of torchvision
    # cannot be loaded, and one that was built for another device lacks this one's kernel.
    if not hasattr(torch.ops.torchvision, 'deform_conv2d'):
        return frozenset()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(kind for kind in ('cpu', 'cuda') if has_kernel(name, kind.upper()))


#: Where ``implementation='auto'`` takes torchvision's operator. Settled when this is imported:
#: :func:`mmseg_fusion.compat.apply` has loaded the binary by then, if that is possible.
COMPILED = _devices_with_a_kernel()


def modulated_deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    implementation: Implementation = 'auto',
) -> Tensor:
    r"""Modulated deformable convolution ("Deformable ConvNets v2", arXiv 1811.11168, equation 1).

    .. math:: y(p) = \sum_k w_k \, x(p + p_k + \Delta p_k(p)) \, m_k(p)

    :math:`x` is sampled bilinearly and is 0 outside of the map. A position less than a cell outside
    of the border thus sees a part of the border cell, and a position farther outside sees 0. At an
    integer position the left and the right derivative differ; the right one is used, as in
    torchvision. Zero offsets start at such positions.

    The arithmetic is float32 (float64 for float64), also under autocast and for half-precision
    tensors: bfloat16 cannot tell column 256 from 257. The result has the type of ``x``.

    Args:
        x: feature map.
        offset: displacements in cells of ``x``, vertical before horizontal.
        mask: factor of every sample, usually the result of a sigmoid; None for 1 (DCNv1).
        weight: of the convolution. C_in / weight.shape[1] is its number of groups.
        bias: of the convolution.
        stride, padding, dilation: as in :func:`torch.nn.functional.conv2d`.
        implementation: ``'torchvision'`` is the compiled operator of torchvision. ``'pytorch'`` is
            the same function from PyTorch's operators; it is differentiable twice, and does not
            store the samples for the backward pass. ``'auto'`` takes torchvision's operator if it
            runs on the device (:data:`COMPILED`).

    Shape:
        - x: (N, C_in, H, W), N may be 0.
        - offset: (N, 2 G kh kw, H_out, W_out), for G deformable groups of C_in / G neighbouring
          channels each: group by group, in a group tap by tap, per tap (y, x).
        - mask: (N, G kh kw, H_out, W_out).
        - weight: (C_out, C_in / groups, kh, kw).
        - bias: (C_out,).
        - output: (N, C_out, H_out, W_out).

    Raises:
        ValueError: shapes that do not fit, or an unknown ``implementation``.
        ImportError: ``implementation='torchvision'`` where its operator has no kernel.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(_unknown(implementation))
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    _check_shapes(x, offset, mask, weight, stride, padding, dilation)
    compiled = bool(COMPILED) if x.is_meta else x.device.type in COMPILED
    if implementation == 'torchvision' and not compiled:
        raise ImportError(
            f"deformable convolution: implementation='torchvision' needs its compiled operator for "
            f'{x.device.type} tensors, found one for {sorted(COMPILED) or "no device"}; install '
            f'the torchvision that was built for torch {torch.__version__}, or set '
            "implementation='pytorch' or 'auto'"
        )
    with without_autocast(x.device.type):
        wide = torch.promote_types(x.dtype, torch.float32)
        args = [t if t is None else t.to(wide) for t in (x, offset, mask, weight, bias)]
        if compiled and implementation != 'pytorch':
            result = _torchvision(*args, stride, padding, dilation)
        else:
            result = _pytorch(*args, stride, padding, dilation)
    return result.to(x.dtype)


def _unknown(implementation: object) -> str:
    return (
        f'deformable convolution: implementation must be one of {get_args(Implementation)}, got '
        f'{implementation!r}'
    )


def _check_shapes(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    out, per_group, kernel = weight.shape[0], weight.shape[1], tuple(weight.shape[2:])
    channels = x.shape[1]
    groups = channels // per_group
    if channels != groups * per_group or groups < 1 or out % groups:
        raise ValueError(
            f'deformable convolution: a weight of shape {tuple(weight.shape)} does not fit '
            f'{channels} channels: expected (out_channels, {channels} / groups, kh, kw) with '
            'out_channels divisible by groups'
        )
    taps = kernel[0] * kernel[1]
    deformable = offset.shape[1] // (2 * taps)
    if deformable < 1 or offset.shape[1] != 2 * taps * deformable or channels % deformable:
        raise ValueError(
            f'deformable convolution: offset has {offset.shape[1]} channels: expected 2 * '
            f'deformable_groups * {taps} for a kernel of {kernel[0]} x {kernel[1]}, with '
            f'deformable_groups a divisor of the {channels} channels of the feature map'
        )
    size = tuple(
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation)
    )
    if min(size) < 1:
        raise ValueError(
            f'deformable convolution: a map of {tuple(x.shape[2:])} is smaller than the kernel '
            f'{kernel} at dilation {dilation} and padding {padding}'
        )
    for name, given, wanted in (
        ('offset', offset, 2 * taps * deformable),
        ('mask', mask, taps * deformable),
    ):
        if given is not None and tuple(given.shape) != (x.shape[0], wanted, *size):
            raise ValueError(
                f'deformable convolution: expected {name} of shape '
                f'{(x.shape[0], wanted, *size)}, got {tuple(given.shape)}'
            )


def _torchvision(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    from torchvision.ops import deform_conv2d

    return deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)


def _pytorch(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    if mask is None:
        mask = offset.new_ones(()).expand(x.shape[0], offset.shape[1] // 2, *offset.shape[2:])
    # Exporters see through operators, not through an autograd function.
    convolve = _DeformedConv.apply if torch.is_grad_enabled() else _DeformedConv.forward
    result = convolve(x, offset, mask, weight, stride, padding, dilation)
    return result if bias is None else result + bias.view(-1, 1, 1)


class _DeformedConv(torch.autograd.Function):
    """Row by row of the kernel: read the samples, multiply them by its weights, add up.

    A function of its own for the backward pass: autograd would keep four corners of every sample,
    36 feature maps for a 3x3 kernel. Here they are read again. The backward pass is made of
    differentiable operators, so that it can be differentiated as well.
    """

    @staticmethod
    def forward(
        x: Tensor,
        offset: Tensor,
        mask: Tensor,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H_out, W_out)."""
        cells, kernels = _cells(x, offset, weight), _kernels(x, weight)
        result = None
        for row, kernel in enumerate(kernels):
            index, value, *_ = _corners(row, x, offset, weight, stride, padding, dilation)
            value = value * _of_row(mask, row, weight, 1).view(-1)
            columns = cells.new_zeros(index.shape[1], cells.shape[1])
            for i in range(4):
                columns.addcmul_(cells.index_select(0, index[i]), value[i, :, None])
            product = kernel @ _to_product(columns, x, offset, weight).transpose(2, 3)
            result = product if result is None else result.add_(product)
        return result.view(x.shape[0], weight.shape[0], *offset.shape[2:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Apart from :meth:`forward`, as ``torch.func`` wants it."""
        x, offset, mask, weight, *ctx.geometry = inputs
        ctx.save_for_backward(x, offset, mask, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """(N, C_out, H_out, W_out) -> the gradients of x, offset, mask and weight."""
        with without_autocast(gradient.device.type):
            gradients = _gradients(gradient, *ctx.saved_tensors, *ctx.geometry)
        return (*gradients, None, None, None)


def _gradients(
    gradient: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x, offset, mask and weight, each of that one's shape."""
    cells, kernels = _cells(x, offset, weight), _kernels(x, weight)
    gradient = gradient.flatten(2).unflatten(1, kernels.shape[1:3])
    of_cells = torch.zeros_like(cells)
    of_offset, of_mask, of_kernels = [], [], []
    for row, kernel in enumerate(kernels):
        index, value, slope_y, slope_x = _corners(row, x, offset, weight, stride, padding, dilation)
        factor = _of_row(mask, row, weight, 1)
        modulated = value * factor.view(-1)
        of_columns = _from_product(gradient.transpose(2, 3) @ kernel, cells, weight)
        columns, of_value = torch.zeros_like(of_columns), []
        for i in range(4):
            read = cells.index_select(0, index[i])
            of_value.append((read * of_columns).sum(1))
            columns.addcmul_(read, modulated[i, :, None])
            of_cells.index_add_(0, index[i], of_columns * modulated[i, :, None])
        of_value = torch.stack(of_value)
        of_position = torch.stack([(slope * of_value).sum(0) for slope in (slope_y, slope_x)])
        of_offset.append(of_position.view(2, *factor.shape[1:]) * factor)
        of_mask.append((value * of_value).sum(0).view_as(factor))
        of_kernels.append((gradient @ _to_product(columns, x, offset, weight)).sum(0))
    of_weight = torch.stack(of_kernels).unflatten(3, (weight.shape[3], weight.shape[1]))
    return (
        of_cells.view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2),
        _of_all_rows(of_offset, offset),
        _of_all_rows(of_mask, mask),
        of_weight.permute(1, 2, 4, 0, 3).reshape(weight.shape),
    )


# --- layouts --------------------------------------------------------------------------------------


def _cells(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """(N H W G, C_in / G): what one sample reads lies side by side."""
    deformable_groups = offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1] // deformable_groups)


def _kernels(x: Tensor, weight: Tensor) -> Tensor:
    """(kh, groups, C_out / groups, kw C_in / groups): one 1x1 convolution per row."""
    groups = x.shape[1] // weight.shape[1]
    return weight.unflatten(0, (groups, -1)).permute(3, 0, 1, 4, 2).flatten(3)


def _to_product(columns: Tensor, x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """(N H_out W_out kw G, C_in / G) -> (N, groups, H_out W_out, kw C_in / groups)."""
    pixels, groups = offset.shape[2] * offset.shape[3], x.shape[1] // weight.shape[1]
    columns = columns.view(x.shape[0], pixels, weight.shape[3], groups, weight.shape[1])
    return columns.permute(0, 3, 1, 2, 4).flatten(3)


def _from_product(columns: Tensor, cells: Tensor, weight: Tensor) -> Tensor:
    """The way back."""
    columns = columns.unflatten(3, (weight.shape[3], weight.shape[1]))
    return columns.permute(0, 2, 3, 1, 4).reshape(-1, cells.shape[1])


def _of_row(values: Tensor, row: int, weight: Tensor, kinds: int) -> Tensor:
    """(N, G kh kw kinds, H_out, W_out) -> (kinds, N, H_out W_out, kw, G)."""
    values = values.flatten(2).unflatten(1, (-1, *weight.shape[2:], kinds))
    return values[:, :, row].permute(3, 0, 4, 2, 1).contiguous()


def _of_all_rows(values: list[Tensor], like: Tensor) -> Tensor:
    """The way back: per row (kinds, N, H_out W_out, kw, G) -> (N, G kh kw kinds, H_out, W_out)."""
    return torch.stack(values).permute(2, 5, 0, 4, 1, 3).reshape(like.shape)


# --- bilinear reading -----------------------------------------------------------------------------


def _corners(
    row: int,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four cells around every sample of a row of the kernel.

    Returns:
        The indices of the four in :func:`_cells`, their weights, and the derivatives of those by
        the vertical and the horizontal position, (4, N H_out W_out kw G) each; 0 outside.
    """
    displacement = _of_row(offset, row, weight, 2)
    _, batch, pixels, taps, groups = displacement.shape
    height, width = x.shape[2:]

    def whole(count: int) -> Tensor:
        return torch.arange(count, dtype=offset.dtype, device=offset.device)

    y = whole(offset.shape[2]) * stride[0] + (row * dilation[0] - padding[0])
    x = whole(offset.shape[3])[:, None] * stride[1] + (whole(taps) * dilation[1] - padding[1])
    # (H_out W_out, 1 or kw, 1)
    y = y[:, None].expand(-1, offset.shape[3]).reshape(pixels, 1, 1)
    x = x.expand(offset.shape[2], -1, -1).reshape(pixels, taps, 1)
    cell_y, value_y, slope_y = _neighbours(y + displacement[0], height)
    cell_x, value_x, slope_x = _neighbours(x + displacement[1], width)
    image = torch.arange(batch, device=offset.device).view(-1, 1, 1, 1) * height
    group = torch.arange(groups, device=offset.device)
    index = ((image + cell_y)[:, None] * width + cell_x) * groups + group
    return tuple(
        t.view(4, t.numel() // 4)
        for t in (
            index,
            value_y[:, None] * value_x,
            slope_y[:, None] * value_x,
            value_y[:, None] * slope_x,
        )
    )


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The cell below and the cell above, the weight of each and its slope: (2, ...) each."""
    # Far away is as good as just outside, and fits an integer.
    position = position.clamp(-2, size)
    below = position.floor()
    share = position - below
    cell = torch.stack((below, below + 1))
    inside = ((cell >= 0) & (cell < size)).to(position.dtype)
    slope = torch.stack((-inside[0], inside[1]))
    return (
        cell.long().clamp(0, size - 1),
        torch.stack((1 - share, share)) * inside,
        slope,
    )


class ModulatedDeformConv2d(nn.Module):
    """Modulated deformable convolution (DCNv2) whose offsets and mask come from outside.

    Args:
        in_channels: of the feature map.
        out_channels: of the result.
        kernel_size, stride, padding, dilation, groups: as in :class:`torch.nn.Conv2d`.
        deformable_groups: number of groups of channels with separate offsets.
        bias: learn a bias.
        implementation: see :func:`modulated_deform_conv2d`.

    Shape:
        As in :func:`modulated_deform_conv2d`.

    Raises:
        ValueError: channels that ``groups`` or ``deformable_groups`` do not divide, or an unknown
            ``implementation``.

    The weights start as those of DCNv2: uniform in 1 / sqrt(fan in), the bias at 0.

    Example:
        >>> conv = ModulatedDeformConv2d(8, 6, 3, padding=1)
        >>> offset, mask = torch.zeros(2, 18, 9, 7), torch.ones(2, 9, 9, 7)
        >>> conv(torch.rand(2, 8, 9, 7), offset, mask).shape
        torch.Size([2, 6, 9, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = True,
        implementation: Implementation = 'auto',
    ) -> None:
        super().__init__()
        if implementation not in get_args(Implementation):
            raise ValueError(_unknown(implementation))
        for name, value, divided in (
            ('groups', groups, dict(in_channels=in_channels, out_channels=out_channels)),
            ('deformable_groups', deformable_groups, dict(in_channels=in_channels)),
        ):
            if value < 1 or any(channels % value for channels in divided.values()):
                raise ValueError(
                    f'deformable convolution: {name} must be a divisor of '
                    f'{" and ".join(f"{k}={v}" for k, v in divided.items())}, got {value}'
                )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.stride = _pair(stride)
        self.padding = _pair(padding)
        self.dilation = _pair(dilation)
        self.groups = groups
        self.deformable_groups = deformable_groups
        self.implementation = implementation
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial weights."""
        # Of variance 1 / (3 fan_in).
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """The convolution of ``x`` at ``offset``, each sample times ``mask``."""
        return modulated_deform_conv2d(
            x,
            offset,
            mask,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.implementation,
        )

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, '
            f'stride={self.stride}, padding={self.padding}, dilation={self.dilation}, '
            f'groups={self.groups}, deformable_groups={self.deformable_groups}, '
            f'bias={self.bias is not None}, implementation={self.implementation!r}'
        )
