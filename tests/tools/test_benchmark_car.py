"""tools/analysis_tools/benchmark_car.py: what it measures, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch

from .running import TOOLS, load_tool, run_again

TOOL = TOOLS / 'analysis_tools' / 'benchmark_car.py'


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOL)


@pytest.mark.stack
def test_as_a_user_runs_it(tmp_path):
    result = run_again(
        TOOL, '--shapes', '2x8x9x7', '1x4x5x5', '--classes', 3, 11, '--repeat', 2, '--warmup', 1,
        '--device', 'cpu', cwd=tmp_path,
    )  # fmt: skip
    titles = re.findall(r'^\| (.+ classes) ', result.stdout, re.M)
    assert titles == [
        f'{shape}, {k} classes' for shape in ('2 x 8 x 9 x 7', '1 x 4 x 5 x 5') for k in (3, 11)
    ]
    rows = re.findall(
        r'^\| (sums, scatter|sums, one_hot|all losses) +\| +([\d.]+)', result.stdout, re.M
    )
    assert [name for name, _ in rows] == ['sums, scatter', 'sums, one_hot', 'all losses'] * 4
    assert all(float(median) > 0 for _, median in rows)
    assert len(re.findall(r'one_hot takes [\d.e-]+ times as long', result.stdout)) == 4


def test_both_ways_sum_the_same(tool):
    scatter, one_hot, losses = (
        tool.make_step(variant, (2, 6, 13, 12), 7, 'cpu') for variant in tool.VARIANTS
    )
    torch.testing.assert_close(scatter(), one_hot())
    assert losses() > 0


def test_labels_are_patches(tool):
    label = tool.make_label((3, 1, 60, 48), 5, 'cpu')
    patches = label.unfold(1, 10, 10).unfold(2, 8, 8).flatten(3)
    assert (patches == patches[..., :1]).all()
    ignored = (label == 255).float().mean()
    assert ignored == pytest.approx(1 / 6)
    assert set(label.unique().tolist()) <= {0, 1, 2, 3, 4, 255}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--shapes', '4x512x65'], "expected NxCxHxW such as 2x512x33x33, got '4x512x65'"),
        (
            ['--classes', '59', '0'],
            'expected 1 to 255 (255 is the ignored label), got 59 0',
        ),
        (['--classes', '300'], '(255 is the ignored label), got 300'),
        (['--repeat', '0'], '--repeat must be at least 1, got 0'),
        (['--warmup', '-1'], '--warmup must be at least 0, got -1'),
        (['--threads', '0'], '--threads must be at least 1, got 0'),
    ],
)
def test_wrong_options_say_what_was_expected(tool, capsys, options, message):
    with pytest.raises(SystemExit):
        tool.parse_args(['--device', 'cpu', *options])
    assert message in capsys.readouterr().err
