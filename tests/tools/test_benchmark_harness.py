"""tools/analysis_tools/_harness.py: what all benchmarks take, measure, print and write."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch

from .running import ROOT, TOOLS, load_tool

FOLDER = TOOLS / 'analysis_tools'
#: Every benchmark that is made of cases.
BENCHMARKS = sorted(
    path for path in FOLDER.glob('benchmark_*.py') if 'import _harness' in path.read_text()
)


@pytest.fixture(scope='module')
def harness():
    return load_tool(FOLDER / '_harness.py')


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def parse(harness, *options, **least):
    return harness.parse(harness.make_parser('A benchmark.', batch_size=1), options, **least)


def result_of(harness, rows, **options):
    case = harness.Case('a case', tuple(row.variant for row in rows), lambda v: None, **options)
    return harness.Result(case, rows)


# --- the table -----------------------------------------------------------------------------------


def test_ratios_are_medians_of_the_turns(harness):
    # The second turn met a busy machine, in both variants.
    rows = [
        harness.Measured('fused', [1.0, 9.0, 2.0], 2**22),
        harness.Measured('plain', [1.5, 9.0, 2.6], 2**24, 1e-7),
    ]
    options = dict(base='fused', same=('plain',), compare=(('plain', 'fused'),))
    text = harness.table(result_of(harness, rows, **options))
    head, fused, plain = cells(text)
    assert head == [
        'a case', 'median ms', 'min', 'max', 'time / fused', 'peak MiB', 'MiB / fused', 'error'
    ]  # fmt: skip
    assert fused == ['fused', '2000.00', '1000.00', '9000.00', '1.000', '4.0', '1.000', '-']
    assert plain == ['plain', '2600.00', '1500.00', '9000.00', '1.300', '16.0', '4.000', '1.0e-07']
    assert 'plain takes 1.3 times as long as fused, 4 times the memory' in text


def test_what_is_unknown_is_left_out_or_a_dash(harness):
    rows = [harness.Measured('a', [1.0], None), harness.Measured('b', [2.0], 2**20)]
    compare = (('b', 'a'), ('b', 'c'))
    text = harness.table(result_of(harness, rows, base='a', compare=compare))
    assert cells(text)[1:] == [
        ['a', '1000.00', '1000.00', '1000.00', '1.000', '-', '-'],
        ['b', '2000.00', '2000.00', '2000.00', '2.000', '1.0', '-'],
    ]
    assert text.splitlines()[-1] == 'b takes 2 times as long as a'
    # The base was not asked for: no ratio.
    text = harness.table(result_of(harness, rows[:1], base='c'))
    assert cells(text)[0] == ['a case', 'median ms', 'min', 'max']


def test_columns_that_are_known_before(harness):
    rows = [harness.Measured('a', [0.1, 0.4, 0.2])]
    columns = {'M parameters': ({'a': 1.5}, '{:.2f}')}
    head, row = cells(harness.table(result_of(harness, rows, columns=columns, images=4)))
    assert head == ['a case', 'M parameters', 'median ms', 'min', 'max', 'images/s']
    assert row == ['a', '1.50', '200.00', '100.00', '400.00', '20.00']


# --- measuring -----------------------------------------------------------------------------------


def test_variants_take_turns(harness):
    seen = []
    steps = [lambda: seen.append('a'), lambda: seen.append('b')]
    seconds = harness.measure(steps, 3, 1, 'cpu')
    assert seen == ['a', 'b'] * 4
    assert [len(times) for times in seconds] == [3, 3]


def test_the_time_of_a_step_is_measured(harness, monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: order.append('wait'))
    step = [lambda: (order.append('step'), time.sleep(0.02))]
    (seconds,) = harness.measure(step, 2, 0, 'cuda')
    assert all(0.02 <= s < 0.2 for s in seconds)
    # A GPU is waited for before and after.
    assert order == ['wait', 'step', 'wait'] * 2


def test_the_error_is_relative_to_the_base(harness):
    outputs = dict(base=torch.tensor([1.0, -4.0]), other=torch.tensor([1.5, -4.0]))
    case = harness.Case(
        'a case', tuple(outputs), lambda v: lambda: outputs[v], base='base', same=('other',)
    )
    result = harness.measure_case(case, parse(harness, '--device', 'cpu', '--repeat', '1'))
    assert [row.error for row in result.rows] == [None, 0.125]


#: A script whose case adds one to 64 MiB that were there before.
SCRIPT = """
import sys
import mmseg_fusion
import _harness as harness
import torch
weight = torch.ones(2**24)
step = lambda: (weight + 1).sum()
case = harness.Case('a case', ('a',), lambda variant: step)
args = harness.parse(harness.make_parser('A benchmark.'), sys.argv[1:])
harness.run([case], args, __file__, 'nothing')
"""


def test_memory_is_beyond_what_was_held(harness, tmp_path, monkeypatch):
    if not harness.reset_peak():  # it is known on Linux alone
        assert harness.memory_here(lambda: None, 'cpu') is None
        return
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), str(FOLDER)]))
    # In a process of its own: this one may have free memory to give.
    ((peak,),) = (
        case.values() for case in harness.all_memory_apart(str(script), ['--device', 'cpu'])
    )
    # Linux counts pages in batches: a few hundred KiB may be missing.
    assert 2**26 - 2**20 < peak < 2**26 + 2**22


def test_numbers_are_written(harness, tmp_path, capsys):
    path = tmp_path / 'a' / 'numbers.json'
    args = parse(harness, '--device', 'cpu', '--repeat', '2', '--json', str(path), '--no-memory')
    case = harness.Case(
        'a case', ('a',), lambda v: lambda: None, info=dict(side=3),
        columns={'M parameters': ({'a': 1.5}, '{:.2f}')},
    )  # fmt: skip
    (result,) = harness.run([case], args, __file__, 'nothing')
    found = json.loads(path.read_text())
    assert found['setup'].startswith('nothing\nCPU, ')
    (row,) = found['results']
    assert row['median'] == pytest.approx(sum(row['seconds']) / 2)
    assert (row['case'], row['variant'], row['side'], row['M parameters']) == (
        'a case',
        'a',
        3,
        1.5,
    )
    assert row['memory'] is None
    text = capsys.readouterr().out
    assert 'peak MiB' not in text
    assert harness.table(result) in text


def test_a_process_that_measures_memory_alone_prints_it_last(harness, capsys):
    built = []

    def build(variant):
        built.append(variant)
        return lambda: None

    cases = [
        harness.Case('a case', ('a', 'b'), build),
        harness.Case('another', ('c',), build, memory=False),
    ]
    args = parse(harness, '--device', 'cpu', '--only-memory')
    assert harness.run(cases, args, __file__, 'nothing') == []
    # The first one twice: it loads what all of them need.
    assert built == ['a', 'a', 'b']
    first, second = json.loads(capsys.readouterr().out)
    assert list(first) == ['a', 'b']
    assert second == {}


# --- every benchmark -----------------------------------------------------------------------------


def test_they_are_there():
    names = {path.stem.partition('_')[2] for path in BENCHMARKS}
    assert {'attention', 'car', 'eseg', 'gff', 'hfgd', 'ksac', 'scale_equalizer'} <= names


@pytest.mark.parametrize('path', BENCHMARKS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--repeat', '0'], '--repeat must be at least 1, got 0'),
        (['--warmup', '-1'], '--warmup must be at least 0, got -1'),
        (['--threads', '0'], '--threads must be at least 1, got 0'),
        (['--device', 'cuda:7'], 'cuda:7 asked for, but torch sees no CUDA device'),
    ],
)
def test_wrong_options(path, options, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    config = ['a.py'] if path.stem == 'benchmark_scale_equalizer' else []
    with pytest.raises(SystemExit):
        load_tool(path).parse_args([*config, *options])
    assert message in capsys.readouterr().err
