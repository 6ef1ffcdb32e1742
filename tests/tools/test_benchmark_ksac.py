"""tools/analysis_tools/benchmark_ksac.py: what it measures, and how it judges the rule."""

from __future__ import annotations

import json
import re

import pytest
import torch

from mmseg_fusion.models.layers.kernel_sharing import choose_implementation

from .running import TOOLS, forked_python, load_tool, run_again

TOOL = TOOLS / 'analysis_tools' / 'benchmark_ksac.py'


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOL)


@pytest.fixture(scope='module')
def harness():
    return load_tool(TOOL.parent / '_harness.py')


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


@pytest.mark.stack
def test_time_and_memory_of_the_three(tmp_path):
    options = '--case 24 9 --rates 6 12 18 --channels 8 --batch-size 2 --repeat 2'.split()
    options += ['--warmup', '1', '--device', 'cpu']
    options += ['--json', tmp_path / 'out.json']
    done = run_again(TOOL, *options, cwd=tmp_path, python=forked_python())
    head, *rows = cells(done.stdout)[:4]
    assert head[0] == '24 channels, 9 x 9, rates 6 12 18, train'
    assert [row[0] for row in rows] == ['ASPP', 'dilated', 'shared_taps']
    assert all(float(row[1]) > 0 for row in rows)
    saved = json.loads((tmp_path / 'out.json').read_text())['results']
    assert [row['variant'] for row in saved] == ['ASPP', 'dilated', 'shared_taps']
    for row in saved:
        assert len(row['seconds']) == 2
        assert (row['in_channels'], row['side'], row['rates']) == (24, 9, [6, 12, 18])
        assert row['auto'] == choose_implementation('cpu', 24, 3) == cells(done.stdout)[-1][5]


def test_memory_is_that_of_the_features(tool, harness):
    options = '--case 64 129 --channels 64 --rates 2 4 --device cpu --threads 1'
    args = tool.parse_args(options.split())
    peak = harness.all_memory_apart(str(TOOL), args.argv)[0]['shared_taps']
    feature = 64 * 129**2 * 4
    # The gradient of the input, two maps that are normalized, what ReLU left of them, their sum.
    assert 6 * feature < peak < 40 * feature


def test_the_rule_is_measured_in_both_modes(tool, capsys):
    options = ['--rule', '--case', '16', '5', '--case', '160', '3', '--channels', '4']
    options += ['--repeat', '2', '--warmup', '1', '--device', 'cpu']
    results = tool.main(options)
    infos = [r.case.info for r in results]
    seen = {(i['in_channels'], len(i['rates']), i['mode']) for i in infos}
    numbers = {len(rates) for rates in tool.RULE_RATES}
    assert seen == {(c, n, m) for c in (16, 160) for n in numbers for m in ('train', 'inference')}
    assert all([row.variant for row in r.rows] == ['dilated', 'shared_taps'] for r in results)
    assert re.search(r'slower than `dilated` in \d+ of 16 cases', capsys.readouterr().out)


def result(harness, dilated, shared, auto):
    info = dict(in_channels=64, side=33, rates=[6, 12], mode='train', auto=auto)
    case = harness.Case('a case', ('dilated', 'shared_taps'), lambda variant: None, info=info)
    rows = [harness.Measured('dilated', dilated), harness.Measured('shared_taps', shared)]
    return harness.Result(case, rows)


def test_the_slowdown_is_that_of_what_auto_takes(tool, harness):
    # The second turn met a busy machine, in both variants.
    assert tool.slowdown(result(harness, [1.0, 9.0, 2.0], [0.5, 4.5, 1.2], 'dilated')) == 2
    assert tool.slowdown(result(harness, [1.0, 9.0, 2.0], [0.5, 4.5, 1.2], 'shared_taps')) == 0.5


def test_wrong_choices_are_named_and_counted(tool, harness):
    right = result(harness, [0.2], [0.1], 'shared_taps')
    close = result(harness, [0.100], [0.098], 'dilated')
    timid = result(harness, [0.2], [0.1], 'dilated')
    bad = result(harness, [0.1], [0.3], 'shared_taps')
    text = tool.judge([right, close])
    assert 'takes the faster form, within 5 %, in all 2 cases' in text
    assert 'wrong' not in text
    text = tool.judge([right, close, timid, bad])
    assert [row[-1] for row in cells(text)[1:]] == ['0.500', '1.020', '2.000 wrong', '3.000 wrong']
    assert 'slower form in 2 of 4 cases, at worst 3.00 times' in text
    assert '`auto` is slower than `dilated` in 1 of 4 cases' in text


def test_rates_are_doubled_at_output_stride_8(tool):
    def named(args):
        infos = [c.info for c in tool.cases(args)]
        return [(i['in_channels'], i['side'], tuple(i['rates'])) for i in infos]

    found = named(tool.parse_args([]))
    assert (2048, 33, (6, 12, 18)) in found
    assert (2048, 65, (12, 24, 36)) in found
    assert (320, 33, (1, 6, 12, 18, 24)) in found
    assert len(found) == 6
    assert named(tool.parse_args(['--case', '8', '65', '--rates', '6', '12'])) == [(8, 65, (6, 12))]


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('variant', ['ASPP', 'dilated', 'shared_taps'])
def test_a_step_runs_backward_to_input_and_weights(tool, variant, amp):
    options = '--case 6 5 --channels 4 --batch-size 2 --channels-last --device cpu'.split()
    args = tool.parse_args(options + ['--amp'] * amp)
    for mode in ('train', 'inference'):
        module, (x, gradient) = tool.build(variant, 6, (1, 2), 4), tool.noise(6, 5, args)
        assert x.is_contiguous(memory_format=torch.channels_last)
        tool.make_step(module, x, gradient, mode, args)()
        reached = [p.grad is not None for p in [x, *module.parameters()]]
        assert all(reached) if mode == 'train' else not any(reached)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--case', '0', '33'], 'argument --case: expected positive numbers, got 0 33'),
        (['--rates', '6', '-1'], 'argument --rates: expected positive numbers, got 6 -1'),
        (['--repeat', '0'], '--repeat must be at least 1, got 0'),
    ],
)
def test_wrong_options(tool, capsys, options, message):
    with pytest.raises(SystemExit):
        tool.parse_args(options)
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_memory_and_time_on_cuda(tool, capsys):
    options = '--case 64 17 --rates 6 12 --repeat 3 --amp --device cuda'.split()
    (r,) = tool.main(options)
    assert all(row.memory > 0 for row in r.rows)
    assert r.case.info['auto'] == 'dilated'
    assert torch.cuda.get_device_name() in capsys.readouterr().out
