"""tools/analysis_tools/feature_umap.py as a user runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmseg_fusion.datasets import FusionShapesDataset

from .running import TOOLS, load_tool, run_again
from .test_class_dependency import complaint, config_and_checkpoint

pytestmark = pytest.mark.filterwarnings('ignore')
TOOL = TOOLS / 'analysis_tools' / 'feature_umap.py'


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> tuple[Path, Path]:
    return config_and_checkpoint(tmp_path_factory.mktemp('small'))


@pytest.mark.stack
def test_two_models_side_by_side(small, tmp_path):
    done = run_again(
        TOOL, *small, small[0], 'none', '--names', 'first', 'second', '--embedding', 'pca',
        '--layer', 'auto', 'decode_head.psp_modules', '--device', 'cpu',
        '--json', tmp_path / 'a.json', cwd=tmp_path,
    )  # fmt: skip
    assert 'first: input of decode_head.conv_seg' in done.stdout
    saved = json.loads((tmp_path / 'a.json').read_text())
    first, second = saved['models']
    assert first['channels'] == 16
    assert second['channels'] == 64
    points = np.array(first['points'])
    assert points.shape == (len(saved['labels']), 2)
    np.testing.assert_allclose(points.mean(0), 0, atol=1e-4)
    # Three scenes of 64 x 64 on the grid of 2 x 2 that the pyramid takes.
    assert len(saved['labels']) <= 12
    for entry in saved['models']:
        assert f'{entry["silhouette"]:.4f}' in done.stdout
        assert f'{entry["within_between"]:.4f}' in done.stdout
    path = tmp_path / 'work_dirs' / 'small' / 'feature_umap' / 'feature_pca.png'
    with Image.open(path) as image:
        assert image.width > 1.3 * image.height


def test_classes_pixels_and_seed(small, tmp_path):
    def saved(*arguments):
        options = ['--embedding', 'pca', '--device', 'cpu']
        files = ['--out', tmp_path / 'a.png', '--json', tmp_path / 'a.json']
        load_tool(TOOL).main([*map(str, [*small, *options, *files, *arguments])])
        return json.loads((tmp_path / 'a.json').read_text())

    classes = FusionShapesDataset.METAINFO['classes']
    few = saved('--classes', classes[2], '0', '--pixels-per-class', 9)
    assert few['classes'] == [classes[2], classes[0]]
    assert few['labels'] == [classes[2]] * 9 + [classes[0]] * 9
    # Three images, three pixels of each.
    images = np.array(few['pixels'])[:, 0]
    assert [np.bincount(images[i : i + 9]).tolist() for i in (0, 9)] == [[3, 3, 3]] * 2
    again = saved('--classes', classes[2], '0', '--pixels-per-class', 9)
    assert again == few
    other = saved('--classes', classes[2], '0', '--pixels-per-class', 9, '--seed', 1)
    assert other['pixels'] != few['pixels']
    one = saved('--num-samples', 1)
    assert len(one['images']) == 1
    # No more pixels than its map has cells.
    names, counts = np.unique(one['labels'], return_counts=True)
    assert len(names) == len(one['classes']) <= 8
    assert counts.sum() <= 256


def test_absent_classes_are_named(small, tmp_path, capsys):
    folder = tmp_path / 'images'
    labels = tmp_path / 'labels'
    folder.mkdir()
    labels.mkdir()
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / 'a.png')
    Image.fromarray(random.integers(0, 2, (64, 64)).astype(np.uint8)).save(labels / 'a.png')
    options = ['--images', folder, '--ann-dir', labels, '--embedding', 'pca', '--device', 'cpu']
    arguments = [*map(str, [*small, *options, '--out', tmp_path / 'a.svg'])]
    load_tool(TOOL).main([*arguments, '--classes', '0', '1', '5'])
    words = capsys.readouterr().out
    assert f'absent: {FusionShapesDataset.METAINFO["classes"][5]}' in words
    assert (tmp_path / 'a.svg').is_file()
    words = complaint(TOOL, [*arguments, '--classes', '5', '6'], capsys)
    assert '0 labelled pixels' in words
    assert '--num-samples' in words


def test_without_umap_nothing_is_run(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'umap', None)
    # Not even the config is read.
    words = complaint(TOOL, ['nowhere.py', 'none'], capsys)
    assert "pip install 'mmseg-fusion[umap]'" in words


def test_umap_itself(small, tmp_path):
    """Runs where ``mmseg-fusion[umap]`` is installed."""
    pytest.importorskip('umap')
    run_again(TOOL, *small, '--json', 'a.json', '--out', 'a.png', '--device', 'cpu', cwd=tmp_path)
    saved = json.loads((tmp_path / 'a.json').read_text())
    assert saved['embedding'] == 'umap'
    assert np.isfinite(saved['models'][0]['points']).all()
    with Image.open(tmp_path / 'a.png') as image:
        assert image.width > 500


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['{config}'], 'pairs of CONFIG CHECKPOINT'),
        (['{config}', 'none', '--classes', 'feild'], 'Did you mean field?'),
        (['{config}', 'none', '--classes', '8'], 'from 0 to 7'),
        (['{config}', 'none', '--layer', 'conv_seg'], 'decode_head.conv_seg'),
        (['{config}', 'nowhere.pth'], "checkpoint 'nowhere.pth' is not a file"),
        (['nowhere.py', 'none'], "config 'nowhere.py' is not a file"),
        (['{config}', 'none', '--out', 'a.csv'], '.png, .pdf, .svg'),
        (['{config}', 'none', '--images', '.'], '--ann-dir says where they are'),
        (['{config}', 'none', '--pixels-per-class', '0'], '--pixels-per-class must be at least 1'),
        (['{config}', 'none', '--min-dist', '2'], '--min-dist: expected a number from 0 to 1'),
        (['{config}', 'none', '{wider}', 'none'], 'num_classes is 9'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_wrong_arguments(small, tmp_path, capsys, arguments, words):
    wider = tmp_path / 'wider.py'
    wider.write_text(f'_base_ = {str(small[0])!r}\nmodel = dict(decode_head=dict(num_classes=9))\n')
    places = dict(config=small[0], wider=wider)
    given = [a.format(**places) for a in arguments] + ['--embedding', 'pca', '--device', 'cpu']
    assert words in complaint(TOOL, given, capsys)
