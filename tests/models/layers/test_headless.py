"""Decode heads without their classifier."""

from __future__ import annotations

import pytest
import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.models.layers.headless import build_headless, feature_of

from ...testers.toys import toy_features

BN = dict(type='BN')
CHANNELS, STRIDES = (8, 16, 32, 64), (4, 8, 16, 32)
ALL = dict(in_channels=list(CHANNELS), in_index=[0, 1, 2, 3])
DEFAULTS = dict(in_channels=64, in_index=3, channels=12, num_classes=5, norm_cfg=BN)
HEADS = {
    'PSPHead': dict(pool_scales=(1, 2)),
    'ASPPHead': dict(dilations=(1, 2)),
    'DepthwiseSeparableASPPHead': dict(dilations=(1, 2), c1_in_channels=8, c1_channels=4),
    'UPerHead': dict(pool_scales=(1, 2), **ALL),
    'SegformerHead': ALL,
    'FPNHead': dict(feature_strides=[4, 8, 16, 32], **ALL),
    'FCNHead': dict(num_convs=1),
    'KSACHead': dict(dilations=(1, 2)),
}


@pytest.mark.stack
@pytest.mark.parametrize('name', HEADS)
def test_features_are_those_that_the_head_would_classify(name: str) -> None:
    cfg = dict(type=name, **HEADS[name])
    whole = MODELS.build({**DEFAULTS, **cfg}).eval()
    head, channels = build_headless('Owner: key', cfg, **DEFAULTS)
    state = {k: v for k, v in whole.state_dict().items() if not k.startswith('conv_seg.')}
    # Strictly: all names stay, the classifier's are gone.
    head.load_state_dict(state, strict=True)
    seen = []
    whole.conv_seg.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    inputs = toy_features(CHANNELS, STRIDES, (64, 64))
    with torch.no_grad():
        logits = whole(inputs)
        feature, losses = feature_of('Owner: key', head.eval(), inputs)
        assert not losses
        assert torch.equal(feature, seen[0])
        assert torch.equal(whole.conv_seg(feature), logits)
    assert feature.shape[1] == channels == 12
    # In training nothing is dropped: that is for the head around it to do.
    assert not [m for m in head.modules() if isinstance(m, nn.Dropout2d)]


def test_every_weight_gets_a_gradient() -> None:
    head, _ = build_headless('Owner: key', dict(type='PSPHead', **HEADS['PSPHead']), **DEFAULTS)
    head(toy_features(CHANNELS, STRIDES, (64, 64))).square().sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_config_goes_before_defaults_and_stays_as_it_is() -> None:
    cfg = dict(type='FCNHead', channels=6, in_channels=8, in_index=0, num_convs=1)
    kept = dict(cfg)
    head, channels = build_headless('Owner: key', cfg, **DEFAULTS)
    assert (head.in_channels, head.in_index, head.channels, channels) == (8, 0, 6, 6)
    assert head.num_classes == 5
    assert cfg == kept


def test_initializes_without_its_classifier() -> None:
    cfg = dict(type='FCNHead', num_convs=1)
    head, _ = build_headless('Owner: key', cfg, **DEFAULTS, init_cfg=None)
    head.init_weights()
    assert isinstance(head.conv_seg, nn.Identity)


@pytest.mark.parametrize('cfg', ['PSPHead', None, dict(channels=3)])
def test_no_config_of_a_head(cfg) -> None:
    with pytest.raises(ValueError, match=r'Owner: key must be the config of a decode head.*got'):
        build_headless('Owner: key', cfg, **DEFAULTS)


@MODELS.register_module()
class WithoutClassifier(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()


def test_head_without_a_classifier() -> None:
    message = r'Owner: key must be a decode head that .*conv_seg, and WithoutClassifier is none'
    with pytest.raises(ValueError, match=message):
        build_headless('Owner: key', dict(type='WithoutClassifier'), **DEFAULTS)


@MODELS.register_module()
class TwoOutputs(BaseDecodeHead):
    def forward(self, inputs):
        x = self.cls_seg(self._transform_inputs(inputs))
        return x, x


def test_head_of_several_outputs() -> None:
    head, _ = build_headless('Owner: key', dict(type='TwoOutputs', channels=64), **DEFAULTS)
    message = r'Owner: key must be a decode head with one output, and TwoOutputs returned tuple'
    with pytest.raises(ValueError, match=message):
        feature_of('Owner: key', head, toy_features(CHANNELS, STRIDES, (64, 64)))
