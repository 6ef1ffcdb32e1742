"""Kernel-sharing atrous convolution (KSAC): one 3x3 kernel at several dilation rates.

Ye Huang's thesis (University of Technology Sydney, 2022), chapter 2; "See More Than Once:
Kernel-Sharing Atrous Convolution for Semantic Segmentation", arXiv 1908.09443.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from numbers import Integral
from typing import Any, Literal

import torch
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

Implementation = Literal['auto', 'shared_taps', 'dilated']

#: What ``implementation`` may be.
IMPLEMENTATIONS = ('auto', 'shared_taps', 'dilated')

#: Norm and activation of the pyramid by default.
BATCH_NORM = dict(type='BN', requires_grad=True)
RELU = dict(type='ReLU')

#: Input channels times further rates from which on the nine products are taken on a CPU. A training
#: step, 256 output channels, 33 x 33, rates 6, 12, 18, takes with the nine products 0.88 (128 input
#: channels, 256 here), 0.46 (256, 512 here) and 0.36 (2048) of the time of a convolution per rate:
#: torch 2.13.0, one thread of an AMD EPYC with AVX-512, medians of 7 turns, ``benchmark_ksac.py
#: --no-memory --threads 1 --rates 6 12 18 --repeat 7 --case 128 33 --case 256 33 --case 2048 33``.
SHARED_TAPS_FROM = 512

#: What the nine products may take at a time on a CPU, in bytes of float32. A training step of four
#: maps, 256 input and output channels, 33 x 33, rates 6, 12, 18, takes with 4 MiB 1.09, with 64 MiB
#: 1.48 and without a limit 1.45 of the time with 16 MiB: torch 2.13.0, one thread of an AMD EPYC
#: with AVX-512, CPU time, medians of 5 turns. ``benchmark_ksac.py --case 256 33 --batch-size 4
#: --rates 6 12 18 --threads 1 --no-memory`` times such steps.
PORTION_BYTES = 16 * 2**20

#: Whether this torch has oneDNN at all.
ONEDNN = torch.backends.mkldnn.is_available()


def dilated_convolutions(
    x: Tensor, weight: Tensor, dilations: Sequence[int], bias: Tensor | None = None
) -> list[Tensor]:
    """One dilated convolution per rate, all with the same kernel: algorithm 1 as written.

    Args:
        x: (N, C_in, H, W).
        weight: (C_out, C_in, 3, 3).
        dilations: rates, in pixels of ``x``.
        bias: (C_out,) or None, the same for all rates.

    Returns:
        (N, C_out, H, W) per rate.
    """
    return [F.conv2d(x, weight, bias, padding=rate, dilation=rate) for rate in dilations]


def shared_tap_convolutions(
    x: Tensor, weight: Tensor, dilations: Sequence[int], bias: Tensor | None = None
) -> list[Tensor]:
    """The same maps as :func:`dilated_convolutions` for the multiply-adds of one convolution.

    Each of the nine taps of the kernel is a 1x1 convolution that does not depend on the rate. The
    nine products are computed once, and every rate is a sum of the nine products, shifted, with
    zeros outside of the map. This is an identity; the results differ only by rounding. Under
    autocast the products are in half precision; their sums are computed in float32 and rounded
    once.

    Args:
        x: (N, C_in, H, W).
        weight: (C_out, C_in, 3, 3).
        dilations: rates, in pixels of ``x``.
        bias: (C_out,) or None, the same for all rates.

    Returns:
        (N, C_out, H, W) per rate.
    """
    samples, channels = _portion(x, weight.shape[0])
    kernels = [
        part.permute(2, 3, 0, 1).reshape(9 * part.shape[0], -1, 1, 1)
        for part in weight.split(channels)
    ]
    # A 1x1 kernel has nothing to dilate. But torch takes oneDNN for a 1x1 convolution only with
    # several threads or if it is dilated, and MKL's product, which it takes else, is slower on a
    # CPU with AVX-512 that is not Intel's: oneDNN takes 0.69 of its time for 2048 to 9 x 256
    # channels, 33 x 33 (torch 2.13.0, one thread of an AMD EPYC, CPU time, median of 7 turns).
    onednn = ONEDNN and x.device.type == 'cpu' and x.dtype == torch.float32
    rows = []
    for part in x.split(samples):
        sums = []
        for taps in kernels:
            products = F.conv2d(part, taps, dilation=2 if onednn else 1)
            sums.append(_ShiftedSums.apply(products.unflatten(1, (9, -1)), tuple(dilations)))
        rows.append([_joined(of_rate, 1) for of_rate in zip(*sums)])
    maps = [_joined(of_rate, 0) for of_rate in zip(*rows)]
    return maps if bias is None else [m + bias.to(m.dtype).view(-1, 1, 1) for m in maps]


def _portion(x: Tensor, channels: int) -> tuple[int, int]:
    """How many samples and output channels to take at a time.

    On a CPU the nine products are best made in portions that stay in its caches, and that the
    allocator keeps for the next one: a larger block is fetched from the system each time, zeroed
    page by page. A GPU wants all work at once.
    """
    samples, _, height, width = x.shape
    if x.device.type != 'cpu':
        return max(1, samples), channels
    of_channel = 9 * 4 * height * width
    fitting = max(1, PORTION_BYTES // of_channel)
    if fitting < channels:
        # Portions of about one size, not a small one at the end.
        return 1, ceil(channels / ceil(channels / fitting))
    return max(1, min(samples, fitting // channels)), channels


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _overlap(size: int, shift: int) -> tuple[slice, slice]:
    """Where ``out[i]`` and ``source[i + shift]`` both exist: the slices of out and of source."""
    return slice(max(0, -shift), size - max(0, shift)), slice(max(0, shift), size + min(0, shift))


def _windows(rate: int, tap: int, height: int, width: int) -> tuple[Any, Any] | None:
    """What a tap at a rate reads: the index in the output, and in the product; None if nothing."""
    dy, dx = (tap // 3 - 1) * rate, (tap % 3 - 1) * rate
    if abs(dy) >= height or abs(dx) >= width:
        return None
    (out_y, in_y), (out_x, in_x) = _overlap(height, dy), _overlap(width, dx)
    return (..., out_y, out_x), (..., in_y, in_x)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type to sum in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class _ShiftedSums(torch.autograd.Function):
    """Nine products -> per rate, the sum of the nine, each shifted by its tap's offset.

    A function of its own for the backward pass: autograd would run each of the 9 R additions into
    a slice backwards through a full copy of the map, which takes longer than the products where
    there are many pixels, and ``F.fold``, which sums the same way, would hold 9 R maps.
    """

    @staticmethod
    def forward(products: Tensor, dilations: tuple[int, ...]) -> tuple[Tensor, ...]:
        """(N, 9, C, H, W) -> (N, C, H, W) per rate."""
        height, width = products.shape[-2:]
        sums = []
        for rate in dilations:
            total = products[:, 4].to(_wide(products.dtype), copy=True)
            for tap in (0, 1, 2, 3, 5, 6, 7, 8):
                windows = _windows(rate, tap, height, width)
                if windows is not None:
                    out, source = windows
                    total[out].add_(products[:, tap][source])
            sums.append(total.to(products.dtype))
        return tuple(sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Apart from :meth:`forward`, as ``torch.func`` wants it."""
        _, ctx.dilations = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """(N, C, H, W) per rate -> (N, 9, C, H, W)."""
        first = gradients[0]
        n, channels, height, width = first.shape
        last = first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
        result = torch.empty(
            (n, 9 * channels, height, width),
            dtype=first.dtype,
            device=first.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        ).unflatten(1, (9, channels))
        for tap in range(9):
            total = torch.zeros_like(first, dtype=_wide(first.dtype))
            for rate, gradient in zip(ctx.dilations, gradients):
                windows = _windows(rate, tap, height, width)
                if windows is not None:
                    out, source = windows
                    total[source].add_(gradient[out])
            result[:, tap].copy_(total)
        return result, None


def choose_implementation(
    device: str | torch.device, in_channels: int, num_rates: int
) -> Literal['shared_taps', 'dilated']:
    """The rule by which ``implementation='auto'`` chooses.

    The rule comes from measurements on a CPU with AVX-512
    (``tools/analysis_tools/benchmark_ksac.py --rule`` repeats them and reports where the rule is
    wrong). ``shared_taps`` saves the products of all rates except one, in proportion to the input
    channels. It costs the nine maps and their sums, which do not depend on the input channels. Of
    several thresholds, this one is almost never slower than ``dilated``, also in inference, where
    ``dilated`` saves most.

    - CPU: ``shared_taps`` if ``in_channels * (num_rates - 1)`` is :data:`SHARED_TAPS_FROM`, 512,
      or more: from 512 input channels with two rates, 256 with three, 128 with five.
    - ``meta``, where multiply-adds are counted: as on a CPU.
    - CUDA and other devices: ``dilated``. No measurement exists there, so the rule takes the form
      that cannot be slower than ``dilated``. ``shared_taps`` can be set explicitly.

    Args:
        device: of the input.
        in_channels: channels of the input.
        num_rates: number of rates.
    """
    if torch.device(device).type not in ('cpu', 'meta'):
        return 'dilated'
    saved = in_channels * (num_rates - 1)
    return 'shared_taps' if saved >= SHARED_TAPS_FROM else 'dilated'


class _SharedKernel(nn.Conv2d):
    """The kernel of all rates; called like any layer, so that hooks and pruning see it."""

    def forward(
        self, x: Tensor, convolve: Callable[..., list[Tensor]], dilations: Sequence[int]
    ) -> list[Tensor]:
        """(N, in_channels, H, W) -> (N, out_channels, H, W) per rate."""
        return convolve(x, self.weight, dilations, self.bias)


class KernelSharingAtrousConv(BaseModule):
    """Pyramid of dilated convolutions with one 3x3 kernel, summed (thesis section 2.2.2).

    Algorithm 1 applies, for each rate, a convolution with the shared kernel dilated by the rate,
    the rate's own batch norm, and ReLU; it sums the results. There is one kernel for any number of
    rates, and each further rate only adds the parameters of its norm, 2 C.

    Args:
        in_channels: channels of the input.
        channels: channels of the output, C.
        dilations: rates in pixels of the input, any positive integers, in any order; a rate may
            be larger than the map, and may come twice.
        implementation: ``'dilated'``: a convolution per rate. ``'shared_taps'``: the same maps from
            nine products that all rates share (:func:`shared_tap_convolutions`). ``'auto'``: chosen
            by a rule (:func:`choose_implementation`). Weights and results are the same, so the
            attribute may be changed at any time.
        norm_cfg: norm of each rate; None for none, and the kernel then has a bias, which all
            rates share (chosen: the thesis has batch norm only).
        act_cfg: activation behind each norm; None for none.
        init_cfg: initialization; by default that of ``mmcv.cnn.ConvModule``.

    Shape:
        Input (N, in_channels, H, W), output (N, channels, H, W).

    Raises:
        ValueError: ``dilations`` is empty or has another value than positive integers,
            ``implementation`` is unknown, or the input has other channels.

    Example:
        >>> pyramid = KernelSharingAtrousConv(8, 4, dilations=(1, 2, 3))
        >>> pyramid(torch.zeros(2, 8, 9, 7)).shape
        torch.Size([2, 4, 9, 7])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        dilations: Sequence[int] = (6, 12, 18),
        implementation: Implementation = 'auto',
        norm_cfg: dict | None = BATCH_NORM,
        act_cfg: dict | None = RELU,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg or dict(type='Kaiming', layer='Conv2d'))
        # A string is a sequence too, of its characters: none of them is a rate.
        rates = tuple(dilations) if isinstance(dilations, Sequence) else ()
        if not rates or not all(map(_is_rate, rates)):
            raise ValueError(
                'dilations must be a sequence of positive integers such as (6, 12, 18), got '
                f'{dilations!r}'
            )
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f'implementation must be one of {", ".join(map(repr, IMPLEMENTATIONS))}, got '
                f'{implementation!r}'
            )
        self.in_channels = in_channels
        self.channels = channels
        self.dilations = tuple(map(int, rates))
        self.implementation = implementation
        self.conv = _SharedKernel(in_channels, channels, 3, padding=1, bias=norm_cfg is None)
        self.norms = nn.ModuleList(
            nn.Identity() if norm_cfg is None else build_norm_layer(norm_cfg, channels)[1]
            for _ in rates
        )
        self.activate = nn.Identity()
        if act_cfg is not None:
            act_cfg = dict(act_cfg)
            if act_cfg['type'] in ('ReLU', 'LeakyReLU', 'ReLU6'):
                act_cfg.setdefault('inplace', True)
            self.activate = build_activation_layer(act_cfg)

    def convolutions(self, x: Tensor) -> list[Tensor]:
        """The shared convolution at each rate, before norm: (N, channels, H, W) per rate."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'expected a feature (N, {self.in_channels}, H, W), got {tuple(x.shape)}: '
                'in_channels must be the channels of the level that in_index names'
            )
        chosen = self.implementation
        if chosen == 'auto':
            chosen = choose_implementation(x.device, self.in_channels, len(self.dilations))
        convolve = shared_tap_convolutions if chosen == 'shared_taps' else dilated_convolutions
        return self.conv(x, convolve, self.dilations)

    def branches(self, x: Tensor) -> list[Tensor]:
        """The terms of the sum: each rate's map after norm and ReLU, (N, channels, H, W) each."""
        maps = self.convolutions(x)
        return [self.activate(norm(m)) for norm, m in zip(self.norms, maps)]

    def forward(self, x: Tensor) -> Tensor:
        """The pyramid's output, (N, in_channels, H, W) -> (N, channels, H, W)."""
        first, *rest = self.branches(x)
        for branch in rest:
            first = first + branch
        return first

    @contextmanager
    def while_traced(self) -> Iterator[None]:
        """The pyramid as dilated convolutions, for :class:`mmseg_fusion.fusions.FusionTracer`.

        The maps are the same. Each of these convolutions takes the pyramid's input as it is; the
        nine products take parts of it.
        """
        before, self.implementation = self.implementation, 'dilated'
        try:
            yield
        finally:
            self.implementation = before

    def extra_repr(self) -> str:
        return f'dilations={self.dilations}, implementation={self.implementation!r}'


def _is_rate(rate: Any) -> bool:
    return isinstance(rate, Integral) and not isinstance(rate, bool) and rate > 0
