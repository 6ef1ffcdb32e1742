"""All backbones of this package on images that are not RGB, with and without pretrained weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.channels import adapt_stem, stem_channels
from mmseg_fusion.errors import CheckpointError
from mmseg_fusion.models import backbones

#: A small one of each. What a checkpoint calls the first convolution.
BACKBONES = {
    'AlignedXception': (dict(depth=41, out_indices=(0,)), 'stem.0.conv.weight'),
    'DilatedDenseNet': (
        dict(arch=dict(growth_rate=4, depths=[1, 1, 1, 1], init_channels=8)),
        'stem.0.weight',
    ),
    'DilatedEfficientNet': (dict(arch='b0', out_indices=(2,)), 'layers.0.conv.weight'),
    'ScaledEfficientNet': (dict(width=0.4, depth=0.5), 'layers.0.conv.weight'),
    'WiderResNet': (dict(depth=16, base_channels=4), 'mod1.conv1.weight'),
}


def build(name: str, in_channels: int, **more: object) -> nn.Module:
    options, _ = BACKBONES[name]
    backbone = MODELS.build(dict(type=name, in_channels=in_channels, **options, **more))
    backbone.init_weights()
    return backbone


def test_all_are_here() -> None:
    registered = {
        name
        for name, kind in MODELS.module_dict.items()
        if getattr(kind, '__module__', '').startswith('mmseg_fusion.models.backbones.')
    }
    assert registered == set(backbones.__all__) == BACKBONES.keys()


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('channels', [1, 3, 4, 12])
def test_levels_and_gradients(name: str, channels: int) -> None:
    backbone = build(name, channels)
    assert stem_channels(backbone) == channels
    image = torch.randn(2, channels, 64, 64, requires_grad=True)
    levels = backbone(image)
    expected = build(name, 3)(torch.randn(2, 3, 64, 64))
    assert [level.shape for level in levels] == [level.shape for level in expected]
    sum(level.square().sum() for level in levels).backward()
    for channel in image.grad.unbind(1):
        assert channel.any()


@pytest.mark.parametrize('name', BACKBONES)
def test_only_the_stem_differs(name: str) -> None:
    """The convolution is of the same kind, with the same stride and padding."""
    three, twelve = build(name, 3), build(name, 12)
    shapes = {k: v.shape for k, v in twelve.state_dict().items()}
    expected = {k: v.shape for k, v in three.state_dict().items()}
    stem = BACKBONES[name][1]
    expected[stem] = (expected[stem][0], 12, *expected[stem][2:])
    assert shapes == expected
    rgb = re.sub(r'(Conv2d\w*)\(12,', r'\1(3,', str(twelve), count=1)
    assert rgb == str(three)


@pytest.fixture(params=['plain', 'prefix'])
def form(request: pytest.FixtureRequest) -> str:
    """How a checkpoint names its weights: those of a backbone, or of a whole model."""
    return request.param


def checkpoint(name: str, channels: int, form: str, path: Path) -> tuple[dict, dict]:
    """Weights of a backbone, and the ``init_cfg`` that loads them."""
    torch.manual_seed(7)
    weights = build(name, channels).state_dict()
    prefix = 'backbone.' if form == 'prefix' else ''
    torch.save(dict(state_dict={prefix + k: v for k, v in weights.items()}), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    if prefix:
        init_cfg['prefix'] = 'backbone'
    return weights, init_cfg


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('channels', [1, 4, 12])
def test_pretrained_rgb(name: str, channels: int, form: str, tmp_path: Path) -> None:
    weights, init_cfg = checkpoint(name, 3, form, tmp_path / 'rgb.pth')
    log = tmp_path / 'log.txt'
    logger = MMLogger.get_instance(f'{name} {channels} {form}', log_file=str(log))
    found = build(name, channels, init_cfg=init_cfg).state_dict()
    stem = BACKBONES[name][1]
    for key, value in weights.items():
        expected = adapt_stem(value, channels) if key == stem else value
        assert torch.equal(found[key], expected), key
    for handler in logger.handlers:
        handler.flush()
    assert f'{stem} of the pretrained weights takes 3 channels' in log.read_text()


@pytest.mark.parametrize('name', BACKBONES)
def test_pretrained_for_others(name: str, form: str, tmp_path: Path) -> None:
    weights, init_cfg = checkpoint(name, 5, form, tmp_path / 'five.pth')
    found = build(name, 5, init_cfg=init_cfg).state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items())
    with pytest.raises(CheckpointError, match=r'takes 5 channels .*in_channels is 12'):
        build(name, 12, init_cfg=init_cfg)


def test_resnet_of_mmsegmentation_starts_at_random(tmp_path: Path) -> None:
    """What docs/data.md says about backbones that are not of this package."""
    resnet = dict(type='ResNetV1c', depth=18, norm_cfg=dict(type='BN'))
    path, log = tmp_path / 'rgb.pth', tmp_path / 'log.txt'
    rgb = MODELS.build(resnet)
    torch.save(dict(state_dict=rgb.state_dict()), path)
    logger = MMLogger.get_instance('resnet', log_file=str(log))
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    found = MODELS.build(dict(resnet, in_channels=4, init_cfg=init_cfg))
    before = found.stem[0].weight.detach().clone()
    found.init_weights()
    assert torch.equal(found.stem[0].weight, before)
    assert torch.equal(found.layer1[0].conv1.weight, rgb.layer1[0].conv1.weight)
    for handler in logger.handlers:
        handler.flush()
    assert 'size mismatch for stem.0.weight' in log.read_text()


@pytest.mark.parametrize('name', BACKBONES)
def test_a_checkpoint_of_the_whole_model_does_not_change(name: str) -> None:
    """Only pretrained weights do: the weights of another config's model do not fit."""
    with pytest.raises(RuntimeError, match='size mismatch for ' + BACKBONES[name][1]):
        build(name, 4).load_state_dict(build(name, 3).state_dict())


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('channels', [0, -1, 3.0, (3,)])
def test_no_number_of_channels(name: str, channels: object) -> None:
    with pytest.raises(ValueError, match=f'{name}: in_channels is .*change model.backbone.in_ch'):
        build(name, channels)
