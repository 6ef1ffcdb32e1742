"""The effect of bilinear upsampling on the variance of a feature (Kim & Kim, TMLR 2024, sec. 3.1).

Theorem 3.2 says that bilinear upsampling by r > 1 lowers the variance of every feature that is not
constant, and the text adds that the mean is preserved. For the biased variance and the mean over a
finite map, the exact statements are:

* **Whole ratio, corners not aligned** (``align_corners=False``, mmseg's default): both, for every
  map. Each input pixel has the same total weight in the output, clamped borders included, so the
  mean is conserved to rounding, and by Jensen's inequality the mean square cannot grow; it stays
  only where each output pixel mixes equal ones, that is, for constant maps.
* **Any other size, or aligned corners**: the pixels' total weights differ, so the mean of a map
  moves, and a smooth map can *gain* variance. Among maps that vary along one side only, of
  up to 40 pixels and enlarged up to 4 times, the largest gain is 2.6 % with aligned corners (31 to
  46 pixels) and 1.2 % without (35 to 45). ``resize(size=...)`` of levels of odd size is such a
  case.
* **Independent pixels** of equal mean and variance, at every ratio above 1 and in both modes: the
  mean is conserved at each output pixel and the variance lowered, in expectation.
  :func:`variance_ratio` is that ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Mean of a feature after convolution, batch norm and ReLU (equation 6).
FEATURE_MEAN = 1 / math.sqrt(2 * math.pi)
#: Its variance (equation 7).
FEATURE_VARIANCE = (math.pi - 1) / (2 * math.pi)

# Output values held at once while measuring: 64 MB in float32.
_CHUNK = 2**24


def interior_variance_ratio(ratio: int) -> float:
    r"""Variance after bilinear upsampling over variance before, away from the borders.

    For independent pixels and ``align_corners=False``. One dimension contributes the mean of
    :math:`(1-t)^2 + t^2` over the positions t that the output pixels take between two input
    pixels: (k + 1/2) / r for an even ratio r and k / r for an odd one, which gives
    :math:`\left(\frac23 - \frac1{6r^2}\right)^2` and :math:`\left(\frac23 + \frac1{3r^2}\right)^2`.

    Args:
        ratio: whole upsampling ratio r, at least 1.

    Raises:
        ValueError: the ratio is not a whole number of at least 1.
    """
    if ratio != int(ratio) or ratio < 1:
        raise ValueError(
            f'interior_variance_ratio: expected a whole ratio of at least 1, got {ratio}; '
            'variance_ratio takes any pair of sizes'
        )
    one = 2 / 3 + (-1 / (6 * ratio**2) if ratio % 2 == 0 else 1 / (3 * ratio**2))
    return one**2


def _pair(size: int | Sequence[int], name: str) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or any(not isinstance(s, int) or s < 1 for s in pair):
        raise ValueError(
            f'{name}: expected a positive whole number, or height and width, got {size}'
        )
    return pair


def _squared_weights(size: int, out_size: int, align_corners: bool) -> tuple[float, float]:
    """Of one dimension's interpolation: mean squared norm of its rows, squared norm of their mean.

    The first is the variance of an output pixel, averaged, the second the variance of the map's
    mean, for independent pixels of variance 1.
    """
    index = torch.arange(out_size, dtype=torch.float64)
    if align_corners:
        position = index * ((size - 1) / max(out_size - 1, 1))
    else:
        position = (index + 0.5) * (size / out_size) - 0.5
    # Beyond the centres of the outermost pixels the border is repeated.
    position = position.clamp(0, size - 1)
    left = position.floor().long().clamp(max=max(size - 2, 0))
    right = (left + 1).clamp(max=size - 1)
    t = position - left
    total = torch.zeros(size, dtype=torch.float64)
    total.index_add_(0, left, 1 - t).index_add_(0, right, t)
    return float((1 - 2 * t * (1 - t)).mean()), float((total / out_size).square().sum())


def variance_ratio(
    size: int | Sequence[int],
    out_size: int | Sequence[int],
    align_corners: bool = False,
    num_maps: int | None = None,
) -> float:
    """Expected variance after bilinear upsampling over the variance before, borders included.

    Exact for independent pixels of equal mean and variance, whatever their distribution. With a
    whole ratio r and ``align_corners=False`` a dimension of n pixels contributes
    ((n - 1) c + 1) / n, where c is the factor of :func:`interior_variance_ratio`.

    Args:
        size: height and width before, or one number for both.
        out_size: height and width after.
        align_corners: as in :func:`torch.nn.functional.interpolate`.
        num_maps: over how many maps (images times channels) one biased variance is taken, which
            lowers its expectation both before and after; None for infinitely many.

    Raises:
        ValueError: a size or ``num_maps`` is not a positive whole number.
    """
    sizes, out_sizes = _pair(size, 'size'), _pair(out_size, 'out_size')
    if num_maps is not None and num_maps < 1:
        raise ValueError(f'num_maps: expected at least 1 or None, got {num_maps}')
    parts = [_squared_weights(s, o, align_corners) for s, o in zip(sizes, out_sizes)]
    pixel = parts[0][0] * parts[1][0]
    if num_maps is None:
        return pixel
    if sizes == (1, 1) and num_maps == 1:
        raise ValueError('a single pixel of a single map has no variance: enlarge size or num_maps')
    mean = parts[0][1] * parts[1][1]
    return (pixel - mean / num_maps) / (1 - 1 / (num_maps * sizes[0] * sizes[1]))


@dataclass(frozen=True)
class Measurement:
    """Biased variance and mean of a random feature, before and after bilinear upsampling.

    Attributes:
        ratio: upsampling ratio.
        size: height and width before.
        out_size: height and width after.
        mean_before: mean of the feature.
        variance_before: its variance.
        mean_after: mean of the upsampled feature.
        variance_after: its variance.
    """

    ratio: float
    size: tuple[int, int]
    out_size: tuple[int, int]
    mean_before: float
    variance_before: float
    mean_after: float
    variance_after: float


class _Moments:
    """Mean and biased variance over chunks, summed around ``center``."""

    def __init__(self, center: float) -> None:
        self.center, self.count, self.first, self.second = center, 0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        shifted = x - self.center
        self.count += x.numel()
        self.first += float(shifted.sum())
        self.second += float(shifted.square_().sum())

    def result(self) -> tuple[float, float]:
        mean = self.first / self.count
        return self.center + mean, self.second / self.count - mean**2


def measure_upsampling(
    variance: float,
    ratios: Sequence[float] = (2, 4, 8),
    shape: Sequence[int] = (16, 256, 128, 128),
    align_corners: bool = False,
    mean: float = FEATURE_MEAN,
    generator: torch.Generator | None = None,
) -> list[Measurement]:
    """Upsamples a normal random feature and measures its variance (one point of figure 3).

    Args:
        variance: variance of the feature, positive.
        ratios: upsampling ratios, at least 1; the size after is rounded down.
        shape: images, channels, height, width; the default is the paper's.
        align_corners: as in :func:`torch.nn.functional.interpolate`.
        mean: mean of the feature.
        generator: source of the random numbers; the feature lies on its device.

    Returns:
        One measurement per ratio, all of the same feature. Memory stays the same for any number
        of images and channels.

    Raises:
        ValueError: an argument is out of its range.
    """
    from mmseg.models.utils import resize

    if not variance > 0:
        raise ValueError(f'variance: expected a positive number, got {variance}')
    if not ratios or any(r < 1 for r in ratios):
        raise ValueError(f'ratios: expected numbers of at least 1, got {list(ratios)}')
    if len(shape) != 4 or any(s < 1 for s in shape):
        raise ValueError(f'shape: expected images, channels, height, width, got {tuple(shape)}')
    size = (shape[2], shape[3])
    out_sizes = [(int(size[0] * r), int(size[1] * r)) for r in ratios]
    before, after = _Moments(mean), [_Moments(mean) for _ in ratios]
    left = shape[0] * shape[1]
    chunk = max(1, _CHUNK // max(h * w for h, w in out_sizes))
    device = None if generator is None else generator.device
    while left:
        maps = min(chunk, left)
        left -= maps
        x = torch.randn((maps, 1, *size), generator=generator, device=device)
        x = x * math.sqrt(variance) + mean
        before.add(x)
        for moments, out_size in zip(after, out_sizes):
            moments.add(
                resize(x, out_size, mode='bilinear', align_corners=align_corners, warning=False)
            )
    return [
        Measurement(r, size, out_size, *before.result(), *moments.result())
        for r, out_size, moments in zip(ratios, out_sizes, after)
    ]
