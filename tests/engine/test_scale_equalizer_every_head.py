"""Scale equalization in a training step of every decode head that is registered."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import mmseg
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.models.decode_heads import cc_head, psa_head
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.fusions import EqualizationReport, equalize

from ..fusions.test_trace import StandInMask
from ..testers.every_head import CHANNELS, HEADS, UNBUILDABLE, model_config, registered_heads
from ..testers.toys import toy_samples

pytestmark = pytest.mark.filterwarnings('ignore')
PAGE = Path(__file__).parents[2] / 'docs' / 'methods' / 'scale_equalizer.md'
#: Heads that stand on MMDetection's, and a config of each that MMSegmentation has.
DETECTION = {
    'MaskFormerHead': 'maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512.py',
    'Mask2FormerHead': 'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
}
SMALL = dict(
    embed_dims=16, feat_channels=16, out_channels=16, feedforward_channels=32, num_heads=2,
    num_feats=8, num_layers=1, num_queries=4, num_groups=2, num_classes=5, num_points=4,
    in_channels=list(CHANNELS), class_weight=[1.0] * 6,
)  # fmt: skip
#: Options with which a head concatenates.
CONCATENATING = {
    'DPTHead': dict(readout_type='project'),
    'DepthwiseSeparableFCNHead': dict(concat_input=True),
    'DetachedFCNHead': dict(concat_input=True),
    'EncHead': dict(add_lateral=True, in_channels=list(CHANNELS), in_index=[0, 1, 2, 3]),
    'FCNHead': dict(concat_input=True),
    'STDCHead': dict(concat_input=True),
}
#: Runs behind the image encoder of CLIP, which is no part of a small model.
CLIP = 'SideAdapterCLIPHead'


def shrink(cfg: dict) -> dict:
    """The same head with few channels and layers."""
    for key, value in cfg.items():
        if key in SMALL:
            cfg[key] = SMALL[key]
        elif isinstance(value, dict):
            shrink(value)
    return cfg


def build(name: str) -> nn.Module:
    cfg = model_config(name, **CONCATENATING.get(name, {}))
    if name in DETECTION:
        configs = Path(mmseg.__file__).parent / '.mim' / 'configs'
        cfg['decode_head'] = shrink(Config.fromfile(configs / DETECTION[name]).model.decode_head)
    if name == 'PointHead':
        sampled = dict(num_points=16, oversample_ratio=3, importance_sample_ratio=0.75)
        cfg['train_cfg'] = ConfigDict(sampled)
    with DefaultScope.overwrite_default_scope('mmseg'):
        return MODELS.build(cfg).train()


def equalized(name: str) -> EqualizationReport:
    """What is seen and done in a training step of a model with this head."""
    # LRASPPHead pools over 49 x 49 cells.
    size = (512, 512) if name == 'LRASPPHead' else (64, 64)
    samples = toy_samples(5, size)
    for sample in samples:  # PIDHead, VPDDepthHead
        sample.gt_edge_map = PixelData(data=torch.randint(2, (1, *size)))
        sample.gt_depth_map = PixelData(data=torch.rand(1, *size))
    return equalize(build(name), [torch.randn(2, 3, *size)], lambda m, x: m.loss(x, samples))


def row(report: EqualizationReport) -> tuple[str, str]:
    """A row of the page's table: layers with the number of branches, and what is left alone."""
    layers, left = [], []
    for plan in report.layers:
        name = plan['name'].removeprefix('decode_head.')
        layers.append(f'`{name}` ({len(plan["channels"])})')
        if plan['reason']:
            left.append(f'`{name}`: {plan["reason"].split(":")[0]}')
        else:
            left += [
                f'branch {i} of `{name}`: constant' for i, std in enumerate(plan['std']) if not std
            ]
    assert not report.lost
    return ', '.join(layers) or 'none', ', '.join(left)


def table() -> dict[str, tuple[str, str]]:
    text = PAGE.read_text(encoding='utf-8').split('<!-- every head -->')[1]
    rows = re.findall(r'^\| (`.*?) \| (.*?) \| ?(.*?) \|$', text, re.MULTILINE)
    return {n: (found, left) for ns, found, left in rows for n in re.findall(r'`(\w+)`', ns)}


@pytest.mark.stack
def test_every_registered_head_is_in_the_table() -> None:
    assert sorted(table()) == registered_heads()


@pytest.mark.stack
@pytest.mark.parametrize('name', sorted(HEADS.keys() - {CLIP}))
def test_what_is_found_in_a_training_step(name: str, monkeypatch) -> None:
    if name in DETECTION and importlib.util.find_spec('mmdet') is None:
        # tests/engine/test_scale_equalizer_queries.py has a head of the same make.
        with pytest.raises(UNBUILDABLE[name].error):
            MODELS.build(model_config(name))
        return
    if name in ('CCHead', 'PointHead') and cc_head.CrissCrossAttention is None:
        # onedl-mmsegmentation has no Python part of its ops without the compiled one, and says so.
        with pytest.raises(RuntimeError, match='install'):
            build(name)
        return
    # A compiled op.
    monkeypatch.setattr(psa_head, 'PSAMask', StandInMask)
    torch.manual_seed(0)
    report = equalized(name)
    assert row(report) == table()[name]
    after = [branch.after for branch in report.branches if branch.done]
    assert after == pytest.approx([1.0] * len(after), rel=0.01)
