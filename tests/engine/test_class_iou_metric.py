"""ClassIoUMetric against MMSegmentation's own numbers and a count by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS


def evaluate(kind: str, pairs, classes):
    metric = METRICS.build(dict(type=kind, iou_metrics=['mIoU']))
    metric.dataset_meta = dict(classes=classes)
    for predicted, label in pairs:
        sample = dict(
            pred_sem_seg=dict(data=torch.tensor(predicted)[None]),
            gt_sem_seg=dict(data=torch.tensor(label)[None]),
        )
        metric.process({}, [sample])
    return metric.evaluate(len(pairs))


def test_class_iou_by_hand():
    pairs = [
        ([[0, 0, 1], [1, 1, 0]], [[0, 1, 1], [1, 255, 0]]),
        ([[1, 1, 1], [0, 0, 0]], [[1, 1, 0], [0, 0, 0]]),
    ]
    found = evaluate('ClassIoUMetric', pairs, ('a', 'b', 'absent'))
    # a: hits 2 + 3, union 3 + 4; b: hits 2 + 2, union 3 + 3; 255 counts nowhere.
    assert found['IoU.a'] == pytest.approx(500 / 7)
    assert found['IoU.b'] == pytest.approx(400 / 6)
    assert np.isnan(found['IoU.absent'])
    plain = evaluate('IoUMetric', pairs, ('a', 'b', 'absent'))
    assert {k: v for k, v in found.items() if not k.startswith('IoU.')} == plain
    assert plain['mIoU'] == round((500 / 7 + 400 / 6) / 2, 2)


def test_without_miou_nothing_is_added():
    metric = METRICS.build(dict(type='ClassIoUMetric', iou_metrics=['mDice']))
    assert isinstance(metric, IoUMetric)
    metric.dataset_meta = dict(classes=('a',))
    sample = dict(
        pred_sem_seg=dict(data=torch.zeros(1, 2, 2).long()),
        gt_sem_seg=dict(data=torch.zeros(1, 2, 2).long()),
    )
    metric.process({}, [sample])
    assert not [k for k in metric.evaluate(1) if k.startswith('IoU.')]
