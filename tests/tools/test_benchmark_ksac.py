"""tools/analysis_tools/benchmark_ksac.py: what it measures, and how it judges the rule."""

from __future__ import annotations

import importlib.util
import json
import re
import sys

import pytest
import torch

from mmseg_fusion.models.layers.kernel_sharing import choose_implementation

from .running import TOOLS, run

TOOL = TOOLS / 'analysis_tools' / 'benchmark_ksac.py'


@pytest.fixture(scope='module')
def tool():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(TOOL.parent))
    spec = importlib.util.spec_from_file_location('benchmark_ksac', TOOL)
    module = sys.modules['benchmark_ksac'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    patch.undo()


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


@pytest.mark.stack
def test_time_and_memory_of_the_three(tmp_path):
    options = '--case 24 9 --rates 6 12 18 --channels 8 --batch-size 2 --repeat 2'.split()
    options += ['--warmup', '1', '--device', 'cpu']
    done = run(TOOL, *options, '--json', tmp_path / 'out.json', cwd=tmp_path)
    head, row = cells(done.stdout)
    assert head[4:7] == ['ASPP ms', 'dilated ms', 'shared_taps ms']
    assert row[:4] == ['24', '9', '6 12 18', 'train']
    assert all(float(ms) > 0 for ms in row[4:7])
    (saved,) = json.loads((tmp_path / 'out.json').read_text())['results']
    assert [len(s) for s in saved['seconds'].values()] == [2, 2, 2]
    assert set(saved['memory']) == {'ASPP', 'dilated', 'shared_taps'}
    assert row[11] == saved['auto'] == choose_implementation('cpu', 24, 3)


def test_memory_is_that_of_the_features(tool):
    options = '--case 64 129 --channels 64 --rates 2 4 --device cpu --threads 1'
    args = tool.parse_args(options.split())
    (case,) = tool.cases(args)
    peak = tool.memory_apart(case, 'shared_taps', args)
    feature = 64 * 129**2 * 4
    # Input and gradient, two maps that are normalized, what ReLU left of them, and their sum.
    assert 7 * feature < peak < 40 * feature


def test_the_rule_is_measured_in_both_modes(tool, capsys):
    options = ['--rule', '--case', '16', '5', '--case', '160', '3', '--channels', '4']
    options += ['--repeat', '2', '--warmup', '1', '--device', 'cpu']
    results = tool.main(options)
    seen = {(r.case.in_channels, len(r.case.rates), r.case.mode) for r in results}
    numbers = {len(rates) for rates in tool.RULE_RATES}
    assert seen == {(c, n, m) for c in (16, 160) for n in numbers for m in ('train', 'inference')}
    assert all(set(r.seconds) == {'dilated', 'shared_taps'} for r in results)
    assert re.search(r'slower than `dilated` in \d+ of 16 cases', capsys.readouterr().out)


def result(tool, dilated, shared, auto):
    case = tool.Case(64, 33, (6, 12), 'train')
    return tool.Result(case, {'dilated': dilated, 'shared_taps': shared}, {}, auto)


def test_ratios_are_medians_of_the_turns(tool):
    # The second turn met a busy machine, in both variants.
    r = result(tool, [1.0, 9.0, 2.0], [0.5, 4.5, 1.2], 'dilated')
    assert r.ratio() == pytest.approx(0.5)
    assert r.slowdown() == pytest.approx(2)


def test_wrong_choices_are_named_and_counted(tool):
    right = result(tool, [0.2], [0.1], 'shared_taps')
    close = result(tool, [0.100], [0.098], 'dilated')
    timid = result(tool, [0.2], [0.1], 'dilated')
    bad = result(tool, [0.1], [0.3], 'shared_taps')
    text = tool.report([right, close])
    assert 'takes the faster form, within 5 %, in all 2 cases' in text
    assert 'wrong' not in text
    text = tool.report([right, close, timid, bad])
    assert [row[-1] for row in cells(text)[1:]] == ['0.500', '1.020', '2.000 wrong', '3.000 wrong']
    assert 'slower form in 2 of 4 cases, at worst 3.00 times' in text
    assert '`auto` is slower than `dilated` in 1 of 4 cases' in text


def test_rates_are_doubled_at_output_stride_8(tool):
    named = [(c.in_channels, c.side, c.rates) for c in tool.cases(tool.parse_args([]))]
    assert (2048, 33, (6, 12, 18)) in named
    assert (2048, 65, (12, 24, 36)) in named
    assert (320, 33, (1, 6, 12, 18, 24)) in named
    assert len(named) == 6
    given = tool.cases(tool.parse_args(['--case', '8', '65', '--rates', '6', '12']))
    assert [c.rates for c in given] == [(6, 12)]


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('variant', ['ASPP', 'dilated', 'shared_taps'])
def test_a_step_runs_backward_to_input_and_weights(tool, variant, amp):
    args = tool.parse_args('--case 6 5 --channels 4 --batch-size 2 --channels-last'.split())
    args.device = 'cpu'
    for mode in ('train', 'inference'):
        case = tool.Case(6, 5, (1, 2), mode)
        module, (x, gradient) = tool.build(variant, case, 4), tool.noise(case, args)
        assert x.is_contiguous(memory_format=torch.channels_last)
        tool.make_step(case, module, x, gradient, amp)()
        reached = [p.grad is not None for p in [x, *module.parameters()]]
        assert all(reached) if mode == 'train' else not any(reached)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--case', '0', '33'], 'argument --case: expected positive numbers, got 0 33'),
        (['--rates', '6', '-1'], 'argument --rates: expected positive numbers, got 6 -1'),
        (['--repeat', '0'], 'argument --repeat: expected at least 1, got 0'),
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
    assert all(m > 0 for m in r.memory.values())
    assert r.auto == 'dilated'
    assert torch.cuda.get_device_name() in capsys.readouterr().out
