"""docs/deploy.md: what it says is run, and gives what MMSegmentation gives."""

from __future__ import annotations

import runpy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_fusion import cli

from .tools.running import TOOLS, load_tool, small_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.py, a checkpoint of it and image.png, 64 x 64."""
    folder = tmp_path_factory.mktemp('deployed')
    cfg = cli.read_config(str(small_config(folder)))
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model)
    # Every label occurs: initial weights call nearly all pixels one class.
    model.decode_head.conv_seg.weight.data.normal_(std=1)
    names = [f'class number {n}' for n in range(8)]
    meta = dict(dataset_meta=dict(classes=names, palette=[[0, 0, n] for n in range(8)]))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / 'small.pth')
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    cv2.imwrite(str(folder / 'image.png'), cv2.resize(noise, (64, 64)))
    return folder


def expected(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and by how much the largest logit leads, through the model's own preprocessing."""
    cfg = cli.read_config(str(folder / 'small.py'))
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model).eval()
    model.load_state_dict(torch.load(folder / 'small.pth', weights_only=True)['state_dict'])
    picture = cv2.imread(str(folder / 'image.png'))
    sample = SegDataSample(
        metainfo=dict(ori_shape=(64, 64), img_shape=(64, 64), pad_shape=(64, 64))
    )
    with torch.no_grad():
        image = torch.from_numpy(picture.transpose(2, 0, 1).copy())
        (result,) = model.test_step(dict(inputs=[image], data_samples=[sample]))
    first, second = result.seg_logits.data.topk(2, dim=0).values
    return result.pred_sem_seg.data[0].numpy(), (first - second).numpy()


def test_the_program_for_onnxruntime(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    tool = load_tool(TOOLS / 'deployment' / 'export_onnx.py')
    tool.main(['small.py', 'small.pth', 'model.onnx', '--shape', '64', '64', '--argmax'])
    capsys.readouterr()
    runpy.run_path(str(ROOT / 'docs' / 'examples' / 'run_onnx.py'))
    labels = cv2.imread('labels.png', cv2.IMREAD_UNCHANGED)
    truth, lead = expected(trained)
    assert labels.shape == (64, 64)
    assert len(np.unique(labels)) > 2
    # It may be another label only where two logits are equal but for rounding.
    assert lead[labels != truth].max(initial=0) < 1e-3
    assert (labels != truth).mean() < 0.001
    shares = [float(line.split(': ')[1][:-2]) for line in capsys.readouterr().out.splitlines()]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))
    assert shares[0] == pytest.approx(100 * (truth == np.unique(truth)[0]).mean(), abs=0.2)


@pytest.mark.stack
def test_the_inferencer_takes_a_config_by_its_name(trained, monkeypatch):
    # The page's own lines, with another config and its own image.
    text = (ROOT / 'docs' / 'deploy.md').read_text(encoding='utf-8')
    code = text.partition('```python\n')[2].partition('```')[0]
    named = 'mmseg_fusion::camvid/upernet_lite0_1xb4-1k_camvid-180x240'
    assert named in code
    code = code.replace(named, 'mmseg_fusion::camvid/upernet_r18_1xb16-4k_camvid-360x480')
    monkeypatch.chdir(trained)
    cfg = cli.read_config('mmseg_fusion::camvid/upernet_r18_1xb16-4k_camvid-360x480')
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build({**cfg.model, 'pretrained': None})
    meta = dict(dataset_meta=dict(classes=['a'] * 11, palette=[[0, 0, 0]] * 11))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), 'camvid.pth')
    found: dict = {}
    exec(code.replace('work_dirs/upernet/iter_1000.pth', 'camvid.pth'), found)
    assert found['labels'].shape == (64, 64)
    assert 0 <= found['labels'].min() <= found['labels'].max() < 11
