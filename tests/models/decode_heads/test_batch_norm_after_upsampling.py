"""The naive alternative of section 3.2: conv - ReLU - upsampling - batch norm."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmseg.models.decode_heads import UPerHead
from mmseg.registry import MODELS

from mmseg_fusion.fusions import trace_fusions

pytestmark = pytest.mark.filterwarnings('ignore')
HEAD = dict(
    type='UPerHead',
    in_channels=[4, 8, 16],
    in_index=[0, 1, 2],
    pool_scales=(1, 2),
    channels=6,
    num_classes=3,
    dropout_ratio=0,
    norm_cfg=dict(type='BN'),
)
LAYERS = ['fpn_bottleneck.conv']
BRANCHES = ['fpn_convs.0', 'fpn_convs.1', 'bottleneck']


def build(**changes):
    options = {**HEAD, **dict(head='UPerHead', layers=LAYERS, branches=BRANCHES), **changes}
    return MODELS.build({**copy.deepcopy(options), 'type': 'BatchNormAfterUpsampling'})


def pyramid(batch=3):
    return [torch.randn(batch, c, s, s + 1) for c, s in ((4, 16), (8, 8), (16, 4))]


def test_is_the_head_itself():
    head = build()
    assert isinstance(head, UPerHead)
    assert head(pyramid()).shape == (3, 3, 16, 17)


def test_fusion_takes_branches_normalized_after_upsampling():
    head, seen = build(), {}
    conv = head.fpn_bottleneck.conv
    conv.input_norm.register_forward_hook(lambda m, x, y: seen.update(raw=x[0], out=y))
    x = pyramid()
    (fusion,) = [f for f in trace_fusions(head, x) if f.name == LAYERS[0]]
    head(x)
    assert fusion.channels == (6, 6, 6)
    # Naively, branch by branch and channel by channel.
    for raw, out in zip(fusion.split(seen['raw']), fusion.split(seen['out'])):
        mean = raw.mean((0, 2, 3), keepdim=True)
        var = raw.var((0, 2, 3), correction=0, keepdim=True)
        torch.testing.assert_close(out, (raw - mean) / (var + 1e-5).sqrt(), rtol=1e-4, atol=1e-5)


def test_norm_moves_from_the_branches():
    head = build()
    for name in BRANCHES:
        module = head.get_submodule(name)
        assert not [k for k in module.state_dict() if k.startswith('bn')]
        x = torch.randn(2, module.conv.in_channels, 5, 5)
        torch.testing.assert_close(module(x), F.relu(module.conv(x)))
        assert module.conv.bias is not None
    added = build().state_dict().keys() - MODELS.build(HEAD).state_dict().keys()
    assert {k for k in added if 'input_norm' in k}
    assert isinstance(head.lateral_convs[0], ConvModule)
    assert head.lateral_convs[0].with_norm


def test_every_parameter_learns_and_state_loads_strictly():
    head = build()
    head(pyramid()).square().mean().backward()
    missing = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    other = build()
    other.load_state_dict(head.state_dict(), strict=True)
    x = pyramid(1)
    torch.testing.assert_close(other.eval()(x), head.eval()(x))


def test_sync_bn_of_the_config():
    head = build(norm_cfg=dict(type='SyncBN', requires_grad=True))
    assert isinstance(head.fpn_bottleneck.conv.input_norm, torch.nn.SyncBatchNorm)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(layers=['fpn_bottleneck']), 'no Conv2d of UPerHead; candidates: .*fpn_bottleneck.c'),
        (dict(branches=['nothing']), 'no ConvModule of UPerHead; candidates: .*fpn_convs.0'),
        (dict(norm_cfg=None, branches=[]), 'norm_cfg=None'),
        (dict(head=HEAD), 'name of a head'),
    ],
)
def test_bad_names(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
