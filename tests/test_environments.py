"""The table of environments is made from their record, and reads what a run writes."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOX = runpy.run_path(str(ROOT / 'noxfile.py'))


def test_table_is_made_from_the_record():
    text = (ROOT / 'docs' / 'compatibility.md').read_text(encoding='utf-8')
    assert NOX['inserted'](text, NOX['record']()) == text, 'nox -s table'


def test_every_environment_has_a_line_also_without_a_run():
    entry = dict(
        versions={'python': '3.9.18', 'torch': '2.0.1', 'numpy': '1.26.4', 'mmcv': '2.1.0'},
        run='pytest -m stack',
        passed=7,
        failed=1,
        skipped=2,
    )
    lines = NOX['rows']({'py39-torch2.0': entry})
    assert len(lines) == 2 + len(NOX['ENVIRONMENTS'])
    ran = '| py39-torch2.0 | 3.9.18 | 2.0.1 | 1.26.4 | mmcv 2.1.0 | `pytest -m stack` | 7 | 1 | 2 |'
    assert ran in lines
    assert sum('| not run |' in line for line in lines) == len(NOX['ENVIRONMENTS']) - 1
    assert {line.count('|') for line in lines} == {10}


def test_outcome_of_a_report(tmp_path):
    report = tmp_path / 'report.xml'
    report.write_text(
        '<testsuites><testsuite tests="10" failures="1" errors="2" skipped="3"/></testsuites>'
    )
    assert NOX['outcome'](report) == dict(passed=4, failed=3, skipped=3)


def test_pins_are_of_stacks_that_the_project_has():
    for python, extra, pins in NOX['ENVIRONMENTS'].values():
        assert python.startswith('3.')
        assert (ROOT / 'requirements' / f'{extra}.txt').is_file()
        assert all((ROOT / pin).is_file() for pin in pins if pin.endswith('.txt'))


def test_processes_are_no_choice_of_tests():
    arguments = NOX['arguments']
    assert arguments([]) == (['-n', '2'], ['-m', 'stack'])
    assert arguments(['-n', '1']) == (['-n', '1'], ['-m', 'stack'])
    assert arguments(['-n1', '-k', 'hook', 'tests/engine']) == (
        ['-n', '1'],
        ['-k', 'hook', 'tests/engine'],
    )
