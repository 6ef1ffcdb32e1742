"""The self-attention head."""

from __future__ import annotations

import pytest
import torch
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.analysis.counting import count_call
from tests.testers import HeadTester


class TestSAHead(HeadTester):
    head = dict(type='SAHead', qk_channels=4, in_index=2)
    stride = 16


class TestSAHeadWithAnotherLastConvolution(HeadTester):
    head = dict(type='SAHead', qk_channels=4, attention_channels=24, in_index=2)
    stride = 16


def test_width_of_the_last_convolution():
    head = build(channels=6, attention_channels=10)
    assert head.in_conv.conv.weight.shape[:2] == (10, 8)
    assert head.attention.value.conv.weight.shape[:2] == (10, 10)
    assert head.out_conv.conv.weight.shape[:2] == (6, 10)
    assert head.conv_seg.weight.shape[:2] == (3, 6)
    with pytest.raises(ValueError, match='attention_channels must be at least 1, got 0'):
        build(attention_channels=0)


def build(**changes):
    cfg = dict(type='SAHead', in_channels=8, channels=16, num_classes=3, dropout_ratio=0)
    return MODELS.build({**cfg, 'norm_cfg': dict(type='BN'), **changes}).eval()


@pytest.mark.stack
def test_is_convolution_plus_attention():
    head, x = build().double(), torch.randn(2, 8, 5, 3, dtype=torch.float64)
    nn.init.normal_(head.attention.query_key.key.conv.weight)
    y = head.in_conv(x)
    convs = (head.attention.query_key.query, head.attention.query_key.key, head.attention.value)
    for conv in convs:
        assert conv.conv.bias is not None
        assert not conv.with_norm
        assert not conv.with_activation
    query, key, value = (
        torch.einsum('oi,nip->nop', c.conv.weight[..., 0, 0], y.flatten(2)) + c.conv.bias[:, None]
        for c in convs
    )
    weights = torch.einsum('ncp,ncq->npq', query, key).softmax(-1)
    attended = torch.einsum('npq,ncq->ncp', weights, value).view_as(y)
    torch.testing.assert_close(head([x]), head.conv_seg(head.out_conv(y + attended)))


def test_widths_and_multiply_adds_of_the_thesis():
    head = build(in_channels=2048, channels=512, num_classes=59)
    attention = head.attention
    assert attention.query_key.query.conv.weight.shape == (64, 512, 1, 1)
    assert attention.query_key.key.conv.weight.shape == (64, 512, 1, 1)
    assert attention.value.conv.weight.shape == (512, 512, 1, 1)
    p = 6 * 7
    expected = p * (9 * 2048 * 512 + 512 * (64 + 64 + 512) + 9 * 512 * 512 + 512 * 59)
    expected += p * p * (64 + 512)
    assert count_call(head, [torch.zeros(1, 2048, 6, 7)]).flops == expected


def test_class_aware_regularization_replaces_the_last_convolution():
    # What feeds the classifier is one convolution by the name of out_conv.
    head = build()
    seen = {}
    head.out_conv.register_forward_hook(lambda m, x, y: seen.update(out=y))
    head.conv_seg.register_forward_pre_hook(lambda m, x: seen.update(into=x[0]))
    head([torch.randn(2, 8, 4, 4)])
    assert seen['into'] is seen['out']


def test_wrong_width_says_what_was_expected():
    with pytest.raises(ValueError, match='qk_channels of the attention must be at least 1, got 0'):
        build(qk_channels=0)
