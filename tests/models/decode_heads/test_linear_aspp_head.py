"""ASPP of the released GFF model: its last convolution is alone."""

from __future__ import annotations

import pytest
import torch
from mmseg.registry import MODELS
from torch import nn

from ...testers import HeadTester

CFG = dict(in_channels=6, in_index=0, channels=8, num_classes=3, dilations=(1, 2))


class TestLinearASPPHead(HeadTester):
    head = dict(type='LinearASPPHead', dilations=(1, 2), in_index=3)


@pytest.mark.parametrize('norm', ['BN', None])
def test_aspp_head_up_to_the_last_convolution(norm: str | None) -> None:
    norm_cfg = norm and dict(type=norm)
    head, whole = (
        MODELS.build(dict(CFG, type=kind, norm_cfg=norm_cfg)).eval()
        for kind in ('LinearASPPHead', 'ASPPHead')
    )
    assert [type(m) for m in head.bottleneck.modules() if not list(m.children())] == [nn.Conv2d]
    assert head.bottleneck.conv.bias is None
    state = head.state_dict()
    found = whole.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert all('bottleneck' in key for key in found.missing_keys)
    x = torch.randn(2, 6, 7, 9)
    seen = []
    whole.bottleneck.conv.register_forward_hook(lambda m, x, y: seen.append(y.clone()))
    with torch.no_grad():
        feature = head._forward_feature([x])
        whole([x])
        if norm is None:
            # ConvModule gives a convolution without norm a bias.
            seen[0] -= whole.bottleneck.conv.bias[:, None, None]
        torch.testing.assert_close(feature, seen[0])
    assert (feature < 0).any()
