"""KSACHead: what every head owes, its formula of parameters, its branches and its decoder."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.fusions import trace_fusions
from mmseg_fusion.models.decode_heads import KSACHead
from tests.testers import HeadTester

BN = dict(type='BN')


class TestKSACHead(HeadTester):
    head = dict(type='KSACHead', in_index=2, dilations=(1, 2, 6))
    stride = 16
    plain_convolutions = ('pyramid.conv',)


class TestKSACHeadWithDecoder(HeadTester):
    plain_convolutions = ('pyramid.conv',)
    # The decoder reads inputs[0] wherever in_index points.
    channels = (8, 16, 32)
    strides = (4, 8, 16)
    head = dict(
        type='KSACHead',
        in_index=2,
        dilations=(6, 12, 18),
        c1_in_channels=8,
        c1_channels=6,
        implementation='shared_taps',
    )
    stride = 4

    def config(self, **changes):
        cfg = super().config(**changes)
        return dict(cfg, c1_in_channels=changes['levels'][0]) if 'levels' in changes else cfg

    def test_gradient_reaches_the_stride_4_level(self):
        head, inputs = self.build(), self.inputs((64, 64))
        inputs[0].requires_grad_()
        self.loss(head, inputs, (64, 64)).backward()
        assert inputs[0].grad.any()

    def check_in_index(self):
        # The level of the decoder stays the first, as in mmseg's DepthwiseSeparableASPPHead.
        head, (low, *inputs) = self.build().eval(), self.inputs(self.image_sizes[0])
        twin = self._twin(head, in_index=3, levels=(8, 3, 16, 32))
        with torch.no_grad():
            extra = torch.randn(2, 3, 7, 5)
            assert torch.equal(twin([low, extra, *inputs]), head([low, *inputs]))


def build(cin=32, channels=8, dilations=(6, 12, 18), norm_cfg=BN, **kwargs):
    return KSACHead(
        dilations=dilations,
        in_channels=cin,
        channels=channels,
        num_classes=3,
        norm_cfg=norm_cfg,
        **kwargs,
    )


def params(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.stack
@pytest.mark.parametrize('dilations', [(6, 12, 18), (1, 6, 12, 18, 24)])
@pytest.mark.parametrize('image_level', [True, False])
@pytest.mark.parametrize('c1', [0, 16])
def test_parameters_by_formula(dilations, image_level, c1):
    cin, c, classes, low = 32, 8, 3, 6
    head = build(cin, c, dilations, image_level=image_level, c1_in_channels=c1, c1_channels=low)
    norm = 2 * c
    pyramid = 9 * cin * c + len(dilations) * norm
    point = cin * c + norm
    parts = 3 if image_level else 2
    expected = pyramid + point * (parts - 1) + parts * c * c + norm + c * classes + classes
    if c1:
        expected += c1 * low + 2 * low
        for channels in (c + low, c):
            expected += 9 * channels + 2 * channels + channels * c + norm
    assert params(head) == expected


def test_one_3x3_kernel_where_aspp_has_one_per_rate():
    common = dict(in_channels=32, channels=8, num_classes=3, norm_cfg=BN)
    kernels = {}
    for name, dilations in (('KSACHead', (6, 12, 18)), ('ASPPHead', (1, 6, 12, 18))):
        head = MODELS.build(dict(type=name, dilations=dilations, **common))
        found = [p for p in head.parameters() if p.shape[2:] == (3, 3) and p.shape[1] == 32]
        kernels[name] = len(found)
    assert kernels == {'KSACHead': 1, 'ASPPHead': 3}
    # A further rate costs its batch norm.
    assert params(build(dilations=(6, 12, 18, 24))) - params(build()) == 2 * 8


def test_logits_by_hand():
    """Figure 2.3 written out with plain functions: eval mode, weights taken from the head."""
    head = build(6, 4, (1, 2)).double().eval()
    for name, buffer in head.named_buffers():
        if 'running_mean' in name:
            buffer.normal_()
        elif 'running_var' in name:
            buffer.uniform_(0.5, 2)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)

    def norm_relu(y, bn):
        mean, variance, scale, shift = (
            v.view(-1, 1, 1) for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
        )
        return ((y - mean) / (variance + bn.eps).sqrt() * scale + shift).clamp(min=0)

    def point(y, module: ConvModule):
        return norm_relu(torch.einsum('oc,nchw->nohw', module.conv.weight[..., 0, 0], y), module.bn)

    pyramid = sum(
        norm_relu(F.conv2d(x, head.pyramid.conv.weight, padding=r, dilation=r), bn)
        for r, bn in zip((1, 2), head.pyramid.norms)
    )
    image = point(x.mean((2, 3), keepdim=True), head.image_pool[1]).expand(-1, -1, 5, 7)
    joined = torch.cat([pyramid, point(x, head.point), image], dim=1)
    feature = point(joined, head.bottleneck)
    weight, bias = head.conv_seg.weight[..., 0, 0], head.conv_seg.bias
    expected = torch.einsum('kc,nchw->nkhw', weight, feature) + bias.view(-1, 1, 1)
    torch.testing.assert_close(head([x]), expected, rtol=1e-12, atol=1e-12)


def test_the_decoder_works_at_the_size_of_the_first_level():
    head = build(c1_in_channels=5).eval()
    low = torch.randn(1, 5, 37, 23)
    assert head([low, torch.randn(1, 32, 10, 6)]).shape == (1, 3, 37, 23)
    # Without one there is nothing of it.
    assert not any(name.startswith(('c1_', 'sep_')) for name, _ in build().named_parameters())


def test_its_concatenations_are_seen_as_fusions():
    head = build(c1_in_channels=5)
    levels = [torch.randn(2, 5, 16, 16), torch.randn(2, 32, 4, 4)]
    found = {f.name: tuple(f.channels) for f in trace_fusions(head, levels)}
    assert found['bottleneck.conv'] == (8, 8, 8)
    assert found['sep_bottleneck.0.depthwise_conv.conv'] == (8, 48)


def test_batch_norm_on_one_pooled_image_is_explained():
    x = torch.randn(1, 32, 6, 6)
    head = build()
    with pytest.raises(ValueError, match=r'expected a batch of 2 or more, got 1') as raised:
        head([x])
    for key in ('train_dataloader.batch_size', 'norm_cfg', 'image_level=False'):
        assert key in str(raised.value)
    assert head.eval()([x]).shape == (1, 3, 6, 6)
    # Nothing that would work is refused.
    frozen = build()
    frozen.image_pool.eval()
    group = build(norm_cfg=dict(type='GN', num_groups=2))
    for able in (frozen, group, build(norm_cfg=None), build(image_level=False)):
        assert able([x]).shape == (1, 3, 6, 6)


def test_every_convolution_is_followed_by_norm_and_relu():
    """Section 2.2.2, the decoder's separable pairs too; the pyramid has a norm per rate."""
    head = build(c1_in_channels=5)
    modules = {n: m for n, m in head.named_modules() if isinstance(m, ConvModule)}
    convolutions = {n for n, m in head.named_modules() if isinstance(m, nn.Conv2d)}
    alone = convolutions - {f'{name}.conv' for name in modules}
    assert alone == {'conv_seg', 'pyramid.conv'}
    assert sum('sep_bottleneck' in name for name in modules) == 4
    for module in modules.values():
        assert isinstance(module.norm, nn.BatchNorm2d)
        assert isinstance(module.activate, nn.ReLU)


@pytest.mark.parametrize('wrong', [dict(c1_in_channels=-1), dict(c1_in_channels=4, c1_channels=0)])
def test_wrong_decoder(wrong):
    with pytest.raises(ValueError, match=r'c1_in_channels must be the channels of the level'):
        build(**wrong)


def test_wrong_rates_and_implementation():
    with pytest.raises(ValueError, match=r'dilations must be .* got \(\)'):
        build(dilations=())
    with pytest.raises(ValueError, match=r"implementation must be one of .*got 'fast'"):
        build(implementation='fast')
