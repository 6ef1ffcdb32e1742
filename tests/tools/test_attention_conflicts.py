"""tools/analysis_tools/attention_conflicts.py as a user runs it."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import save_checkpoint
from mmseg.registry import DATASETS, MODELS
from PIL import Image

from mmseg_fusion.analysis.layer_features import ImageSet, image_files
from mmseg_fusion.datasets.fusion_shapes import FusionShapesDataset, draw_scene

from .running import ROOT, TOOLS, load_tool, run_again

TOOL = TOOLS / 'analysis_tools' / 'attention_conflicts.py'
COUNT = 4


def small_config(folder: Path, kind: str) -> Path:
    """A config of the study with a tiny head, and a checkpoint beside it whose answers differ."""
    base = ROOT / f'configs/fusion_shapes/{kind}_r18-d8_1xb4-1k_fusion-shapes-128x128.py'
    path = folder / f'{kind}.py'
    loader = (
        'dict(batch_size=1, num_workers=0, persistent_workers=False, '
        f"dataset=dict(size=(64, 64), length={COUNT}, split='val'))"
    )
    path.write_text(
        f'_base_ = {str(base)!r}\n'
        'model = dict(data_preprocessor=dict(size=(64, 64)), auxiliary_head=None,\n'
        '    decode_head=dict(channels=16, pam_channels=4))\n'
        f'val_dataloader = {loader}\ntest_dataloader = {loader}\n'
    )
    torch.manual_seed(0)
    # A fixture of the module runs before the tests' default scope is set.
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(Config.fromfile(path).model)
    for parameter in model.decode_head.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    # As the runner saves it.
    meta = dict(dataset_meta=FusionShapesDataset.METAINFO)
    save_checkpoint(dict(state_dict=model.state_dict(), meta=meta), str(path.with_suffix('.pth')))
    return path


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / 'attention_conflicts.csv').open(newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_config(tmp_path_factory.mktemp('parallel'), 'danet')


@pytest.fixture(scope='module')
def tool() -> ModuleType:
    return load_tool(TOOL)


@pytest.mark.stack
def test_validation_set(parallel: Path, tmp_path: Path) -> None:
    done = run_again(TOOL, parallel, parallel.with_suffix('.pth'), '--rows', 2, cwd=tmp_path)
    csv_path, png_path = (tmp_path / line for line in done.stdout.splitlines()[-2:])
    assert csv_path.parent == tmp_path / 'work_dirs' / 'danet' / 'attention_conflicts'
    rows = rows_of(csv_path.parent)
    assert [row['image'] for row in rows] == [f'{i:06d}.png' for i in range(COUNT)]
    assert any(float(row['disagree']) > 0 for row in rows)

    # The totals are those of the rows, weighted by pixels.
    pixels = np.array([int(row['pixels']) for row in rows])
    assert f'{COUNT} images, {pixels.sum()} labelled pixels' in done.stdout
    for name in ('disagree', 'lost', 'gained'):
        share = np.average([float(row[name]) for row in rows], weights=pixels)
        assert f'{name}: {share:.2f} %' in done.stdout
    right = np.average([float(row['prediction right']) for row in rows], weights=pixels)

    # The prediction is the one that the test tool measures.
    tested = run_again(TOOLS / 'test.py', parallel, parallel.with_suffix('.pth'), cwd=tmp_path)
    accuracy = re.search(r'aAcc: ([\d.]+)', tested.stdout + tested.stderr).group(1)
    assert float(accuracy) == pytest.approx(right, abs=0.006)

    picture = np.asarray(Image.open(png_path).convert('RGB'))
    colours = {tuple(c) for c in FusionShapesDataset.METAINFO['palette']}
    found = {tuple(c) for c in picture.reshape(-1, 3)[::7].tolist()}
    assert len(colours & found) >= 3
    assert picture.shape[1] > 1200


def test_files_give_the_numbers_of_the_data_set(
    parallel: Path, tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    for folder in ('images', 'labels'):
        (tmp_path / folder).mkdir()
    for index in range(COUNT):
        image, label = draw_scene(index, split='val', size=(64, 64))
        cv2.imwrite(str(tmp_path / 'images' / f'{index:06d}.png'), image)
        cv2.imwrite(str(tmp_path / 'labels' / f'{index:06d}.png'), label)
    checkpoint = str(parallel.with_suffix('.pth'))
    common = [str(parallel), checkpoint, '--device', 'cpu', '--rows', '1', '--out-dir']
    tool.main([*common, str(tmp_path / 'a')])
    images, labels = str(tmp_path / 'images'), str(tmp_path / 'labels')
    tool.main([*common, str(tmp_path / 'b'), '--images', images, '--labels', labels])
    assert rows_of(tmp_path / 'b') == rows_of(tmp_path / 'a')
    capsys.readouterr()

    # Without labels only the conflict is known, now on every pixel.
    one = str(tmp_path / 'images' / '000001.png')
    tool.main([*common, str(tmp_path / 'c'), '--images', one])
    (row,) = rows_of(tmp_path / 'c')
    assert (row['image'], row['pixels'], list(row)) == (
        '000001.png',
        str(64 * 64),
        ['image', 'pixels', 'disagree'],
    )
    said = capsys.readouterr().out
    assert '1 images, 4096 pixels' in said
    assert 'lost' not in said

    with pytest.raises(SystemExit, match='neither an image file nor a folder'):
        tool.main([*common, str(tmp_path / 'd'), '--images', str(tmp_path / 'none.png')])
    (tmp_path / 'labels' / '000002.png').unlink()
    with pytest.raises(SystemExit, match=r'no label for 1 of 4 images, .* 000002\.png'):
        tool.main([*common, str(tmp_path / 'd'), '--images', images, '--labels', labels])


def test_sequential(tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture) -> None:
    config = small_config(tmp_path, 'sequential-dual-attention')
    out = tmp_path / 'out'
    checkpoint = str(config.with_suffix('.pth'))
    tool.main([str(config), checkpoint, '--num-images', '2', '--out-dir', str(out)])
    rows = rows_of(out)
    # Evenly drawn: the first and the last.
    assert [row['image'] for row in rows] == ['000000.png', f'{COUNT - 1:06d}.png']
    assert 'spatial attention right' not in rows[0]
    for row in rows:
        assert row['lost'] == row['channel attention right, lost']
        assert float(row['lost']) + float(row['gained']) <= float(row['disagree']) + 1e-9
    assert 'channel attention is compared with the prediction' in capsys.readouterr().out


def test_labels_are_read_as_the_data_set_reads_them(tool: ModuleType, tmp_path: Path) -> None:
    """Zero reduced, custom classes: like an ADE20K data set with the same files."""
    (tmp_path / 'img').mkdir()
    (tmp_path / 'ann').mkdir()
    rng = np.random.default_rng(0)
    cv2.imwrite(str(tmp_path / 'img/a.jpg'), rng.integers(256, size=(8, 9, 3), dtype=np.uint8))
    cv2.imwrite(str(tmp_path / 'ann/a.png'), rng.integers(5, size=(8, 9), dtype=np.uint8))
    for more in ({}, {'metainfo': {'classes': ('sky', 'wall')}}):
        data = dict(
            type='ADE20KDataset',
            data_root=str(tmp_path),
            data_prefix=dict(img_path='img', seg_map_path='ann'),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', reduce_zero_label=True),
                dict(type='PackSegInputs'),
            ],
            **more,
        )
        cfg = Config(dict(val_dataloader=dict(dataset=data)))
        files = image_files([str(tmp_path / 'img')])
        labels = tool.labels_of(files, str(tmp_path / 'ann'))
        found = ImageSet(cfg, images=files, labels=labels)[0]
        expected = DATASETS.build(cfg.val_dataloader.dataset)[0]['data_samples'].gt_sem_seg.data
        assert torch.equal(found['data_samples'].gt_sem_seg.data, expected)
        assert expected.unique().numel() > 1


def test_wrong_input(tool: ModuleType, parallel: Path, tmp_path: Path) -> None:
    checkpoint = str(parallel.with_suffix('.pth'))
    with pytest.raises(SystemExit, match='is not a file'):
        tool.main(['configs/caa/danet_r19.py', checkpoint])
    with pytest.raises(SystemExit, match=r'checkpoint .* is not a file'):
        tool.main([str(parallel), str(tmp_path / 'none.pth')])
    upernet = ROOT / 'configs/fusion_shapes/upernet_r18_1xb4-1k_fusion-shapes-128x128.py'
    with pytest.raises(SystemExit, match='UPerHead has no logits of its attentions alone'):
        tool.main([str(upernet), checkpoint])
    danet = ROOT / 'configs/fusion_shapes/danet_r18-d8_1xb4-1k_fusion-shapes-128x128.py'
    with pytest.raises(SystemExit, match='does not fit the model of the config'):
        tool.main([str(danet), checkpoint])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--rows', '0'], '--rows must be at least 1, got 0'),
        (['--num-images', '-1'], '--num-images must be at least 1, got -1'),
        (['--labels', 'somewhere'], '--labels belongs to --images'),
    ],
)
def test_wrong_arguments(
    tool: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        tool.parse_args(['a.py', 'b.pth', *arguments])
    assert message in capsys.readouterr().err


def test_missing_images(tool: ModuleType, tmp_path: Path) -> None:
    config = tmp_path / 'camvid.py'
    base = ROOT / 'configs/camvid/danet_r18-d8_1xb16-4k_camvid-360x480.py'
    root = str(tmp_path / 'nowhere')
    config.write_text(
        f'_base_ = {str(base)!r}\nval_dataloader = dict(dataset=dict(data_root={root!r}))\n'
    )
    model = MODELS.build(Config.fromfile(config).model)
    save_checkpoint(dict(state_dict=model.state_dict()), str(tmp_path / 'a.pth'))
    with pytest.raises(SystemExit, match=r'data_root=FOLDER, or name images with --images'):
        tool.main([str(config), str(tmp_path / 'a.pth')])
