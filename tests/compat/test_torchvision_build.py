"""torchvision beside another build of torch."""

from __future__ import annotations

import sys

import pytest
import torch
from mmseg.registry import MODELS

from mmseg_fusion import compat

from .running import MET


@pytest.mark.stack
@pytest.mark.parametrize(
    'backbone',
    [
        dict(type='mmpretrain.EfficientNet', arch='b0'),
        dict(type='mmpretrain.ConvNeXt', arch='tiny', gap_before_final_norm=False),
    ],
    ids=lambda backbone: backbone['type'],
)
def test_backbones_of_mmpretrain_build_and_run(backbone):
    import mmpretrain.models  # noqa: F401  (registers them)

    model = MODELS.build(backbone)
    model.eval()
    with torch.no_grad():
        features = model(torch.rand(1, 3, 32, 32))
    assert torch.isfinite(features[-1]).all()


@pytest.mark.stack
def test_an_op_of_torchvision_works_or_says_what_does_not_match():
    import torchvision

    boxes, scores = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9]]), torch.ones(2)
    if 'torchvision_build_mismatch' not in MET:
        assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [0]
        return
    with pytest.raises(RuntimeError, match='torchvision versions are incompatible'):
        torchvision.ops.nms(boxes, scores, 0.5)
    wanted = r"op 'nms' is not available: torchvision \S+ does not match torch .* Install"
    with pytest.raises(RuntimeError, match=wanted):
        torch.ops.torchvision.nms(boxes, scores, 0.5)


@pytest.mark.parametrize('name', ['_C.so', '_C.pyd', '_C_stable.so', '_C_of_tomorrow.so'])
def test_a_torchvision_that_loads_is_left_alone(name, monkeypatch, tmp_path):
    package = tmp_path / 'torchvision'
    package.mkdir()
    for file in ('__init__.py', 'image.so', 'image_stable.so', name):
        (package / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'torchvision', raising=False)
    loaded = []
    monkeypatch.setattr(torch.ops, 'load_library', loaded.append)
    assert compat.torchvision_build_mismatch() is None
    assert loaded == [str(package / name)]


@pytest.mark.stack
def test_the_installed_torchvision_has_a_library_that_is_found():
    assert compat.torchvision_build._torchvision_binaries()
