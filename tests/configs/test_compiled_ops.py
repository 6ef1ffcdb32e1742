"""Heads of MMSegmentation's that call operators of mmcv's, and FaPN on torchvision's operator.

What needs mmcv's compiled part runs where a full mmcv is: docs/compatibility.md says in which
environment that was.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmseg.models.decode_heads import cc_head
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.models.layers import ClassAwareConv, deform_conv

from ..models.layers.test_deform_conv import CASES, arguments
from ..models.segmentors.test_car_every_head import expected_row
from ..testers.every_head import ops_there
from ..testers.toys import toy_samples
from .files import ROOT
from .test_models import for_a_cpu

needs_ops = pytest.mark.skipif(not ops_there(), reason='this mmcv has no compiled operators')
CONTEXT = '4xb4-30k_pascal-context-59-513x513'
CROP = 64
#: The two lines of docs/methods/car.md.
TWO_LINES = """
custom_imports = dict(imports=['mmseg_fusion'], allow_failed_imports=False)
model = dict(type='CAREncoderDecoder', car=dict())
"""
#: A config of MMSegmentation's for each head that calls such an operator and trains on an image.
CONFIGS = {
    'CCHead': pytest.param(
        'CCHead',
        'ccnet/ccnet_r50-d8_4xb4-80k_ade20k-512x512.py',
        marks=pytest.mark.skipif(
            cc_head.CrissCrossAttention is None,
            reason='this mmseg takes criss-cross attention from a full mmcv alone',
        ),
    ),
    'PSAHead': pytest.param(
        'PSAHead', 'psanet/psanet_r50-d8_4xb4-80k_ade20k-512x512.py', marks=needs_ops
    ),
}


def step_and_test(cfg: Config) -> tuple[nn.Module, dict[str, float]]:
    """A model after one training step and a prediction, and the step's log.

    The loss is finite, every parameter has a finite gradient, and the prediction has the size of
    the image and labels of the classes.
    """
    cfg = Config(for_a_cpu(cfg.to_dict()))
    cfg.model.data_preprocessor.size = (CROP, CROP)
    model = MODELS.build(cfg.model)
    classes = model.decode_head.num_classes
    losses = model.loss(torch.randn(2, 3, CROP, CROP), toy_samples(classes, (CROP, CROP)))
    loss, log = model.parse_losses(losses)
    loss.backward()
    assert loss.isfinite()
    bad = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not bad
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    samples = toy_samples(classes, (CROP, CROP), batch=1)
    with torch.no_grad():
        (sample,) = model.eval().predict(torch.randn(1, 3, CROP, CROP), samples)
    assert sample.seg_logits.data.isfinite().all()
    predicted = sample.pred_sem_seg.data
    assert predicted.shape == (1, CROP, CROP)
    assert 0 <= predicted.min() <= predicted.max() < classes
    return model, log


@pytest.mark.stack
@pytest.mark.parametrize('lines', [pytest.param('', id='plain'), pytest.param(TWO_LINES, id='car')])
@pytest.mark.parametrize(('head', 'config'), CONFIGS.values(), ids=list(CONFIGS))
def test_heads_of_mmseg_on_operators(head: str, config: str, lines: str, tmp_path: Path) -> None:
    path = tmp_path / 'config.py'
    path.write_text(f"_base_ = 'mmseg::{config}'\n{lines}")
    model, log = step_and_test(Config.fromfile(path))
    assert type(model.decode_head).__name__ == head
    names = {f'decode.loss_car_{key}' for key in ('intra_c2p', 'inter_c2c', 'inter_c2p')}
    assert {key for key in log if 'car' in key} == (names if lines else set())
    if lines:
        found = [name.removeprefix('decode_head.') for name in model.car_layers]
        assert (', '.join(f'`{name}`' for name in found), '') == expected_row(head)
        assert all(isinstance(model.get_submodule(n), ClassAwareConv) for n in model.car_layers)


@pytest.mark.stack
@pytest.mark.parametrize('car', ['', '_car'])
@pytest.mark.skipif(
    cc_head.CrissCrossAttention is None,
    reason='this mmseg takes criss-cross attention from a full mmcv alone',
)
def test_ccnet_of_the_configs(car: str) -> None:
    step_and_test(Config.fromfile(ROOT / f'configs/car/ccnet_r50-d8{car}_{CONTEXT}.py'))


@pytest.mark.stack
@pytest.mark.parametrize('name', ['fapn_r50', 'hfgd-fapn_r50'])
@pytest.mark.skipif(
    'cpu' not in deform_conv.COMPILED, reason='no deform_conv2d of torchvision for this torch'
)
def test_fapn_of_the_configs_on_torchvision(name: str, monkeypatch) -> None:
    calls = []
    torchvision = deform_conv._torchvision

    def counted(*args):
        calls.append(args[0].shape)
        return torchvision(*args)

    monkeypatch.setattr(deform_conv, '_torchvision', counted)
    model, _ = step_and_test(Config.fromfile(ROOT / f'configs/hfgd/{name}_{CONTEXT}.py'))
    layers = [m for m in model.modules() if isinstance(m, deform_conv.ModulatedDeformConv2d)]
    # In the step and in the prediction.
    assert len(calls) == 2 * len(layers) > 0


@needs_ops
@pytest.mark.stack
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize(
    'implementation',
    ['pytorch', *(['torchvision'] if 'cpu' in deform_conv.COMPILED else [])],
)
def test_deformable_convolution_is_that_of_mmcv(case: str, implementation: str) -> None:
    from mmcv.ops import modulated_deform_conv2d as of_mmcv

    tensors, (stride, padding, dilation) = arguments(case)
    groups, deformable = CASES[case][2:4]
    ours, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    found = deform_conv.modulated_deform_conv2d(
        *ours, stride, padding, dilation, implementation=implementation
    )
    expected = of_mmcv(*theirs, stride, padding, dilation, groups, deformable)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(found.shape, dtype=found.dtype)
    for result in (found, expected):
        (result * weights).sum().backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
