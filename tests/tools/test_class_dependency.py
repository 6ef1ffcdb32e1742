"""tools/analysis_tools/class_dependency.py as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
from PIL import Image

from .running import TOOLS, load_tool, run_again, small_config

pytestmark = pytest.mark.filterwarnings('ignore')
TOOL = TOOLS / 'analysis_tools' / 'class_dependency.py'
#: A config whose images are nowhere.
CITY = """_base_ = {base!r}
val_dataloader = dict(_delete_=True, dataset=dict(
    type='CityscapesDataset', data_root='nowhere',
    data_prefix=dict(img_path='a', seg_map_path='b')))
model = dict(decode_head=dict(num_classes=19))
"""


def config_and_checkpoint(folder: Path) -> tuple[Path, Path]:
    """A config on FusionShapes and a checkpoint with the weights that seed 0 gives."""
    config = small_config(folder)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(Config.fromfile(config).model)
    torch.save({'state_dict': model.state_dict()}, folder / 'small.pth')
    return config, folder / 'small.pth'


def complaint(tool: Path, arguments: list[str], capsys) -> str:
    """What the tool says when it stops, without a process of its own."""
    with pytest.raises(SystemExit) as stopped:
        load_tool(tool).main(arguments)
    # argparse stops with 2 after printing.
    return capsys.readouterr().err if stopped.value.code == 2 else stopped.value.code


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> tuple[Path, Path]:
    return config_and_checkpoint(tmp_path_factory.mktemp('small'))


@pytest.mark.stack
def test_two_models_side_by_side(small, tmp_path):
    done = run_again(
        TOOL, *small, small[0], 'none', '--names', 'first', 'second',
        '--matrix', tmp_path / 'm.npz', '--device', 'cpu', cwd=tmp_path,
    )  # fmt: skip
    assert 'first: input of decode_head.conv_seg' in done.stdout
    assert 'mean off diagonal' in done.stdout
    with np.load(tmp_path / 'm.npz') as file:
        assert file['matrix'].shape == (2, 8, 8)
        assert file['vectors_0'].shape == (8, 16)
        # Three scenes of 64 x 64 on a grid of 16 x 16.
        assert (file['counts'].sum(1) <= 3 * 256).all()
        assert (file['counts'][0] == file['counts'][1]).all()
        seen = file['counts'][0] > 0
        some = file['matrix'][:, seen][:, :, seen]
        np.testing.assert_allclose(some.sum(2), 1)
        assert np.isnan(file['matrix'][:, ~seen]).all()
        mean = np.mean(some[0][~np.eye(len(some[0]), dtype=bool)])
        assert f'{mean:.5f}' in done.stdout
    path = tmp_path / 'work_dirs' / 'small' / 'class_dependency' / 'class_dependency.png'
    with Image.open(path) as image:
        assert image.width > image.height


def test_weights_need_no_images(small, tmp_path):
    config = tmp_path / 'city.py'
    config.write_text(CITY.format(base=str(small[0])))
    run_again(
        TOOL, config, 'none', '--of', 'weights', '--similarity', 'cosine',
        '--matrix', tmp_path / 'm.json', '--out-dir', tmp_path, cwd=tmp_path,
    )  # fmt: skip
    saved = json.loads((tmp_path / 'm.json').read_text())
    assert saved['of'] == 'weights'
    assert saved['classes'][:2] == ['road', 'sidewalk']
    diagonal = [row[i] for i, row in enumerate(saved['models'][0]['matrix'])]
    assert diagonal == pytest.approx([1] * 19)


def test_folder_with_predicted_classes(small, tmp_path, capsys):
    folder = tmp_path / 'images'
    folder.mkdir()
    for i, size in enumerate(((40, 56), (71, 50))):
        pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f'{i}.png')
    options = ('--images', folder, '--device', 'cpu', '--out-dir', tmp_path)
    words = complaint(TOOL, [*map(str, (*small, *options))], capsys)
    assert '--classes-from predictions' in words
    done = run_again(TOOL, *small, *options, '--classes-from', 'predictions', cwd=tmp_path)
    assert 'of 8' in done.stdout
    assert (tmp_path / 'class_dependency.png').is_file()


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['{config}'], 'pairs of CONFIG CHECKPOINT'),
        (['{config}', '{checkpoint}', '--layer', 'conv_seg'], 'decode_head.conv_seg'),
        (['{config}', 'nowhere.pth'], "checkpoint 'nowhere.pth' is not a file"),
        (['nowhere.py', 'none'], "config 'nowhere.py' is not a file"),
        (['{config}', 'none', '--matrix', 'a.csv'], '.npz or .json'),
        (['{config}', 'none', '{wider}', 'none'], 'num_classes is 9'),
    ],
    ids=['odd', 'layer', 'checkpoint', 'config', 'matrix', 'classes'],
)
def test_wrong_arguments(small, tmp_path, capsys, arguments, words):
    wider = tmp_path / 'wider.py'
    wider.write_text(f'_base_ = {str(small[0])!r}\nmodel = dict(decode_head=dict(num_classes=9))\n')
    places = dict(config=small[0], checkpoint=small[1], wider=wider)
    assert words in complaint(TOOL, [a.format(**places) for a in arguments], capsys)


def test_missing_images(small, tmp_path, capsys):
    config = tmp_path / 'city.py'
    config.write_text(CITY.format(base=str(small[0])))
    words = complaint(TOOL, [str(config), 'none', '--device', 'cpu'], capsys)
    assert 'val_dataloader.dataset.data_root=FOLDER' in words
