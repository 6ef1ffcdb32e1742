"""Depthwise and transposed fusions, and layers whose raw output is used: constructed cases."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmseg_fusion.fusions import (
    bias_shift,
    equalize,
    fold_scale_equalizer,
    fold_tensors,
    trace_fusions,
)

STD = (0.5, 4.0)
X, Y = torch.randn(8, 4, 12, 12) * STD[0], torch.randn(8, 2, 12, 12) * STD[1]


class Fusing(nn.Module):
    """A fusion layer and what stands behind it."""

    def __init__(self, layer: nn.Module, behind: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.behind = layer, behind or nn.Identity()

    def forward(self, x, y):
        return self.behind(self.layer(torch.cat([x, y], 1)))


def forward(model, batch):
    return model(*batch)


@pytest.mark.parametrize(
    'layer',
    [
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.Conv2d(6, 12, 3, padding=1, groups=6),
        nn.Conv2d(6, 4, 3, padding=1, groups=2),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2),
        nn.ConvTranspose2d(6, 6, 4, stride=2, padding=1, groups=6),
        nn.Conv2d(6, 4, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize('mode', ['fold', 'module'])
def test_equal_to_the_layer_on_equalized_branches(layer, mode) -> None:
    """The reference: every branch divided by its measured std, the former layer on it."""
    model = Fusing(copy.deepcopy(layer)).double()
    x, y = X.double(), Y.double()
    before = copy.deepcopy(model)
    report = equalize(model, [(x, y)], forward, mode=mode, equalize_mean=False)
    expected = before(x / x.std(correction=0), y / y.std(correction=0))
    torch.testing.assert_close(model(x, y), expected, rtol=1e-5, atol=1e-5)
    assert [b.after for b in report.branches] == pytest.approx([1.0, 1.0], rel=1e-6)


@pytest.mark.parametrize('norm', [nn.BatchNorm2d(6), nn.InstanceNorm2d(6)], ids=str)
def test_a_depthwise_fusion_in_front_of_batch_norm_is_left_alone(norm) -> None:
    model = Fusing(nn.Conv2d(6, 6, 3, padding=1, groups=6), norm)
    weight = model.layer.weight.clone()
    before = model(X, Y)
    report = equalize(model, [(X, Y)], forward)
    assert 'batch or instance norm that its output goes into' in report.layers[0]['reason']
    assert torch.equal(model.layer.weight, weight)
    # And what the reason says is so: a scale of half of the channels hardly matters.
    with torch.no_grad():
        model.layer.weight[4:] /= 10
        model.layer.bias[4:] /= 10
    assert (model(X, Y) - before).abs().max() < 0.02 * before.abs().max()


@pytest.mark.parametrize(
    'behind', [None, nn.GroupNorm(1, 6), nn.ReLU(), nn.BatchNorm2d(6).eval()], ids=str
)
def test_a_depthwise_fusion_without_batch_norm_is_folded(behind) -> None:
    if isinstance(behind, nn.BatchNorm2d):
        # Frozen for good: a factor per channel.
        behind.train = lambda mode=True: behind
    model = Fusing(nn.Conv2d(6, 6, 3, padding=1, groups=6), behind)
    weight = model.layer.weight.clone()
    report = equalize(model, [(X, Y)], forward)
    assert not report.layers[0]['reason']
    for new, old, std in zip(model.layer.weight.split((4, 2)), weight.split((4, 2)), (X, Y)):
        torch.testing.assert_close(new * std.std(correction=0), old)


def test_depthwise_then_pointwise_without_norm() -> None:
    model = Fusing(nn.Conv2d(6, 12, 3, padding=1, groups=6), nn.Conv2d(12, 4, 1))
    depthwise, pointwise = equalize(model, [(X, Y)], forward).layers
    assert (depthwise['name'], depthwise['channels']) == ('layer', [4, 2])
    assert (pointwise['name'], pointwise['channels']) == ('behind', [8, 4])
    # Measured with the depthwise layer equalized: what is left is that of its filters.
    assert max(pointwise['std']) < 3 * min(pointwise['std'])


def test_no_bias_takes_the_means_of_a_transposed_convolution() -> None:
    layer = nn.ConvTranspose2d(6, 4, 3, stride=2)
    report = equalize(Fusing(layer), [(X + 3, Y)], forward, equalize_mean=True)
    assert not report.layers[0]['bias']
    with pytest.raises(ValueError, match='different values in different cells'):
        fold_scale_equalizer(layer, (4, 2), (1.0, 1.0), (1.0, 1.0))
    with pytest.raises(ValueError, match='pass bias=False'):
        fold_tensors(layer.weight, layer.bias, torch.ones(6), torch.ones(6), transposed=True)
    with pytest.raises(ValueError, match='5 channels in the branches, but the layer takes 6'):
        fold_tensors(layer.weight, None, torch.ones(5), transposed=True)
    assert bias_shift(torch.ones(4, 6, 1, 1), torch.ones(6)).tolist() == [6.0] * 4


class RawBesideNormed(nn.Module):
    """The first fusion goes through batch norm, and raw into the second one as well."""

    def __init__(self, raw: bool) -> None:
        super().__init__()
        self.raw = raw
        self.first = nn.Conv2d(6, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(8, 4, 1)

    def forward(self, x, y):
        z = self.first(torch.cat([x, y], 1))
        normed = self.norm(z)
        return self.second(torch.cat([z if self.raw else normed, normed], 1))


@pytest.mark.parametrize('raw', [True, False])
def test_a_raw_output_beside_its_norm_is_measured_again(raw) -> None:
    model = RawBesideNormed(raw)
    first, _ = trace_fusions(model, X, Y)
    assert (first.rescaled, first.normalized) == (not raw, not raw)
    passes = []

    def counted(model, batch):
        passes.append(batch)
        return model(*batch)

    report = equalize(model, [(X, Y)], counted, remeasure=False, measure_after=False)
    assert len(passes) == (3 if raw else 2)  # the trace, and a measurement per scale
    # The final model, measured by itself: the divisors of the second layer fit what it takes.
    seen = {}
    model.second.register_forward_pre_hook(lambda m, x: seen.update(x=x[0].detach()))
    model.train()(X, Y)
    for part, std in zip(seen['x'].split(4, 1), report.layers[1]['std']):
        assert part.std(correction=0).item() == pytest.approx(std, rel=1e-3)


class UsedTwice(nn.Module):
    """One fusion layer, called once in front of batch norm and once not."""

    def __init__(self, order: tuple[bool, bool]) -> None:
        super().__init__()
        self.order = order
        self.fuse, self.norm = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x, y):
        both, out = torch.cat([x, y], 1), []
        for normed in self.order:
            out.append(self.norm(self.fuse(both)) if normed else self.fuse(both).relu())
        return out


@pytest.mark.parametrize(
    ('order', 'expected'),
    [
        ((True, False), False),
        ((False, True), False),
        ((True, True), True),
        ((False, False), False),
    ],
)
def test_normalized_and_rescaled_hold_for_all_uses(order, expected) -> None:
    (fusion,) = trace_fusions(UsedTwice(order), X, Y)
    assert (fusion.normalized, fusion.rescaled) == (expected, expected)
    # So the bias takes the means where one of the uses needs them.
    report = equalize(UsedTwice(order), [(X, Y)], forward)
    assert report.layers[0]['bias'] is not expected
