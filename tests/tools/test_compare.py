"""tools/compare.py as a subprocess on FusionShapes; the statistics are in tests/analysis."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .running import TOOLS, environment, run, small_config

TOOL = TOOLS / 'compare.py'


def configs(folder: Path, iterations: int = 6) -> list[Path]:
    """Two small models; flips, colours and dropout draw random numbers."""
    folder.mkdir(exist_ok=True)
    small_config(folder, iterations=iterations)
    found = []
    for name, channels in (('narrow', 8), ('wide', 12)):
        path = folder / f'{name}.py'
        path.write_text(
            "_base_ = './small.py'\n"
            f'model = dict(decode_head=dict(channels={channels}, dropout_ratio=0.5))\n'
            "pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),\n"
            "    dict(type='RandomFlip', prob=0.5), dict(type='PhotoMetricDistortion'),\n"
            "    dict(type='PackSegInputs')]\n"
            'train_dataloader = dict(dataset=dict(pipeline=pipeline))\n'
            'default_hooks = dict(checkpoint=dict(interval=2, max_keep_ckpts=1))\n'
        )
        found.append(path)
    return found


def results(path: Path) -> dict[tuple[str, int], dict]:
    """What a record says of each run, without what differs from one run to the next."""
    runs = json.loads(path.read_text())['runs']
    changing = ('seconds_per_iteration', 'peak_memory_mb')
    return {
        (r['config'], r['seed']): {k: v for k, v in r.items() if k not in changing} for r in runs
    }


@pytest.fixture(scope='module')
def compared(tmp_path_factory) -> Path:
    """A folder in which two configs were compared over two seeds."""
    folder = tmp_path_factory.mktemp('compared')
    paths = [p.name for p in configs(folder)]
    result = run(TOOL, *paths, '--seeds', 0, 1, '--work-dir', 'work', '--threads', 1, cwd=folder)
    (folder / 'printed.txt').write_text(result.stdout)
    return folder


@pytest.mark.stack
def test_compare_trains_tests_and_prints_one_table(compared):
    runs = results(compared / 'work' / 'results.json')
    assert list(runs) == [('narrow', 0), ('wide', 0), ('narrow', 1), ('wide', 1)]
    for (name, seed), found in runs.items():
        assert (compared / 'work' / name / f'seed-{seed}' / 'iter_6.pth').is_file()
        assert len(found['IoU']) == 8
        assert found['mIoU'] == pytest.approx(sum(found['IoU'].values()) / 8, abs=1e-3)
        assert found['iterations'] == 6
    assert runs['narrow', 0]['parameters'] < runs['wide', 0]['parameters']
    # What tools/test.py says of the same checkpoint.
    work = compared / 'work' / 'wide' / 'seed-1'
    said = run(TOOLS / 'test.py', work / 'config.py', work / 'iter_6.pth', cwd=compared).stdout
    assert f'mIoU: {runs["wide", 1]["mIoU"]:.2f}' in said.replace('  ', ' ')
    lines = (compared / 'printed.txt').read_text().splitlines()
    narrow = next(line for line in lines if line.startswith('narrow '))
    mean = (runs['narrow', 0]['mIoU'] + runs['narrow', 1]['mIoU']) / 2
    assert f'{mean:.2f}' in narrow


@pytest.mark.stack
def test_finished_runs_are_taken_from_the_record(compared, tmp_path):
    # As in a fresh clone: the record is there, the work directories are gone.
    paths = configs(tmp_path)
    record = tmp_path / 'record.json'
    record.write_text((compared / 'work' / 'results.json').read_text())
    before = record.read_text()
    names = [p.name for p in paths]
    run(TOOL, *names, '--seeds', 0, 1, '--results', record, cwd=tmp_path)
    assert record.read_text() == before
    assert not (tmp_path / 'work_dirs').exists()


@pytest.mark.stack
@pytest.mark.parametrize('whole_group', [True, False], ids=['all processes', 'compare alone'])
def test_killed_in_the_middle_gives_the_same_table(compared, tmp_path, whole_group):
    names = [p.name for p in configs(tmp_path)]
    command = [*names, '--seeds', 0, 1, '--work-dir', 'work', '--threads', 1]
    process = subprocess.Popen(
        [sys.executable, '-S', str(TOOL), *map(str, command)], cwd=tmp_path, env=environment(),
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    seed = tmp_path / 'work' / 'narrow' / 'seed-0'
    deadline = time.monotonic() + 120
    while not list(seed.glob('iter_[24].pth')) or not (seed / 'last_checkpoint').is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    inner = [int(p) for p in Path(f'/proc/{process.pid}/task').glob('*/children')] if False else []
    if whole_group:
        children = subprocess.run(
            ['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        inner = [int(p) for p in children]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for pid in inner:
        os.kill(pid, signal.SIGKILL)
    assert not (seed / 'result.json').exists()

    again = run(TOOL, *command, cwd=tmp_path)
    assert results(tmp_path / 'work' / 'results.json') == results(
        compared / 'work' / 'results.json'
    )
    log = (seed / 'train.log').read_text()
    if whole_group:
        assert 'resumed from' in log.lower() or 'resume' in log.lower()
    else:
        assert 'waits for a process' in again.stderr or 'resume' in log.lower()
