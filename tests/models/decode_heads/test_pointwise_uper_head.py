"""UPerNet's head with a smaller convolution behind its pyramid pooling."""

from __future__ import annotations

import pytest
import torch
from mmseg.registry import MODELS

from tests.testers import HeadTester

from ...testers.toys import toy_features


class TestPointwiseUPerHead(HeadTester):
    head = dict(type='PointwiseUPerHead', pool_scales=(1, 2), in_index=[0, 1, 2, 3])
    stride = 4


def build(kind: str = 'PointwiseUPerHead', **changes):
    cfg = dict(type=kind, in_channels=[8, 16, 32, 64], in_index=[0, 1, 2, 3], channels=12)
    cfg.update(num_classes=5, pool_scales=(1, 2), norm_cfg=dict(type='BN'))
    return MODELS.build({**cfg, **changes})


@pytest.mark.stack
def test_is_mmsegs_head_but_for_one_kernel():
    usual, ours = build('UPerHead').eval(), build().eval()
    state = usual.state_dict()
    shapes = {k: v.shape for k, v in ours.state_dict().items()}
    changed = {k for k in state if shapes[k] != state[k].shape}
    assert shapes.keys() == state.keys()
    assert changed == {'bottleneck.conv.weight'}
    # A 3x3 kernel that is zero but in its middle is a 1x1 one.
    middle = state['bottleneck.conv.weight'][:, :, 1:2, 1:2].clone()
    state['bottleneck.conv.weight'].zero_()[:, :, 1:2, 1:2] = middle
    ours.load_state_dict({**state, 'bottleneck.conv.weight': middle})
    x = toy_features((8, 16, 32, 64), (4, 8, 16, 32), (64, 96))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), usual(x), rtol=1e-4, atol=1e-5)


def test_three_is_mmsegs():
    usual, ours = build('UPerHead').eval(), build(ppm_kernel_size=3).eval()
    ours.load_state_dict(usual.state_dict())
    x = toy_features((8, 16, 32, 64), (4, 8, 16, 32), (64, 64))
    with torch.no_grad():
        assert torch.equal(ours(x), usual(x))


@pytest.mark.parametrize('size', [0, 2, -1])
def test_size_of_the_kernel(size: int):
    with pytest.raises(ValueError, match=f'ppm_kernel_size must be odd and positive, got {size}'):
        build(ppm_kernel_size=size)
