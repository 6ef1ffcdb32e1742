"""tools/demo.py: what `make demo` runs, cut to seconds."""

from __future__ import annotations

import importlib.util
import json
import re

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.evaluation import IoUMetric

from mmseg_fusion.datasets import FusionShapesDataset

from .running import TOOLS, run_again, small_config

TOOL = TOOLS / 'demo.py'


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('demo', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_constant_miou_is_what_the_metric_says(tool):
    load = [{'type': 'LoadAnnotations'}, {'type': 'PackSegInputs'}]
    dataset = FusionShapesDataset(size=(64, 64), length=6, split='val', pipeline=load)
    labels = [dataset[i]['data_samples'].gt_sem_seg.data[0] for i in range(6)]
    scores = []
    for kind in range(8):
        metric = IoUMetric()
        metric.dataset_meta = dataset.metainfo
        for label in labels:
            sample = {
                'pred_sem_seg': {'data': torch.full_like(label, kind)},
                'gt_sem_seg': {'data': label},
            }
            metric.process({}, [sample])
        scores.append(metric.compute_metrics(metric.results)['mIoU'])
    best, score = tool.constant_miou(tool.count_labels(dataset))
    assert best == int(np.argmax(scores))
    # The metric rounds to two digits.
    assert score == pytest.approx(max(scores), abs=0.0051)


def test_classes_that_never_occur_do_not_count(tool):
    assert tool.constant_miou(np.array([0, 30, 10, 0])) == (1, 37.5)


def test_shorten_keeps_the_shape_of_the_schedule(tool):
    cfg = Config.fromfile(tool.CONFIG)
    tool.shorten(cfg, 100)
    warmup, poly = cfg.param_scheduler
    assert (warmup.begin, warmup.end, poly.begin, poly.end) == (0, 5, 5, 100)
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (100, 20)


def test_shorten_needs_iterations(tool):
    cfg = Config.fromfile(tool.CONFIG)
    cfg.train_cfg = {'type': 'EpochBasedTrainLoop', 'max_epochs': 3}
    with pytest.raises(SystemExit, match="got 'EpochBasedTrainLoop'"):
        tool.shorten(cfg, 100)


@pytest.mark.stack
def test_runs_draws_and_judges(tmp_path):
    config = small_config(tmp_path, hook=True)
    out = tmp_path / 'out'
    arguments = ['--config', config, '--iters', 5, '--work-dir', out, '--scenes', 2]
    result = run_again(TOOL, *arguments, cwd=tmp_path, check=False)
    # Five iterations teach nothing: the demo has to say so.
    assert result.returncode == 1, result.stderr[-3000:]
    assert 'FAILED: the model should reach 5 times the constant prediction' in result.stderr
    assert re.search(r"best constant prediction \('[a-z ]+' everywhere\): mIoU \d", result.stdout)
    for name in ('scenes.png', 'curves.png'):
        assert f'{out}/{name}' in result.stdout
        picture = cv2.imread(str(out / name))
        assert min(picture.shape[:2]) > 300
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    # One log per run, with what the curves show.
    (log,) = out.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum('loss' in line for line in lines) == 5
    assert sum('mIoU' in line for line in lines) >= 5


@pytest.mark.parametrize(('option', 'value'), [('--iters', '0'), ('--scenes', '-1')])
def test_bad_numbers(tool, capsys, option, value):
    with pytest.raises(SystemExit, match='2'):
        tool.main([option, value])
    assert f'{option} is at least 1, but got {value}' in capsys.readouterr().err


def test_unknown_config(tool):
    with pytest.raises(SystemExit, match=r"config 'nosuch\.py' is not a file"):
        tool.main(['--config', 'nosuch.py'])
