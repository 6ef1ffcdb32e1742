"""EfficientNet of any width and depth."""

from __future__ import annotations

import math

import pytest
import torch
from mmpretrain.models.backbones import EfficientNet
from torch import nn

from mmseg_fusion.analysis import count_call
from mmseg_fusion.models.backbones import ScaledEfficientNet

from ...testers import BackboneTester

# Width and depth of the published networks.
PUBLISHED = {
    'b0': (1.0, 1.0),
    'b1': (1.0, 1.1),
    'b2': (1.1, 1.2),
    'b3': (1.2, 1.4),
    'b4': (1.4, 1.8),
    'b5': (1.6, 2.2),
    'b6': (1.8, 2.6),
    'b7': (2.0, 3.1),
}
# EfficientNet-B0's stages (arXiv 1905.11946, table 1): expansion, kernel, stride, channels, blocks.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class TestDefault(BackboneTester):
    backbone = dict(type='ScaledEfficientNet', width=0.5, depth=0.6)
    out_channels = (16, 24, 56, 160)
    out_strides = (4, 8, 16, 32)


class TestLite(BackboneTester):
    backbone = dict(type='ScaledEfficientNet', width=0.4, depth=0.6, variant='lite')
    out_channels = (16, 16, 48, 128)
    out_strides = (4, 8, 16, 32)


def rounded(channels: float) -> int:
    """To a multiple of 8, and one more where that takes off more than a tenth."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near


def blocks(width: float, depth: float):
    """(in, middle, out, kernel, stride, expansion, the block's input) of every block in turn."""
    before = rounded(32 * width)
    for expansion, kernel, stride, channels, count in STAGES:
        after = rounded(channels * width)
        for i in range(math.ceil(count * depth)):
            yield before, before * expansion, after, kernel, stride if i == 0 else 1, expansion
            before = after


def default_counts(width: float, depth: float, h: int, w: int) -> tuple[int, int]:
    """Parameters and multiply-adds of the stem and the seven stages, squeeze 1/4 of the input."""
    stem = rounded(32 * width)
    h, w = h // 2, w // 2
    params, flops = 27 * stem + 2 * stem, 27 * stem * h * w
    for i, mid, o, k, s, expansion in blocks(width, depth):
        if expansion != 1:
            params += i * mid + 2 * mid
            flops += i * mid * h * w
        h, w = h // s, w // s
        squeezed = i // 4
        params += k * k * mid + 2 * mid + 2 * mid * squeezed + squeezed + mid + mid * o + 2 * o
        flops += (k * k * mid + mid * o) * h * w + 2 * mid * squeezed
    return params, flops


def lite_counts(width: float, depth: float, h: int, w: int) -> tuple[int, int]:
    stem = rounded(32 * width)
    h, w = h // 2, w // 2
    params, flops = 27 * stem + 2 * stem, 27 * stem * h * w
    for i, mid, o, _, s, expansion in blocks(width, depth):
        h, w = h // s, w // s
        if expansion == 1:
            params += 9 * i * o + 2 * o
            flops += 9 * i * o * h * w
        else:
            params += 9 * i * mid + 2 * mid + mid * o + 2 * o
            flops += (9 * i * mid + mid * o) * h * w
    return params, flops


@pytest.mark.parametrize(('width', 'depth'), [(0.4, 0.6), (0.6, 1.0), (1.0, 1.1), (1.3, 1.7)])
@pytest.mark.parametrize('variant', ['default', 'lite'])
def test_counts(width: float, depth: float, variant: str) -> None:
    net = ScaledEfficientNet(width, depth, variant).eval().to('meta')
    found = count_call(net, torch.empty(1, 3, 128, 64, device='meta'))
    formula = default_counts if variant == 'default' else lite_counts
    assert (found.params, found.flops) == formula(width, depth, 128, 64)


@pytest.mark.parametrize('arch', PUBLISHED)
def test_published_weights_fit(arch: str) -> None:
    """Names and shapes are mmpretrain's, but for the last convolution, which nobody calls."""
    theirs = EfficientNet(arch).state_dict()
    ours = ScaledEfficientNet(*PUBLISHED[arch]).state_dict()
    expected = {k: v.shape for k, v in theirs.items() if not k.startswith('layers.6.')}
    assert {k: v.shape for k, v in ours.items()} == expected


@pytest.mark.stack
def test_same_levels_as_mmpretrain() -> None:
    theirs = EfficientNet('b0', out_indices=(2, 3, 4, 5))
    theirs.eval()
    ours = ScaledEfficientNet(1.0, 1.0).eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    image = torch.randn(1, 3, 65, 47)
    with torch.no_grad():
        for a, b in zip(ours(image), theirs(image)):
            assert torch.equal(a, b)


def test_lite_is_fused_throughout() -> None:
    net = ScaledEfficientNet(0.6, 1.0, 'lite')
    kinds = {type(m).__name__ for m in net.modules()}
    assert not kinds & {'SELayer', 'Swish', 'SiLU', 'Sigmoid', 'InvertedResidual'}
    assert 'ReLU' in kinds
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert {m.groups for m in convs} == {1}
    assert {m.kernel_size for m in convs} == {(3, 3), (1, 1)}
    # The stage that expands nothing is one convolution per block.
    assert [type(block).__name__ for block in net.layers[1]] == ['FusedBlock']


def test_fused_block_adds_its_input_where_it_can() -> None:
    net = ScaledEfficientNet(1.0, 2.0, 'lite').eval()
    first, second = net.layers[1]
    assert (first.residual, second.residual) == (False, True)
    x = torch.randn(1, 16, 6, 5)
    torch.testing.assert_close(second(x), x + second.conv(x))


@pytest.mark.parametrize('variant', ['default', 'lite'])
def test_stochastic_depth_rises(variant: str) -> None:
    net = ScaledEfficientNet(0.4, 2.0, variant, drop_path_rate=0.3)
    rates = [
        getattr(block.drop_path, 'drop_prob', 0.0) for layer in net.layers[1:] for block in layer
    ]
    expected = torch.linspace(0, 0.3, len(rates)).tolist()
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(width=0), 'width is a factor above 0, but got 0; change model.backbone.width'),
        (dict(depth=-1.0), 'depth is a factor above 0'),
        (dict(variant='small'), "one of .*'lite'.*got 'small'; change model.backbone.variant"),
        (dict(out_indices=(5, 2)), 'out_indices are rising numbers'),
        (dict(frozen_stages=7), r'0 to 6 with out_indices=\(2, 3, 4, 5\), but got 7'),
    ],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaledEfficientNet(**options)
