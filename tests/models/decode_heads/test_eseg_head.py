"""ESeg's weighted sum of levels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mmseg_fusion.analysis import count_call
from mmseg_fusion.models.decode_heads import ESegHead

from ...testers import HeadTester

LEVELS = dict(in_channels=[6] * 4, in_index=[0, 1, 2, 3], channels=6)
BN = dict(type='BN')


class TestESegHead(HeadTester):
    head = dict(type='ESegHead', in_index=[0, 1, 2, 3], channels=6)
    channels = (6, 6, 6, 6)
    stride = 4
    # All levels and the sum have one width.
    ignored_keys = ('channels', 'in_channels')


def head(**kwargs) -> ESegHead:
    return ESegHead(**{**LEVELS, **dict(num_classes=3, norm_cfg=BN), **kwargs})


@pytest.mark.parametrize('grad', [True, False])
def test_sum_in_float64(grad: bool) -> None:
    """The equation of figure 3, each level enlarged first and weighted then."""
    module = head().double()
    with torch.no_grad():
        module.level_weights.copy_(torch.tensor([0.3, -2.0, 1.5, 0.0], dtype=torch.float64))
    levels = [torch.randn(2, 6, 12 >> i, 20 >> i, dtype=torch.float64) for i in range(4)]
    copies = [x.clone() for x in levels]
    factors = [math.exp(w) for w in (0.3, -2.0, 1.5, 0.0)]
    expected = sum(
        f / sum(factors) * F.interpolate(x, (12, 20), mode='bilinear', align_corners=False)
        for f, x in zip(factors, levels)
    )
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(module.fuse(levels), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(levels, copies))


def test_weights_start_equal_and_learn() -> None:
    module = head()
    levels = [torch.randn(2, 6, 8 >> i, 8 >> i) for i in range(4)]
    torch.testing.assert_close(
        module.fuse([torch.ones_like(x) for x in levels]).mean(), torch.tensor(1.0)
    )
    module(levels).square().sum().backward()
    assert (module.level_weights.grad != 0).all()
    # A softmax: adding a constant to all weights changes nothing.
    assert abs(float(module.level_weights.grad.sum())) < 1e-4 * float(
        module.level_weights.grad.abs().sum()
    )


def test_counts() -> None:
    module = head().eval()
    c, k, area = 6, 3, 16 * 24
    params = 4 + 9 * c + c * c + 2 * c + c * k + k
    levels = [torch.randn(1, 6, 16 >> i, 24 >> i) for i in range(4)]
    found = count_call(module, levels)
    assert (found.params, found.flops) == (params, area * (9 * c + c * c + c * k))


def test_levels_of_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r'channels=6, got \[6, 6, 8, 6\]'):
        head(in_channels=[6, 6, 8, 6])
