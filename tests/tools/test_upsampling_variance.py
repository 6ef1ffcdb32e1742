"""Figure 3's tool: table, plot and messages."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from .running import run_again

SMALL = ('--shape', '2', '8', '32', '32', '--num-sigmas', '3')


@pytest.fixture(scope='module')
def tool(repo_root: Path) -> ModuleType:
    path = repo_root / 'tools' / 'analysis_tools' / 'upsampling_variance.py'
    spec = importlib.util.spec_from_file_location('upsampling_variance', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(path: Path) -> list[dict]:
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def test_runs_as_a_program(repo_root: Path, tmp_path: Path) -> None:
    run = run_again(
        'tools/analysis_tools/upsampling_variance.py', *SMALL, '--seed', 3,
        '--out-dir', tmp_path / 'new' / 'folder', cwd=repo_root,
    )  # fmt: skip
    png, csv_path = (Path(line) for line in run.stdout.splitlines()[-2:])
    assert png.parent == tmp_path / 'new' / 'folder'
    picture = np.asarray(Image.open(png).convert('RGB'))
    assert picture.shape[0] > 400
    assert picture.shape[1] > 800
    # The three colours of the three ratios are there.
    for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):
        assert (np.abs(picture.astype(int) - colour).sum(-1) < 12).sum() > 100
    rows = table(csv_path)
    assert [row['ratio'] for row in rows] == ['2', '4', '8'] * 3
    assert [float(row['variance']) for row in rows[::3]] == [0.01, 0.5, 0.99]
    for row in rows:
        before, after = float(row['variance_before']), float(row['variance_after'])
        assert float(row['measured_ratio']) == pytest.approx(after / before)
        assert after / before == pytest.approx(float(row['closed_form']), abs=0.02)
        assert before == pytest.approx(float(row['variance']), rel=0.1)


def test_borders_are_in_the_closed_form(tool: ModuleType, tmp_path: Path) -> None:
    tool.main([*SMALL, '--out-dir', str(tmp_path)])
    rows = table(tmp_path / 'figure3.csv')
    # c = 2/3 - 1/(6 r^2) per dimension away from borders, (31 c + 1) / 32 with them.
    for row in rows:
        c = 2 / 3 - 1 / (6 * int(row['ratio']) ** 2)
        assert float(row['closed_form_interior']) == pytest.approx(c**2)
        assert float(row['closed_form']) == pytest.approx(((31 * c + 1) / 32) ** 2)


def test_aligned_corners_and_fractional_ratios(tool: ModuleType, tmp_path: Path) -> None:
    tool.main([*SMALL, '--out-dir', str(tmp_path), '--align-corners', '--ratios', '1.5', '2'])
    rows = table(tmp_path / 'figure3_align_corners.csv')
    assert [row['ratio'] for row in rows] == ['1.5', '2'] * 3
    assert {row['closed_form_interior'] for row in rows} == {''}
    for row in rows:
        assert float(row['measured_ratio']) == pytest.approx(float(row['closed_form']), abs=0.02)


def test_seed_decides_the_numbers(tool: ModuleType, tmp_path: Path) -> None:
    for folder, seed in (('a', '1'), ('b', '1'), ('c', '2')):
        tool.main([*SMALL, '--out-dir', str(tmp_path / folder), '--seed', seed])
    a, b, c = ((tmp_path / f / 'figure3.csv').read_text() for f in 'abc')
    assert a == b
    assert a != c


def test_paper_size(tool: ModuleType) -> None:
    args = tool.parse_args(['--paper'])
    assert tuple(args.shape) == (16, 256, 128, 128)
    assert args.num_sigmas == 99
    small = tool.parse_args([])
    assert tuple(small.shape) == (4, 16, 128, 128)
    assert small.ratios == [2, 4, 8]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--ratios', '0.5'], 'argument --ratios: expected at least 1, got 0.5'),
        (['--shape', '1', '0', '8', '8'], 'argument --shape: expected positive'),
        (['--num-sigmas', '1'], 'argument --num-sigmas: expected at least 2, got 1'),
        (['--paper', '--num-sigmas', '5'], '--paper sets --shape and --num-sigmas'),
    ],
)
def test_wrong_arguments(
    tool: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        tool.parse_args(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_on_cuda(tool: ModuleType, tmp_path: Path) -> None:
    tool.main([*SMALL, '--out-dir', str(tmp_path), '--device', 'cuda:0'])
    for row in table(tmp_path / 'figure3.csv'):
        assert float(row['measured_ratio']) == pytest.approx(float(row['closed_form']), abs=0.02)
    assert torch.cuda.max_memory_allocated() > 0
