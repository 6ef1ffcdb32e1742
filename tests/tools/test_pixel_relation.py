"""tools/analysis_tools/pixel_relation.py as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .running import TOOLS, run_again
from .test_class_dependency import complaint, config_and_checkpoint

pytestmark = pytest.mark.filterwarnings('ignore')
TOOL = TOOLS / 'analysis_tools' / 'pixel_relation.py'


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> tuple[Path, Path]:
    return config_and_checkpoint(tmp_path_factory.mktemp('small'))


@pytest.mark.stack
def test_two_models_side_by_side(small, tmp_path):
    done = run_again(
        TOOL, *small, small[0], 'none', '--names', 'first', 'second', '--num-samples', 2,
        '--max-points', 2, '--device', 'cpu', cwd=tmp_path,
    )  # fmt: skip
    out = tmp_path / 'work_dirs' / 'small' / 'pixel_relation'
    # Two of the three scenes, evenly.
    assert sorted(p.name for p in out.glob('*.png')) == ['000000.png', '000001.png']
    entries = json.loads((out / 'pixel_relation.json').read_text())
    assert len(entries) == 2 * 2 * 2
    assert {e['model'] for e in entries} == {'first', 'second'}
    for first, second in zip(entries[::2], entries[1::2]):
        assert [first[k] for k in 'xy'] == [second[k] for k in 'xy']
        assert 0 <= first['own'] <= 1
    mean = np.mean([e['own'] for e in entries if e['model'] == 'first'])
    assert f'{mean:.4f}' in done.stdout


def test_points_in_image_files(small, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (51, 77, 3), np.uint8)
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / 'same.png')
    images = (tmp_path / 'a' / 'same.png', tmp_path / 'b')
    options = ('--images', *images, '--device', 'cpu', '--out-dir', tmp_path / 'out')
    run_again(TOOL, *small, *options, '--point', 76, 50, '--point', 0, 3, cwd=tmp_path)
    assert sorted(p.name for p in (tmp_path / 'out').glob('*.png')) == ['same.png', 'same_2.png']
    entries = json.loads((tmp_path / 'out' / 'pixel_relation.json').read_text())
    assert [(e['x'], e['y']) for e in entries] == [(76, 50), (0, 3)] * 2
    # Without a label the prediction is the class.
    assert all(e['category'] == e['predicted'] for e in entries)
    words = complaint(TOOL, [*map(str, (*small, *options)), '--point', '77', '0'], capsys)
    assert '--point 77 0 is outside the image' in words
    assert 'width 77 and height 51' in words


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--layer', 'decode_head.conv_sag'], 'decode_head.conv_seg'),
        (['--layer', 'decode_head', '--side', 'input'], 'does not run'),
        (['--indices', '3'], 'from 0 to 2'),
        (['--indices', '1', '--num-samples', '1'], 'give either'),
        (['--max-points', '0'], '--max-points must be at least 1'),
        (['--names', 'a', 'b'], 'expected 1, one per model, got 2'),
    ],
    ids=['layer', 'map', 'index', 'both', 'points', 'names'],
)
def test_wrong_arguments(small, tmp_path, capsys, arguments, words):
    arguments = [*map(str, small), *arguments, '--device', 'cpu', '--out-dir', str(tmp_path)]
    assert words in complaint(TOOL, arguments, capsys)
