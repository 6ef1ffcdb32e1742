"""What KSACHead and CAAHead share: one place, and the names that checkpoints have."""

from __future__ import annotations

import pytest
import torch
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.models.decode_heads.deeplab_parts import DeepLabParts

OWN = {
    'KSACHead': ['pyramid', 'point'],
    'CAAHead': ['in_conv', 'attention', 'out_conv'],
}
IMAGE_POOL = ['image_pool.1.conv.weight', 'image_pool.1.bn.weight', 'image_pool.1.bn.bias']
DECODER = [
    f'{layer}.{rest}.weight'
    for layer in (
        'c1_bottleneck',
        *(f'sep_bottleneck.{i}.{part}_conv' for i in (0, 1) for part in ('depthwise', 'pointwise')),
    )
    for rest in ('conv', 'bn')
]


def build(kind: str, **options) -> nn.Module:
    small = dict(channels=8, num_classes=3, norm_cfg=dict(type='BN'))
    if kind == 'CAAHead':
        small.update(attention_channels=8, qk_channels=4, gate_channels=4)
    return MODELS.build(dict(type=kind, in_channels=6, in_index=1, **small, **options))


def test_these_are_all_heads_with_the_parts() -> None:
    found = {
        cls.__name__ for cls in MODELS.module_dict.values()
        if isinstance(cls, type) and issubclass(cls, DeepLabParts)
    }  # fmt: skip
    assert found == OWN.keys()


@pytest.mark.parametrize('kind', OWN)
@pytest.mark.parametrize('image_level', [True, False])
@pytest.mark.parametrize('decoder', [True, False])
def test_names_of_a_checkpoint(kind: str, image_level: bool, decoder: bool) -> None:
    """In this order, which is that of an optimizer's state."""
    head = build(kind, image_level=image_level, c1_in_channels=4 if decoder else 0)
    names = [name.partition('.')[0] for name, _ in head.named_parameters()]
    expected = ['conv_seg', *OWN[kind]]
    expected += ['image_pool'] * image_level + ['bottleneck']
    expected += ['c1_bottleneck', 'sep_bottleneck'] * decoder
    assert list(dict.fromkeys(names)) == expected
    keys = list(head.state_dict())
    assert (set(IMAGE_POOL) <= set(keys)) == image_level
    assert [key for key in keys if key in DECODER] == DECODER * decoder


@pytest.mark.parametrize('kind', OWN)
def test_image_level_is_the_mean_everywhere(kind: str) -> None:
    head = build(kind).double().eval()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    part = torch.randn(2, 1, 5, 7, dtype=torch.float64)
    found = head._with_image_level([part], x)
    conv = head.image_pool[1]
    pooled = conv.activate(conv.norm(conv.conv(x.mean((2, 3), keepdim=True))))
    torch.testing.assert_close(found[:, :1], part)
    torch.testing.assert_close(found[:, 1:], pooled * torch.ones_like(part))
