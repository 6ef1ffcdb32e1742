"""tools/analysis_tools/predictions.py as a user runs it, on FusionShapes."""

from __future__ import annotations

import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.apis import inference_model
from mmseg.registry import MODELS

from mmseg_fusion.datasets.fusion_shapes import draw_scene

from .running import TOOLS, run, small_config

TOOL = TOOLS / 'analysis_tools' / 'predictions.py'


@pytest.mark.stack
def test_draws_and_says_what_each_model_has_right(tmp_path):
    config = small_config(tmp_path)
    cfg = Config.fromfile(config)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model).eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    with torch.no_grad():
        model.decode_head.conv_seg.bias[3] += 100
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'b.pth')

    found = run(
        TOOL, config, 'a.pth', config, 'b.pth', '--indices', 2, 0, '--names', 'first', 'second',
        '--out', 'new/picture.png', cwd=tmp_path,
    )  # fmt: skip
    assert (tmp_path / 'new' / 'picture.png').stat().st_size > 5000
    # The second model has class 3 everywhere.
    shares = re.findall(r'second ([\d.]+) %', found.stdout)
    model.cfg = cfg
    for share, index in zip(shares, (2, 0)):
        image, label = draw_scene(index, split='test', size=(64, 64))[:2]
        assert (inference_model(model, image).pred_sem_seg.data == 3).all()
        assert float(share) == pytest.approx(100 * (label[label != 255] == 3).mean(), abs=0.06)
    assert len(shares) == 2

    wrong = run(TOOL, config, 'a.pth', '--out', 'x.jpg', cwd=tmp_path, check=False)
    assert 'expected a file name in .png' in wrong.stderr
