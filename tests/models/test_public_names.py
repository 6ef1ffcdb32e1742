"""What configs and other projects may rely on: names, where they are, and that they register."""

from __future__ import annotations

import importlib

import pytest
from mmseg.registry import MODELS

import mmseg_fusion.models

NAMES = {
    'backbones': (
        'AlignedXception',
        'DilatedDenseNet',
        'DilatedEfficientNet',
        'ScaledEfficientNet',
        'WiderResNet',
    ),
    'decode_heads': (
        'CAAHead',
        'CPHead',
        'ContextAugmentedEncoder',
        'DenseASPPHead',
        'DetachedFCNHead',
        'ESegHead',
        'GFFHead',
        'HFGDHead',
        'KSACHead',
        'LinearASPPHead',
        'PointwiseUPerHead',
        'SAHead',
        'SemanticFPNHead',
        'SequentialDualAttentionHead',
        'USFPNHead',
        'batch_norm_after_upsampling',
    ),
    'losses': ('AffinityLoss', 'ClassAwareRegularization'),
    'necks': ('BiFPN', 'FaPN', 'GatedFullyFusion'),
    'segmentors': ('CARCascadeEncoderDecoder', 'CAREncoderDecoder'),
}
PLACES = [(folder, name) for folder, names in NAMES.items() for name in names]


@pytest.mark.stack
@pytest.mark.parametrize(('folder', 'name'), PLACES)
def test_registered_and_importable(folder: str, name: str) -> None:
    module = importlib.import_module(f'mmseg_fusion.models.{folder}')
    cls = getattr(module, name)
    assert cls in MODELS.module_dict.values()
    assert getattr(mmseg_fusion.models, name) is cls
    assert name in module.__all__


def test_none_is_forgotten() -> None:
    ours = {
        cls.__name__
        for cls in MODELS.module_dict.values()
        if cls.__module__.startswith('mmseg_fusion.models')
    }
    assert ours == {name for _, name in PLACES}
