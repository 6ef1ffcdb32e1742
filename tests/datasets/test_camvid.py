"""CamVid: the dataset class and its base config, on the real images where they are at hand."""

from __future__ import annotations

import copy

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmseg.registry import DATASETS

from mmseg_fusion.datasets import CamVidDataset

BASE = 'configs/_base_/datasets/camvid.py'
LOAD = [{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations'}]
PREFIX = {'img_path': 'img', 'seg_map_path': 'ann'}


def test_classes():
    classes, palette = CamVidDataset.METAINFO['classes'], CamVidDataset.METAINFO['palette']
    assert len(classes) == len(palette) == len({*map(tuple, palette)}) == 11
    # Order of the ids in the published label files.
    assert [classes.index(n) for n in ('Sky', 'Road', 'Car', 'Bicyclist')] == [0, 3, 8, 10]


@pytest.mark.stack
@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
def test_reads_pairs_and_leaves_ids_alone(tmp_path, suffix):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 12, (12, 16)).astype(np.uint8)
    label[label == 11] = 255
    for name in ('img', 'ann'):
        (tmp_path / name).mkdir()
    cv2.imwrite(str(tmp_path / f'img/a{suffix}'), rng.integers(0, 256, (12, 16, 3), np.uint8))
    cv2.imwrite(str(tmp_path / 'ann/a.png'), label)
    options = {} if suffix == '.jpg' else {'img_suffix': suffix}
    dataset = DATASETS.build(
        {
            'type': 'CamVidDataset',
            'data_root': str(tmp_path),
            'data_prefix': PREFIX,
            'pipeline': LOAD,
            **options,
        }
    )
    assert len(dataset) == 1
    np.testing.assert_array_equal(dataset[0]['gt_seg_map'], label)
    assert dataset[0]['img'].shape == (12, 16, 3)


@pytest.fixture
def base(camvid_root, repo_root):
    cfg = Config.fromfile(repo_root / BASE)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(camvid_root)
    return cfg


@pytest.mark.parametrize(('split', 'number'), [('train', 367), ('val', 101), ('test', 233)])
def test_published_split(base, split, number):
    dataset = DATASETS.build(base[f'{split}_dataloader'].dataset)
    assert len(dataset) == number
    sample = dataset[5]
    assert sample['inputs'].shape == (3, 360, 480)
    assert sample['data_samples'].gt_sem_seg.shape == (360, 480)
    assert set(np.unique(sample['data_samples'].gt_sem_seg.data)) <= {*range(11), 255}


def test_tta_pipeline(base):
    dataset = copy.deepcopy(base.test_dataloader.dataset)
    dataset.pipeline = base.tta_pipeline
    sample = DATASETS.build(dataset)[0]
    # Six scales, each with its mirror image.
    assert len(sample['inputs']) == 12
    assert {s.metainfo['flip'] for s in sample['data_samples']} == {True, False}


def test_sky_is_above_the_road(base):
    # In the mean of the real labels, so that the ids are in the order that the class names claim.
    dataset = DATASETS.build(base.val_dataloader.dataset)
    rows = {0: [], 3: []}
    for index in range(0, len(dataset), 10):
        label = dataset[index]['data_samples'].gt_sem_seg.data[0].numpy()
        for kind, found in rows.items():
            found.append(np.nonzero(label == kind)[0].mean() / label.shape[0])
    assert np.nanmean(rows[0]) < 0.35 < 0.6 < np.nanmean(rows[3])
