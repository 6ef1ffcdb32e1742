"""The layer and the folding, against equation 9 written naively in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmseg_fusion.fusions import ScaleEqualizer, fold_scale_equalizer
from mmseg_fusion.fusions.fold import (
    bias_shift,
    broadcast_to_weight,
    expand_branches,
    fold_tensors,
)


def test_normalizes_globally():
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    y = ScaleEqualizer(0.4, 0.58)(x)
    torch.testing.assert_close(y, (x - 0.4) / 0.58, rtol=1e-6, atol=1e-6)
    per_channel = ScaleEqualizer([0.0, 1.0, 2.0], [1.0, 2.0, 4.0])(x)
    torch.testing.assert_close(per_channel[:, 2], (x[:, 2] - 2) / 4)


def test_constants_are_buffers_without_gradient():
    layer = ScaleEqualizer(0.4, 0.5)
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {'mean', 'std'}
    assert not ScaleEqualizer(0.4, 0.5, persistent=False).state_dict()
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_keeps_the_type_of_the_feature(dtype):
    x = torch.randn(1, 2, 3, 3).to(dtype)
    assert ScaleEqualizer(0.4, 0.5)(x).dtype == dtype


@pytest.mark.parametrize(
    ('mean', 'std', 'message'),
    [
        (0.0, 0.0, 'positive'),
        (0.0, -1.0, 'positive'),
        (0.0, float('nan'), 'finite'),
        (float('inf'), 1.0, 'finite'),
        (0.0, torch.ones(2, 2), 'per channel'),
    ],
)
def test_bad_constants(mean, std, message):
    with pytest.raises(ValueError, match=message):
        ScaleEqualizer(mean, std)


def test_wrong_channels():
    with pytest.raises(ValueError, match='3 channels, the feature 2'):
        ScaleEqualizer(0.0, [1.0, 2.0, 3.0])(torch.randn(1, 2, 4, 4))


LAYERS = {
    'conv1x1': lambda: nn.Conv2d(12, 8, 1),
    'conv3x3': lambda: nn.Conv2d(12, 8, 3),
    'grouped': lambda: nn.Conv2d(12, 8, 3, groups=4),
    'conv1d': lambda: nn.Conv1d(12, 8, 3),
    'conv3d': lambda: nn.Conv3d(12, 8, (1, 3, 3)),
    'linear': lambda: nn.Linear(12, 8),
}
CHANNELS, MEAN, STD = (2, 7, 3), (0.4, -0.1, 2.0), (0.58, 0.03, 11.0)


def naive(layer, x, dim):
    parts = x.split(CHANNELS, dim)
    return layer(torch.cat([(p - m) / s for p, m, s in zip(parts, MEAN, STD)], dim))


@pytest.mark.parametrize('kind', LAYERS)
def test_folded_equals_explicit(kind):
    layer = LAYERS[kind]().double()
    shapes = {'conv1d': (2, 12, 9), 'conv3d': (2, 12, 2, 6, 5), 'linear': (2, 5, 12)}
    x = torch.randn(shapes.get(kind, (2, 12, 6, 7)), dtype=torch.float64)
    dim = -1 if kind == 'linear' else 1
    expected = naive(layer, x, dim)
    folded = copy.deepcopy(layer)
    fold_scale_equalizer(folded, CHANNELS, MEAN, STD)
    torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-12)
    # Without the bias part only a constant per output channel differs.
    scaled = copy.deepcopy(layer)
    fold_scale_equalizer(scaled, CHANNELS, MEAN, STD, bias=False)
    difference = scaled(x) - expected
    axes = tuple(i for i in range(difference.dim()) if i != dim % difference.dim())
    assert difference.amax(axes).sub(difference.amin(axes)).abs().max() < 1e-12
    assert torch.equal(scaled.bias, layer.bias)


def test_weight_blocks_are_divided_and_kept_as_parameters():
    layer = nn.Conv2d(12, 8, 1, bias=False)
    before, weight = layer.weight.detach().clone(), layer.weight
    fold_scale_equalizer(layer, CHANNELS, MEAN, STD, bias=False)
    assert layer.weight is weight
    assert weight.requires_grad
    for block, old, std in zip(layer.weight.split(CHANNELS, 1), before.split(CHANNELS, 1), STD):
        torch.testing.assert_close(block, old / std)


def test_border_of_a_zero_padded_layer_is_what_differs():
    layer = nn.Conv2d(12, 8, 3, padding=1).double()
    x = torch.randn(1, 12, 7, 7, dtype=torch.float64)
    expected = naive(layer, x, 1)
    fold_scale_equalizer(layer, CHANNELS, MEAN, STD)
    difference = (layer(x) - expected).abs()
    assert difference[..., 1:-1, 1:-1].max() < 1e-12
    assert difference[..., 0, :].max() > 1e-3


@pytest.mark.parametrize('groups', [1, 4, 12])
def test_spread_over_a_grouped_weight(groups):
    values = torch.arange(12.0)
    weight = torch.zeros(24, 12 // groups, 3, 3)
    spread = broadcast_to_weight(values, weight, groups)
    for out in range(24):
        group = out // (24 // groups)
        for j in range(12 // groups):
            assert (spread[out, j] == values[group * (12 // groups) + j]).all()


def test_shift_is_the_answer_to_a_constant():
    layer = nn.Conv2d(12, 8, 3, groups=4, bias=False).double()
    offset = torch.randn(12, dtype=torch.float64)
    x = offset.view(1, -1, 1, 1).expand(1, 12, 3, 3)
    torch.testing.assert_close(
        bias_shift(layer.weight, offset, 4), layer(x).flatten(), rtol=1e-12, atol=1e-12
    )


def test_inverse():
    weight, bias = torch.randn(8, 12, 3, 3).double(), torch.randn(8).double()
    sigma, mu = expand_branches(STD, CHANNELS), expand_branches(MEAN, CHANNELS)
    there = fold_tensors(weight, bias, sigma, mu)
    back = fold_tensors(*there, sigma, mu, inverse=True)
    torch.testing.assert_close(back[0], weight)
    torch.testing.assert_close(back[1], bias)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((CHANNELS, MEAN, (0.5, 0.0, 1.0)), 'positive'),
        ((CHANNELS, MEAN, (0.5, float('nan'), 1.0)), 'finite'),
        (((2, 7), MEAN[:2], STD[:2]), '9 channels in the branches, but the layer takes 12'),
        ((CHANNELS, MEAN, STD[:2]), '2 values for 3 branches'),
    ],
)
def test_bad_folding_changes_nothing(arguments, message):
    layer = nn.Conv2d(12, 8, 1)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        fold_scale_equalizer(layer, *arguments)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_means_need_a_bias():
    with pytest.raises(ValueError, match='bias=False'):
        fold_scale_equalizer(nn.Conv2d(12, 8, 1, bias=False), CHANNELS, MEAN, STD)
