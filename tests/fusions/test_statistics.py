"""Moments of branches where float32 has few digits left, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmseg_fusion.fusions import BranchStatistics, equalize


@pytest.mark.parametrize(('mean', 'std'), [(1000.0, 0.5), (100.0, 0.03), (-5e3, 0.7), (0.4, 0.58)])
def test_a_small_deviation_beside_a_large_mean(mean: float, std: float) -> None:
    part = torch.randn(6, 4, 16, 16) * std + mean
    statistics = BranchStatistics((4,))
    for images in part.split(2):
        statistics.add([images])
    (measured,) = statistics.std
    assert measured == pytest.approx(part.double().std(correction=0).item(), rel=1e-6)
    assert statistics.mean[0] == pytest.approx(part.double().mean().item(), rel=1e-9)


def test_means_that_differ_between_images_count() -> None:
    part = torch.randn(4, 2, 8, 8) * 0.1 + torch.tensor([100.0, 101, 99, 100])[:, None, None, None]
    statistics = BranchStatistics((2,))
    statistics.add([part])
    expected = part.double().std(correction=0).item()
    assert statistics.std[0] == pytest.approx(expected, rel=1e-6)
    halves = [BranchStatistics((2,)) for _ in range(2)]
    for half, images in zip(halves, part.split(2)):
        half.add([images])
    halves[0].merge(halves[1])
    assert halves[0].std[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('value', [0.0, 0.1, -3.3e-7, 1000.1, 1e9])
def test_a_constant_has_no_deviation(value: float) -> None:
    statistics = BranchStatistics((3,))
    for count in (2, 5):
        statistics.add([torch.full((count, 3, 37, 41), value)])
    assert statistics.std == [0.0]


def test_rounding_of_a_constant_is_no_deviation() -> None:
    """A bias of 1000 behind a layer whose input hardly matters: the last bits differ."""
    part = torch.full((4, 2, 32, 32), 1000.0)
    part += 2e-4 * torch.randn_like(part)  # three steps of float32 there
    statistics = BranchStatistics((2,))
    statistics.add([part])
    assert statistics.std == [0.0]


def test_a_branch_with_a_large_mean_is_equalized() -> None:
    """Before, it was taken for a constant and left alone."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fuse = nn.Conv2d(6, 4, 1)

        def forward(self, x):
            return self.fuse(torch.cat([x, 0.5 * x + 1000], 1))

    report = equalize(Head(), [torch.randn(4, 3, 16, 16)])
    assert [b.done for b in report.branches] == [True, True]
    assert report.branches[1].std == pytest.approx(report.branches[0].std / 2, rel=1e-3)
