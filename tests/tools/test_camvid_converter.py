"""tools/dataset_converters/camvid.py on a small copy of the SegNet layout."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from mmseg.registry import DATASETS
from PIL import Image

from .running import TOOLS, run, run_again

TOOL = TOOLS / 'dataset_converters' / 'camvid.py'
SIZE = (36, 48)


@pytest.fixture
def segnet(tmp_path):
    """Two pairs per split; ids 0..10, and 11 for unlabelled."""
    rng = np.random.default_rng(0)
    root = tmp_path / 'CamVid'
    for split in ('train', 'val', 'test'):
        for folder in (split, f'{split}annot'):
            (root / folder).mkdir(parents=True)
        for name in ('a.png', 'b.png'):
            # Smooth, so that JPEG keeps it.
            image = cv2.resize(rng.integers(0, 256, (3, 4, 3), np.uint8), SIZE[::-1])
            cv2.imwrite(str(root / split / name), image)
            label = rng.integers(0, 12, SIZE).astype(np.uint8)
            Image.fromarray(label).save(root / f'{split}annot' / name)
    return root


def build(root, split, **options):
    return DATASETS.build(
        {
            'type': 'CamVidDataset',
            'data_root': str(root),
            'data_prefix': {'img_path': f'img_dir/{split}', 'seg_map_path': f'ann_dir/{split}'},
            'pipeline': [{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations'}],
            **options,
        }
    )


@pytest.mark.parametrize('options', [[], ['--nproc', 2], ['--keep-png']])
def test_converts(segnet, tmp_path, options):
    out = tmp_path / 'camvid'
    start = run_again if options else run
    result = start(TOOL, segnet, '--out-dir', out, *options, cwd=tmp_path)
    assert 'train: 2 pairs (the published split has 367)' in result.stdout
    keep = '--keep-png' in options
    for split in ('train', 'val', 'test'):
        dataset = build(out, split, img_suffix='.png' if keep else '.jpg')
        assert len(dataset) == 2
        for sample, name in zip(dataset, ('a.png', 'b.png')):
            before = np.array(Image.open(segnet / f'{split}annot' / name))
            after = sample['gt_seg_map']
            np.testing.assert_array_equal(after, np.where(before == 11, 255, before))
            image = cv2.imread(str(segnet / split / name)).astype(int)
            assert np.abs(sample['img'] - image).mean() <= (0 if keep else 4)


def test_says_what_is_wrong_with_which_file(segnet, tmp_path):
    (segnet / 'train' / 'a.png').unlink()
    (segnet / 'valannot' / 'b.png').unlink()
    (segnet / 'test' / 'a.png').write_bytes(b'not an image')
    Image.fromarray(np.full(SIZE, 12, np.uint8)).save(segnet / 'trainannot' / 'b.png')
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(segnet / 'valannot' / 'a.png')
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(segnet / 'testannot' / 'b.png')
    out = tmp_path / 'camvid'
    result = run_again(TOOL, segnet, '--out-dir', out, cwd=tmp_path, check=False)
    assert result.returncode == 1
    for line in (
        f'{segnet}/trainannot/a.png: no image',
        f'{segnet}/val/b.png: no label',
        f'{segnet}/test/a.png: cannot be read',
        f'{segnet}/trainannot/b.png: ids 12 ({SIZE[0] * SIZE[1]} pixels); expected 0..10 and 11',
        f'{segnet}/valannot/a.png: is (5, 6), but its image',
        f'{segnet}/testannot/b.png: expected one channel',
    ):
        assert line in result.stderr
    assert '6 problems' in result.stderr
    assert not list(out.rglob('*.jpg'))


def test_wrong_folder(tmp_path):
    result = run_again(TOOL, tmp_path / 'nothing', cwd=tmp_path, check=False)
    assert result.returncode == 1
    assert f'{tmp_path}/nothing/trainannot: no such folder' in result.stderr


def test_bad_quality(segnet, tmp_path):
    result = run_again(TOOL, segnet, '--jpeg-quality', 0, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert '--jpeg-quality is 1 to 100, but got 0' in result.stderr
