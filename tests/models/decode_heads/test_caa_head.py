"""The head of channelized axial attention and its baselines."""

from __future__ import annotations

import copy

import pytest
import torch
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.analysis.counting import count_call
from mmseg_fusion.models.decode_heads.caa_head import with_authors_eps
from mmseg_fusion.models.layers import (
    AxialAttention,
    ChannelizedAxialAttention,
    ChannelizedSelfAttention,
    SelfAttention,
)
from tests.testers import HeadTester

SMALL = dict(
    type='CAAHead', attention_channels=12, qk_channels=4, gate_channels=6, gate_layers=2, in_index=1
)
KINDS = dict(
    channelized_axial=ChannelizedAxialAttention,
    axial=AxialAttention,
    axial_se=AxialAttention,
    channelized_self=ChannelizedSelfAttention,
    self=SelfAttention,
)


class TestCAAHead(HeadTester):
    head = SMALL
    stride = 8


class TestCAAHeadAlgorithm2(HeadTester):
    head = dict(SMALL, implementation='grouped', in_index=2)
    stride = 16


class TestCAAHeadSelfAttention(HeadTester):
    head = dict(SMALL, attention='channelized_self', image_level=False, in_index=2)
    stride = 16


class TestCAAHeadWithDecoder(HeadTester):
    head = dict(SMALL, c1_in_channels=8, c1_channels=6, attention='axial_se')
    stride = 4
    # The decoder's level is inputs[0], as in mmseg's DepthwiseSeparableASPPHead.
    ignored_keys = ('in_channels', 'in_index')

    def test_gradient_reaches_the_stride_4_level(self):
        head, inputs = self.build(), self.inputs((64, 64))
        inputs[0].requires_grad_()
        self.loss(head, inputs, (64, 64)).backward()
        assert inputs[0].grad.any()


def build(**changes):
    cfg = dict(SMALL, in_channels=8, in_index=0, num_classes=3, norm_cfg=dict(type='BN'))
    return MODELS.build({**copy.deepcopy(cfg), 'dropout_ratio': 0, **changes}).eval()


@pytest.mark.stack
@pytest.mark.parametrize('attention', KINDS)
def test_attentions_of_tables_3_1_to_3_3(attention):
    head = build(attention=attention)
    assert type(head.attention) is KINDS[attention]
    assert (head.squeeze_excitation is not None) == (attention == 'axial_se')
    x = torch.randn(2, 8, 6, 5, requires_grad=True)
    head.train()([x]).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


def test_the_parts_in_order():
    head, x = build(), torch.randn(2, 8, 6, 5)
    feature = head.out_conv(head.attention(head.in_conv(x)))
    image = head.image_pool[1](x.mean((2, 3), keepdim=True)).expand_as(feature)
    expected = head.conv_seg(head.bottleneck(torch.cat([feature, image], 1)))
    torch.testing.assert_close(head([x]), expected)
    bare = build(image_level=False)
    expected = bare.bottleneck(bare.out_conv(bare.attention(bare.in_conv(x))))
    torch.testing.assert_close(bare([x]), bare.conv_seg(expected))


def test_squeeze_and_excitation_scales_the_attended_feature():
    head, x = build(attention='axial_se', image_level=False), torch.randn(2, 8, 6, 5)
    y = head.attention(head.in_conv(x))
    first, second = (m for m in head.squeeze_excitation.modules() if isinstance(m, nn.Conv2d))
    scale = second(first(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
    expected = head.conv_seg(head.bottleneck(head.out_conv(y * scale)))
    torch.testing.assert_close(head([x]), expected)


def test_algorithm_2_loads_the_same_weights_and_gives_the_same_logits():
    head = build().double()
    x = [torch.randn(2, 8, 6, 5, dtype=torch.float64)]
    for attention in ('channelized_axial', 'channelized_self'):
        head = build(attention=attention).double()
        grouped = build(attention=attention, implementation='grouped').double()
        grouped.load_state_dict(head.state_dict(), strict=True)
        torch.testing.assert_close(grouped(x), head(x), rtol=1e-12, atol=1e-14)


def test_widths_and_multiply_adds_of_the_thesis():
    head = MODELS.build(
        dict(type='CAAHead', in_channels=2048, num_classes=59, norm_cfg=dict(type='BN'))
    )
    h, w = 5, 4
    p = h * w
    expected = p * (9 * 2048 * 512 + 512 * (2 * 64 + 512) + 512 * 512 + 1024 * 256 + 256 * 59)
    expected += 2048 * 512
    expected += p * (h + w) * (64 + 512)
    expected += (h + w) * (2 * 512 * 128 + 4 * 128 * 128)
    assert count_call(head, [torch.zeros(1, 2048, h, w)]).flops == expected


def test_the_gates_widths_and_the_groups_are_passed_on():
    head = build(qk_channels=5, gate_channels=7, gate_layers=3, implementation='grouped', groups=9)
    attention = head.attention
    assert attention.column_query_key.query.conv.out_channels == 5
    for axis in (attention.column_attention, attention.row_attention):
        widths = [m.out_features for m in axis.gate if isinstance(m, nn.Linear)]
        assert widths == [7, 7, 7, 12]
        assert (axis.implementation, axis.groups) == ('grouped', 9)
    assert build(attention='self', qk_channels=5).attention.query_key.query.conv.out_channels == 5


def test_squeeze_and_excitation_has_a_sixteenth_inside():
    head = build(attention='axial_se', attention_channels=512)
    convs = [m for m in head.squeeze_excitation.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(512, 32), (32, 512)]


def test_wrong_channels_of_the_input_are_explained():
    message = r'CAAHead: expected a feature \(N, 8, H, W\), got \(2, 9, 4, 4\).*in_channels'
    with pytest.raises(ValueError, match=message):
        build()([torch.zeros(2, 9, 4, 4)])


def test_batch_norm_on_one_pooled_image_is_explained():
    x = [torch.randn(1, 8, 6, 6)]
    head = build().train()
    with pytest.raises(ValueError, match=r'CAAHead: .*expected a batch of 2 or more') as raised:
        head(x)
    for key in ('train_dataloader.batch_size', 'norm_cfg', 'image_level=False'):
        assert key in str(raised.value)
    # Nothing that would work is refused.
    frozen = build().train()
    frozen.image_pool.eval()
    group = build(norm_cfg=dict(type='GN', num_groups=2)).train()
    for able in (build(), frozen, group, build(image_level=False).train()):
        assert able(x).shape == (1, 3, 6, 6)


def test_behind_joint_pyramid_upsampling():
    channels = (8, 16, 32)
    neck = MODELS.build(dict(type='JPU', in_channels=channels, mid_channels=6))
    head = build(in_channels=24, in_index=-1)
    levels = [torch.randn(2, c, s, s - 1) for c, s in zip(channels, (9, 5, 3))]
    logits = head(neck(levels))
    # Logits of stride 8 from a backbone of stride 32.
    assert logits.shape == (2, 3, 9, 8)


@pytest.mark.parametrize(
    ('given', 'eps'),
    [
        (dict(type='BN'), 1e-3),
        (dict(type='SyncBN', requires_grad=True), 1e-3),
        (dict(type='BN', eps=1e-5), 1e-5),
    ],
)
def test_batch_norms_have_the_authors_eps_unless_the_config_names_one(given, eps):
    kept = copy.deepcopy(given)
    head = build(norm_cfg=given, c1_in_channels=4)
    norms = [m for m in head.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {(m.eps, m.momentum) for m in norms} == {(eps, 0.1)}
    assert given == kept


def test_other_norms_keep_their_eps():
    group = dict(type='GN', num_groups=2)
    assert with_authors_eps(group) is group
    assert with_authors_eps(None) is None


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(attention='axail'), "attention must be one of .*'axial_se'.*got 'axail'"),
        (dict(implementation='loop'), "one of .*'grouped'.*got 'loop'"),
        (
            dict(implementation='loop', attention='self'),
            r"implementation must be one of .*got 'loop'; set decode_head.implementation",
        ),
        (
            dict(c1_in_channels=-1),
            'c1_in_channels must be the channels of the level at output stride 4',
        ),
        (dict(c1_in_channels=4, c1_channels=0), 'c1_channels positive; got .*c1_channels=0'),
        (dict(groups=0), 'groups of the attention must be at least 1, got 0'),
        (dict(gate_layers=0), 'gate_layers of the attention must be at least 1'),
    ],
)
def test_wrong_options_say_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
