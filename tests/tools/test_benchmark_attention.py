"""tools/analysis_tools/benchmark_attention.py: what it measures, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch

from mmseg_fusion.models.layers import AxialAttention, ChannelizedAxialAttention

from .running import TOOLS, run

TOOL = TOOLS / 'analysis_tools' / 'benchmark_attention.py'
VARIANTS = ['axial', 'factorized', 'grouped', 'grouped, recomputed']


@pytest.fixture(scope='module')
def tool():
    # It imports the script beside it.
    sys.path.insert(0, str(TOOL.parent))
    try:
        spec = importlib.util.spec_from_file_location('benchmark_attention', TOOL)
        module = sys.modules['benchmark_attention'] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOL.parent))
    return module


@pytest.mark.stack
def test_as_a_user_runs_it(tool, tmp_path):
    result = run(
        TOOL, '--shapes', '1x64x40x40', '--groups', 8, '--repeat', 3, '--warmup', 0,
        '--json', 'out/numbers.json', cwd=tmp_path,
    )  # fmt: skip
    numbers = json.loads((tmp_path / 'out' / 'numbers.json').read_text())
    assert (numbers['device'], numbers['groups'], numbers['threads']) == ('cpu', 8, 1)
    rows = {row['variant']: row for row in numbers['measured']}
    assert list(rows) == VARIANTS
    for name, row in rows.items():
        assert row['shape'] == [1, 64, 40, 40]
        assert len(row['seconds']) == 3
        assert row['median'] == sorted(row['seconds'])[1] > 0
        # The variants are one function, the plain attention is another.
        assert row['error'] is None if name == 'axial' else row['error'] < 1e-5
        assert f'| {name} ' in result.stdout
    assert 'factorized against grouped: ' in result.stdout
    assert rows['factorized']['median'] < rows['grouped']['median']
    if not tool.reset_peak():
        return
    peaks = {name: row['peak_memory'] for name, row in rows.items()}
    terms = 4 * 64 * 40**3
    # Both passes keep theirs; a group is an eighth of the positions of one pass.
    assert peaks['grouped'] > 2 * terms
    assert peaks['grouped, recomputed'] < 1.5 * terms
    assert peaks['factorized'] < terms / 2


def test_what_is_timed_are_both_passes_without_the_projections(tool):
    shape = (2, 8, 5, 4)
    module, inputs = tool.build('factorized', shape, 16, 'cpu'), tool.make_inputs(shape, 'cpu')
    assert type(module) is ChannelizedAxialAttention
    assert [x.shape[1] for x in inputs] == [64, 64, 8]
    ran = []
    for name, part in module.named_modules():
        if name:
            part.register_forward_hook(lambda m, x, y, name=name: ran.append(name.split('.')[0]))
    tool.make_step(module, inputs)()
    assert set(ran) == {'column_attention', 'row_attention'}
    # Gradients are made and kept nowhere: every step finds the same memory.
    assert all(x.grad is None for x in [*inputs, *module.parameters()])


def test_the_variants_are_what_they_are_called(tool):
    shape = (1, 8, 5, 4)
    assert type(tool.build('axial', shape, 3, 'cpu')) is AxialAttention
    found = {}
    for variant in VARIANTS[1:]:
        attention = tool.build(variant, shape, 3, 'cpu').row_attention
        found[variant] = (attention.implementation, attention.recompute, attention.groups)
        widths = [m.out_features for m in attention.gate if isinstance(m, torch.nn.Linear)]
        assert widths == [2] * 5 + [8]
    assert found == {
        'factorized': ('factorized', False, 3),
        'grouped': ('grouped', False, 3),
        'grouped, recomputed': ('grouped', True, 3),
    }


def test_the_report_holds_medians_and_ratios(tool):
    shape = (1, 512, 65, 65)
    seconds = dict(zip(VARIANTS, ([0.1] * 3, [0.1, 0.4, 0.2], [3.0, 16.0, 7.0], [4.0, 12.0, 9.0])))
    measured = [
        tool.Measured(shape, name, times, 2**20 * mib, None)
        for (name, times), mib in zip(seconds.items(), (1, 2, 20, 3))
    ]
    text = tool.report(measured)
    row = next(line for line in text.splitlines() if line.startswith('| factorized '))
    cells = [cell.strip() for cell in row.strip('|').split('|')]
    assert cells == ['factorized', '200.00', '100.00', '400.00', '2.0', '-']
    # Of the pairs of each turn: 30, 40, 35 and 40, 30, 45.
    assert 'factorized against grouped: 35.0 times faster, 1/10.0 of the memory' in text
    assert 'grouped, recomputed: 40.0 times faster, 1/1.5 of the memory' in text
    unknown = [tool.Measured(shape, m.variant, m.seconds, None, None) for m in measured]
    assert 'of the memory' not in tool.report(unknown)


def test_default_shapes(tool, monkeypatch):
    assert tool.parse_args(['--device', 'cpu']).shapes == [(2, 512, 33, 33), (1, 512, 65, 65)]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert tool.parse_args(['--device', 'cuda']).shapes[-1] == (2, 512, 97, 97)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--shapes', '2x512x33'], "expected NxCxHxW such as 2x512x33x33, got '2x512x33'"),
        (['--shapes', '2x512x0x33'], "expected NxCxHxW such as 2x512x33x33, got '2x512x0x33'"),
        (['--groups', '0'], '--groups: expected at least 1, got 0'),
        (['--repeat', '0'], '--repeat: expected at least 1, got 0'),
        (['--warmup', '-1'], '--warmup: expected at least 0, got -1'),
        (['--threads', '0'], '--threads: expected at least 1, got 0'),
    ],
)
def test_wrong_options_say_what_was_expected(tool, capsys, options, message):
    with pytest.raises(SystemExit):
        tool.parse_args(['--device', 'cpu', *options])
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(tool):
    measured = tool.main(['--shapes', '1x64x40x40', '--groups', '8', '--repeat', '2'])
    peaks = {m.variant: m.peak_memory for m in measured}
    assert peaks['factorized'] < peaks['grouped, recomputed'] < peaks['grouped']
    assert all(min(m.seconds) > 0 for m in measured)
