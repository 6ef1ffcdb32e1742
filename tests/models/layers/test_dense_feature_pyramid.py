"""DenseFeaturePyramid against equation 6 and the authors' dilated form, written out."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from mmseg_fusion.analysis import count_call
from mmseg_fusion.models.layers import DenseFeaturePyramid
from mmseg_fusion.models.layers.dense_feature_pyramid import stack_features

from ..necks.test_gated_fully_fusion import (
    batch_norm,
    bilinear,
    features,
    gradients,
    norm_relu,
    randomized,
)

CLOSE = dict(rtol=1e-9, atol=1e-10)
#: Sizes of the context and of the levels, finest first.
SIZES = {
    'strides 4, 8, 8, 8': ((5, 4), [(9, 7), (5, 4), (5, 4), (5, 4)]),
    'strides 4 to 32': ((3, 2), [(17, 13), (9, 7), (5, 4), (3, 2)]),
    'a context of its own size': ((2, 3), [(9, 7), (5, 4), (4, 4), (3, 5)]),
}


def level_inputs(sizes, context_channels: int, channels: int) -> tuple[Tensor, list[Tensor]]:
    context_size, level_sizes = sizes
    (context,) = features([context_size], [context_channels], requires_grad=True)
    levels = features(level_sizes, [channels] * len(level_sizes), requires_grad=True)
    return context, levels


@pytest.mark.stack
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('name', SIZES)
def test_equation_6(name: str, align_corners: bool) -> None:
    """y_1 = H_1([y_0]), y_2 = H_2([y_0, X_4]), ... with the fused levels from the last down."""
    dfp = randomized(DenseFeaturePyramid(3, 4, 5, align_corners=align_corners))
    y0, levels = level_inputs(SIZES[name], 5, 3)
    x1, x2, x3, x4 = levels

    def h(i: int, *parts: Tensor) -> Tensor:
        layer = dfp.layers[i - 1]
        # The sum of one product per part: what a convolution of their concatenation is.
        weights = layer.conv.weight[:, :, 0, 0].split([p.shape[1] for p in parts], 1)
        total = sum(
            torch.einsum('oc,nchw->nohw', w, bilinear(p, x1.shape[2:], align_corners))
            for w, p in zip(weights, parts)
        )
        return norm_relu(layer, total)

    expected = [
        h(1, y0),
        h(2, y0, x4),
        h(3, y0, x4, x3),
        h(4, y0, x4, x3, x2),
        h(5, y0, x4, x3, x2, x1),
    ]
    found = dfp(y0, levels)
    assert dfp.num_outs == len(found) == len(expected)
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, **CLOSE)
    leaves = [y0, *levels, *dfp.parameters()]
    for f, e in zip(gradients(found, leaves), gradients(expected, leaves)):
        torch.testing.assert_close(f, e, **CLOSE)


@pytest.mark.parametrize('align_corners', [False, True])
def test_dilated_form(align_corners: bool) -> None:
    """y1 = D3(a), y2 = D6([y1, m5]), y3 = D9([y1, y2, m2]), all at the size of m2."""
    dfp = randomized(DenseFeaturePyramid(4, 3, 9, 'dilated', align_corners))
    m2, m5, a = levels = features([(23, 21), (6, 6), (6, 6)], [4] * 3, requires_grad=True)

    def d(rate: int, layer: nn.Module, *parts: Tensor) -> Tensor:
        x = torch.cat([bilinear(p, m2.shape[2:], align_corners) for p in parts], 1)
        for part, options in zip(layer, (dict(), dict(padding=rate, dilation=rate))):
            x = F.relu(batch_norm(part.bn, x))
            x = F.conv2d(x, part.conv.weight, part.conv.bias, **options)
        return x

    y1 = d(3, dfp.layers[0], a)
    y2 = d(6, dfp.layers[1], y1, m5)
    y3 = d(9, dfp.layers[2], y1, y2, m2)
    kernels = [tuple(m.conv.weight.shape) for layer in dfp.layers for m in layer]
    assert kernels == [k for i in (1, 2, 3) for k in ((4, 4 * i, 1, 1), (4, 4, 3, 3))]
    found = dfp(None, levels)
    assert dfp.num_outs == len(found) == 3
    for f, e in zip(found, (y1, y2, y3)):
        torch.testing.assert_close(f, e, **CLOSE)
    leaves = [*levels, *dfp.parameters()]
    for f, e in zip(gradients(found, leaves), gradients((y1, y2, y3), leaves)):
        torch.testing.assert_close(f, e, **CLOSE)


@pytest.mark.parametrize('norm_cfg', [dict(type='BN'), None], ids=['norm', 'no norm'])
@pytest.mark.parametrize('form', ['conv', 'dilated'])
def test_inputs_and_reused_outputs_are_left_alone(form: str, norm_cfg: dict | None) -> None:
    """Without a norm an activation in place would write into a level or into an earlier y."""
    dfp = DenseFeaturePyramid(3, 3, 5, form, norm_cfg=norm_cfg).double().eval()
    # Of one size: no resize makes a copy.
    context, levels = level_inputs(((4, 4), [(4, 4)] * 3), 5, 3)
    kept = [x.detach().clone() for x in (context, *levels)]
    written: list[tuple[Tensor, Tensor]] = []
    for layer in dfp.layers:
        layer.register_forward_hook(lambda m, x, y: written.append((y, y.detach().clone())))
    with torch.no_grad():
        dfp(context, levels)
    for x, before in zip((context, *levels), kept):
        assert torch.equal(x, before)
    assert len(written) == dfp.num_outs
    for y, before in written:
        assert torch.equal(y, before)


@pytest.mark.parametrize('form', ['conv', 'dilated'])
@pytest.mark.parametrize('num_levels', [2, 4])
def test_everything_is_trained(form: str, num_levels: int) -> None:
    dfp = DenseFeaturePyramid(4, num_levels, 6, form)
    context = torch.randn(2, 6, 3, 4, requires_grad=True)
    levels = [torch.randn(2, 4, 9, 7, requires_grad=True) for _ in range(num_levels)]
    outs = dfp(context, levels)
    # The last y alone has seen every level.
    leaves = [*levels, context] if form == 'conv' else levels
    last = torch.autograd.grad(outs[-1].square().sum(), leaves, retain_graph=True)
    assert all(g.any() for g in last)
    sum((y * torch.randn_like(y)).sum() for y in outs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in dfp.parameters())


def test_parameters_and_multiply_adds() -> None:
    c, c0, count = 4, 6, 4
    sizes = [(16, 12), (8, 6), (8, 6), (8, 6)]
    levels = [torch.randn(1, c, *s) for s in sizes]
    context = torch.randn(1, c0, 8, 6)
    fine = 16 * 12
    ins = [c0 + i * c for i in range(count + 1)]
    found = count_call(DenseFeaturePyramid(c, count, c0), context, levels)
    assert found.params == sum(i * c + 2 * c for i in ins)
    assert found.flops == sum(i * c * fine for i in ins)

    found = count_call(DenseFeaturePyramid(c, count, c0, 'dilated'), None, levels)
    ins = [(i + 1) * c for i in range(count)]
    # A norm before and a bias behind each convolution.
    assert found.params == sum(2 * i + i * c + c + 2 * c + 9 * c * c + c for i in ins)
    assert found.flops == sum((i * c + 9 * c * c) * fine for i in ins)


def test_options_reach_every_convolution() -> None:
    options = dict(norm_cfg=dict(type='GN', num_groups=2), act_cfg=dict(type='LeakyReLU'))
    for form in ('conv', 'dilated'):
        dfp = DenseFeaturePyramid(4, 3, 6, form, **options)
        convs = [m for m in dfp.modules() if isinstance(m, ConvModule)]
        assert len(convs) == (4 if form == 'conv' else 6)
        for conv in convs:
            assert isinstance(conv.norm, nn.GroupNorm)
            assert isinstance(conv.activate, nn.LeakyReLU)


@pytest.mark.parametrize('form', ['conv', 'dilated'])
def test_compiles_as_one_graph(form: str) -> None:
    dfp = DenseFeaturePyramid(4, 3, 6, form).eval()
    context = torch.randn(1, 6, 4, 4)
    levels = [torch.randn(1, 4, *s) for s in [(8, 8), (4, 4), (4, 4)]]
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(dfp, backend='eager', fullgraph=True)
        for found, expected in zip(compiled(context, levels), dfp(context, levels)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_stack_of_features() -> None:
    a, b = features([(3, 4), (6, 5)], [2, 3])
    for align_corners in (False, True):
        found = stack_features([a, b], b, align_corners)
        torch.testing.assert_close(found, torch.cat([bilinear(a, (6, 5), align_corners), b], 1))


def test_unknown_form() -> None:
    with pytest.raises(ValueError, match=r"one of \('conv', 'dilated'\), got 'dense'"):
        DenseFeaturePyramid(4, 3, 6, 'dense')
