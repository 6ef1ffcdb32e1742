"""tools/analysis_tools/benchmark_attention.py: what it measures, and what it refuses."""

from __future__ import annotations

import json
import re

import pytest
import torch

from mmseg_fusion.models.layers import AxialAttention, ChannelizedAxialAttention

from .running import TOOLS, load_tool, run_again

TOOL = TOOLS / 'analysis_tools' / 'benchmark_attention.py'
VARIANTS = ['axial', 'factorized', 'grouped', 'grouped, recomputed']


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOL)


@pytest.fixture(scope='module')
def harness():
    return load_tool(TOOL.parent / '_harness.py')


@pytest.mark.stack
def test_as_a_user_runs_it(harness, tmp_path):
    result = run_again(
        TOOL, '--shapes', '1x64x40x40', '--groups', 8, '--repeat', 3, '--warmup', 0,
        '--json', 'out/numbers.json', cwd=tmp_path,
    )  # fmt: skip
    numbers = json.loads((tmp_path / 'out' / 'numbers.json').read_text())
    rows = {row['variant']: row for row in numbers['results']}
    assert list(rows) == VARIANTS
    for name, row in rows.items():
        assert (row['shape'], row['groups'], row['threads']) == ([1, 64, 40, 40], 8, 1)
        assert len(row['seconds']) == 3
        assert row['median'] == sorted(row['seconds'])[1] > 0
        # The variants are one function, the plain attention is another.
        alone = name in ('axial', 'grouped')
        assert row['error'] is None if alone else row['error'] < 1e-5
        assert f'| {name} ' in result.stdout
    assert re.search(r'grouped takes [\d.]+ times as long as factorized', result.stdout)
    assert rows['factorized']['median'] < rows['grouped']['median']
    if not harness.reset_peak():
        return
    peaks = {name: row['memory'] for name, row in rows.items()}
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
        found[variant] = (
            attention.implementation,
            # The factorized form makes no groups.
            *(getattr(attention, name, None) for name in ('recompute', 'groups')),
        )
        widths = [m.out_features for m in attention.gate if isinstance(m, torch.nn.Linear)]
        assert widths == [2] * 5 + [8]
    assert found == {
        'factorized': ('factorized', None, None),
        'grouped': ('grouped', False, 3),
        'grouped, recomputed': ('grouped', True, 3),
    }


def test_default_shapes(tool, monkeypatch):
    assert tool.parse_args(['--device', 'cpu']).shapes == [(2, 512, 33, 33), (1, 512, 65, 65)]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert tool.parse_args(['--device', 'cuda']).shapes[-1] == (2, 512, 97, 97)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--shapes', '2x512x33'], "expected NxCxHxW such as 2x512x33x33, got '2x512x33'"),
        (['--shapes', '2x512x0x33'], "expected NxCxHxW such as 2x512x33x33, got '2x512x0x33'"),
        (['--groups', '0'], '--groups must be at least 1, got 0'),
        (['--repeat', '0'], '--repeat must be at least 1, got 0'),
        (['--warmup', '-1'], '--warmup must be at least 0, got -1'),
        (['--threads', '0'], '--threads must be at least 1, got 0'),
    ],
)
def test_wrong_options_say_what_was_expected(tool, capsys, options, message):
    with pytest.raises(SystemExit):
        tool.parse_args(['--device', 'cpu', *options])
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(tool):
    (result,) = tool.main(['--shapes', '1x64x40x40', '--groups', '8', '--repeat', '2'])
    peaks = {m.variant: m.memory for m in result.rows}
    assert peaks['factorized'] < peaks['grouped, recomputed'] < peaks['grouped']
    assert all(min(m.seconds) > 0 for m in result.rows)
