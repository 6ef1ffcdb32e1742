"""tools/analysis_tools/check_dataset.py: each kind of damage is found and named."""

from __future__ import annotations

import importlib.util
import re
import shutil

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from .running import TOOLS, run_again

TOOL = TOOLS / 'analysis_tools' / 'check_dataset.py'
CAMVID = 'configs/camvid/upernet_r18_1xb16-4k_camvid-360x480.py'
SHAPES = 'configs/fusion_shapes/upernet_r18_1xb4-1k_fusion-shapes-128x128.py'
SIZE = (36, 48)


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('check_dataset', TOOL)
    module = importlib.util.module_from_spec(spec)
    # Several processes unpickle its classes by this name.
    import sys

    sys.modules['check_dataset'] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules['check_dataset']


@pytest.fixture
def camvid(tmp_path):
    """Three good pairs per split in which every class occurs."""
    rng = np.random.default_rng(0)
    root = tmp_path / 'camvid'
    for split in ('train', 'val', 'test'):
        for kind in ('img_dir', 'ann_dir'):
            (root / kind / split).mkdir(parents=True)
        for name in 'abc':
            # Of its own per split and name: damage to one is none to another.
            image = rng.integers(0, 256, (*SIZE, 3), np.uint8)
            cv2.imwrite(str(root / f'img_dir/{split}/{name}.jpg'), image)
            label = np.resize([*range(11), 255], SIZE).astype(np.uint8)
            Image.fromarray(label).save(root / f'ann_dir/{split}/{name}.png')
    return root


@pytest.fixture
def check(tool, repo_root, camvid, capsys):
    """Runs the tool in this process; returns the exit status and what it printed."""

    def run_it(*arguments, root=camvid, options=(), config=CAMVID):
        roots = [f'{s}_dataloader.dataset.data_root={root}' for s in ('train', 'val', 'test')]
        argv = [str(repo_root / config), *arguments, '--cfg-options', *roots, *options]
        status = tool.main(argv)
        return status, capsys.readouterr().out

    return run_it


def rewrite(path, array):
    Image.fromarray(array).save(path)


@pytest.mark.parametrize('nproc', ['1', '2'])
def test_good_data(check, nproc):
    status, out = check('--nproc', nproc)
    assert status == 0
    assert '9 pairs read, 0 errors' in out
    # 12 ids in equal shares.
    assert re.search(r'0\s+\| Sky\s+\|\s+8\.33 % \|\s+3 \|', out)
    assert 'warning' not in out


def test_missing_label(check, camvid):
    path = camvid / 'ann_dir/train/b.png'
    path.unlink()
    status, out = check('--splits', 'train')
    assert status == 1
    assert f'train: missing label (1)\n  {path}: no such file' in out


def test_label_without_image(check, camvid):
    (camvid / 'img_dir/val/b.jpg').unlink()
    status, out = check()
    assert status == 1
    assert f'val: label without image (1)\n  {camvid}/ann_dir/val/b.png: no image *.jpg' in out


def test_missing_image(check, camvid, tmp_path):
    names = tmp_path / 'names.txt'
    names.write_text('a\nnosuch\n')
    status, out = check('--splits', 'train', options=[f'train_dataloader.dataset.ann_file={names}'])
    assert status == 1
    assert f'missing image (1)\n  {camvid}/img_dir/train/nosuch.jpg: no such file' in out
    # The list leaves out b and c on purpose.
    assert 'label without image' not in out


@pytest.mark.parametrize('suffix', ['.png', '.tif'])
@pytest.mark.parametrize('grey', [False, True])
def test_more_than_8_bits(check, camvid, suffix, grey):
    """mmcv's default flags keep 8 of 16 bits: said, and with the remedy nothing is left to say."""
    rng = np.random.default_rng(0)
    for name in 'abc':
        (camvid / f'img_dir/train/{name}.jpg').unlink()
        shape = SIZE if grey else (*SIZE, 3)
        image = rng.integers(0, 256, shape, np.uint8)
        if name == 'b':
            image = rng.integers(0, 4000, shape).astype(np.uint16)
            image[0, 0] = 4000
        cv2.imwrite(str(camvid / f'img_dir/train/{name}{suffix}'), image)
    options = [f'train_dataloader.dataset.img_suffix={suffix}']
    status, out = check('--splits', 'train', options=options)
    assert status == 0
    assert '3 pairs read, 0 errors' in out
    path = camvid / f'img_dir/train/b{suffix}'
    # 4000 / 256; OpenCV rounds in some formats.
    assert re.search(
        rf'warning: train: read as 8 bit \(1\)\n  {path}: holds uint16 up to 4000, read as uint8 '
        r"up to 1[56]; to keep it: dict\(type='LoadImageFromFile', color_type='unchanged'",
        out,
    )
    options += [
        'train_dataloader.dataset.pipeline.0.color_type=unchanged',
        'train_dataloader.dataset.pipeline.0.to_float32=True',
    ]
    status, out = check('--splits', 'train', options=options)
    assert status == 0
    assert 'read as 8 bit' not in out
    # A model for RGB does not take a grey image.
    assert ('warning: train: channels (3)' in out) is grey
    assert ('is read with 1 channels, but the model takes 3' in out) is grey


def test_mean_of_another_length(check):
    status, out = check(options=['model.data_preprocessor.mean=[1.0,2.0,3.0,4.0]'])
    assert status == 1
    assert 'config (1)\n  model.data_preprocessor.mean: model.data_preprocessor.mean has 4 v' in out
    assert 'warning: train: channels (3)' in out
    assert 'is read with 3 channels, but the model takes 4' in out


def test_a_tiff_of_many_channels(check, camvid):
    tifffile = pytest.importorskip('tifffile', reason='requirements/tests/pretrained.txt')
    for path in (camvid / 'img_dir/train').iterdir():
        image = np.zeros((*SIZE, 12), np.uint16)
        form = dict(photometric='minisblack', planarconfig='contig')
        tifffile.imwrite(path.with_suffix('.tif'), image, **form)
    status, out = check('--splits', 'train', options=['train_dataloader.dataset.img_suffix=.tif'])
    assert status == 1
    assert 'unreadable image (3)' in out
    assert 'OpenCV reads a TIFF of up to 4 channels: docs/data.md has a transform' in out


@pytest.mark.parametrize('kind', ['image', 'label'])
@pytest.mark.parametrize('damage', ['text', 'cut', 'empty'])
def test_unreadable(check, camvid, kind, damage):
    path = camvid / ('img_dir/train/a.jpg' if kind == 'image' else 'ann_dir/train/a.png')
    content = path.read_bytes()
    path.write_bytes({'text': b'<html>', 'cut': content[: len(content) // 2], 'empty': b''}[damage])
    status, out = check('--splits', 'train')
    assert status == 1
    assert f'unreadable {kind} (1)\n  {path}: ' in out


def test_sizes_differ(check, camvid):
    path = camvid / 'ann_dir/test/c.png'
    rewrite(path, np.zeros((20, 30), np.uint8))
    status, out = check()
    assert status == 1
    image = camvid / 'img_dir/test/c.jpg'
    expected = f'{path}: label is 20 x 30, image {image} is 36 x 48'
    assert f'test: sizes differ (1)\n  {expected}' in out


def test_ids_out_of_range(check, camvid):
    path = camvid / 'ann_dir/train/a.png'
    label = np.zeros(SIZE, np.uint8)
    label[0, :5] = 11
    label[1, :2] = 200
    rewrite(path, label)
    status, out = check()
    assert status == 1
    assert 'train: ids out of range (1)' in out
    assert f'{path}: 11 (5 pixels), 200 (2 pixels); expected 0..10 and 255' in out


def test_ids_that_wrap_at_256(check, camvid):
    path = camvid / 'ann_dir/train/a.png'
    rewrite(path, np.full(SIZE, 259, np.uint16))
    status, out = check('--splits', 'train')
    assert status == 1
    assert f'{path}: ValueError: ids up to 259' in out


def test_labels_that_count_from_one(check, camvid):
    for path in (camvid / 'ann_dir/train').iterdir():
        rewrite(path, np.resize(np.arange(1, 12, dtype=np.uint8), SIZE))
    status, out = check('--splits', 'train')
    assert status == 1
    assert '0 never occurs and 11 does' in out
    assert 'reduce_zero_label=True' in out
    status, out = check(
        '--splits', 'train', options=['train_dataloader.dataset.reduce_zero_label=True']
    )
    assert status == 0, out


def test_colour_label(check, camvid):
    path = camvid / 'ann_dir/val/a.png'
    rewrite(path, np.zeros((*SIZE, 3), np.uint8))
    status, out = check()
    assert status == 1
    assert f'{path}: expected one channel of class ids, but got shape (36, 48, 3)' in out


def test_class_that_never_occurs_is_a_warning(check, camvid):
    for path in (camvid / 'ann_dir/val').iterdir():
        label = np.array(Image.open(path))
        label[(label == 4) | (label == 7)] = 255
        rewrite(path, label)
    status, out = check()
    assert status == 0
    assert 'warning: val: never occurs: Pavement, Fence' in out


def test_wrong_root(check, tmp_path):
    status, out = check(root=tmp_path / 'nosuch')
    assert status == 1
    assert f'{tmp_path}/nosuch: no such folder; train_dataloader.dataset.data_root' in out
    assert '0 pairs read, 3 errors' in out


def test_wrong_folder_below_the_root(check, camvid):
    shutil.rmtree(camvid / 'img_dir/train')
    status, out = check()
    assert status == 1
    assert (
        f'{camvid}/img_dir/train: does not exist; set by '
        'train_dataloader.dataset.data_prefix.img_path'
    ) in out


def test_wrong_suffix(check, camvid):
    status, out = check('--splits', 'val', options=['val_dataloader.dataset.img_suffix=.tif'])
    assert status == 1
    assert f"{camvid}/img_dir/val: none ends with '.tif'; files there end with .jpg (3)" in out


def test_heads(check):
    status, out = check(
        options=['model.decode_head.num_classes=12', 'model.auxiliary_head.ignore_index=0']
    )
    assert status == 1
    assert 'model.decode_head.num_classes: is 12, but the data set has 11 classes' in out
    assert 'model.auxiliary_head.ignore_index: is 0, but the data set has 255' in out


def test_long_lists_are_cut(check, camvid):
    for path in (camvid / 'ann_dir/train').iterdir():
        path.unlink()
    status, out = check('--max-errors', '1')
    assert status == 1
    assert 'train: missing label (3)' in out
    assert out.count(': no such file') == 1
    assert '... and 2 more' in out
    assert '3 errors' in out


def test_wrappers_and_equal_splits(tool, repo_root, camvid, tmp_path, capsys):
    cfg = Config.fromfile(repo_root / CAMVID)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(camvid)
    cfg.train_dataloader.dataset = {
        'type': 'RepeatDataset',
        'times': 3,
        'dataset': {
            'type': 'ConcatDataset',
            'datasets': [cfg.train_dataloader.dataset, cfg.val_dataloader.dataset],
        },
    }
    cfg.test_dataloader = cfg.val_dataloader
    path = tmp_path / 'wrapped.py'
    cfg.dump(path)
    assert tool.main([str(path)]) == 0
    out = capsys.readouterr().out
    # The training set's second half, the validation and the test set are one.
    assert '6 pairs read, 0 errors' in out
    assert 'test: the same data set as train_dataloader.dataset.dataset.datasets.1' in out


@pytest.mark.stack
def test_data_without_files(repo_root, tmp_path):
    lengths = [f'{s}_dataloader.dataset.length=4' for s in ('train', 'val', 'test')]
    result = run_again(TOOL, repo_root / SHAPES, '--cfg-options', *lengths, cwd=tmp_path)
    assert '12 pairs read, 0 errors' in result.stdout
    assert '| broad stripes |' in result.stdout


def test_real_images(check, camvid_root):
    status, out = check('--splits', 'val', root=camvid_root)
    assert status == 0
    assert '101 pairs read, 0 errors' in out
