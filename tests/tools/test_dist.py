"""The launch scripts: two processes on the CPU for real, Slurm through a stand-in for srun."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .running import TOOLS, environment, forked_python, load, small_config

RECORDER = """#!{python}
import json, os, sys
names = 'NNODES NODE_RANK MASTER_ADDR PORT'.split()
with open({out!r}, 'a') as file:
    file.write(json.dumps(sys.argv[1:]) + '\\n')
if '-c' in sys.argv:
    exec(sys.argv[sys.argv.index('-c') + 1])
"""

SRUN = """#!{python}
import json, os, sys
arguments = sys.argv[1:]
with open({out!r}, 'w') as file:
    json.dump(arguments, file)
start = arguments.index('-u') - 1
if os.environ.get('RUN_TASKS'):
    os.environ.update(
        SLURM_PROCID='0', SLURM_LOCALID='0', SLURM_NTASKS='1', SLURM_NODELIST='localhost')
    os.execv(arguments[start], arguments[start:])
"""


def bash(script: str, *arguments: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Runs a script; every process that it starts imports from nothing unless PYTHON is another."""
    command = ['bash', str(TOOLS / script), *map(str, arguments)]
    env = environment(**{'PYTHON': sys.executable, **env})
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def succeeded(result: subprocess.CompletedProcess) -> str:
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-5000:]
    return output


# --- two processes -------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[Path, str]:
    """A folder with a run of two processes over 3 iterations, and what they printed."""
    folder = tmp_path_factory.mktemp('distributed')
    config = small_config(folder, hook=True, iterations=3)
    with config.open('a') as file:
        file.write("model['backbone'].update(norm_cfg=dict(type='SyncBN', requires_grad=True))\n")
    result = bash('dist_train.sh', 'small.py', 2, '--work-dir', 'work', cwd=folder)
    return folder, succeeded(result)


@pytest.mark.stack
def test_two_processes_train_on_the_cpu(trained):
    folder, output = trained
    assert 'gloo instead of nccl' in output
    assert re.search(r'SyncBatchNorm needs GPUs: \d+ layers are BatchNorm here', output)
    # 8 scenes, 2 processes of 2 scenes each: validation sees 3 scenes in 2 rounds.
    assert 'Iter(train) [3/3]' in output
    assert 'Iter(val) [2/2]' in output
    # The hook of the config ran.
    assert list((folder / 'work').rglob('scale_equalizer.json'))
    # One log: the second process is quiet.
    assert output.count('Iter(train) [3/3]') == 1
    checkpoint = load(folder / 'work' / 'iter_3.pth')
    assert not any(name.startswith('module.') for name in checkpoint['state_dict'])


@pytest.mark.stack
def test_two_processes_test_what_one_process_tests(trained):
    folder, _ = trained
    metrics = {}
    for processes in (1, 2):
        arguments = ['small.py', 'work/iter_3.pth', processes, '--work-dir', f'test{processes}']
        succeeded(bash('dist_test.sh', *arguments, cwd=folder, PYTHON=forked_python()))
        report = next((folder / f'test{processes}').glob('*/*.json'))
        metrics[processes] = json.loads(report.read_text())
    for name in ('aAcc', 'mIoU', 'mAcc'):
        # Each scene counts once, whichever process has seen it.
        assert metrics[1][name] == metrics[2][name]


@pytest.mark.stack
def test_two_processes_resume_from_their_own_checkpoint(trained, tmp_path):
    folder, _ = trained
    work = tmp_path / 'work'
    shutil.copytree(folder / 'work', work, ignore=shutil.ignore_patterns('2*'))
    # What the first start took: another run's checkpoint, of a later iteration.
    other = load(folder / 'work' / 'iter_3.pth')
    other['meta']['iter'] = 9
    torch.save(other, tmp_path / 'other.pth')
    options = [f'load_from={tmp_path / "other.pth"}', 'train_cfg.max_iters=4']
    arguments = ['small.py', 2, '--work-dir', work, '--resume', '--cfg-options', *options]
    output = succeeded(bash('dist_train.sh', *arguments, cwd=folder, PYTHON=forked_python()))
    assert f'--resume: continues from {work / "iter_3.pth"}' in output
    assert 'Iter(train) [4/4]' in output
    assert load(work / 'iter_4.pth')['meta']['iter'] == 4


# --- what is handed to the launcher --------------------------------------------------------------


@pytest.fixture
def recorder(tmp_path) -> Path:
    """An interpreter that writes down how it was called."""
    path = tmp_path / 'python'
    path.write_text(RECORDER.format(python=sys.executable, out=str(tmp_path / 'calls')))
    path.chmod(0o755)
    return path


def launched(recorder: Path) -> list[str]:
    """The arguments of torch's launcher."""
    calls = [json.loads(line) for line in (recorder.parent / 'calls').read_text().splitlines()]
    (call,) = (call for call in calls if call[:2] == ['-m', 'torch.distributed.run'])
    return call[2:]


def dist(recorder: Path, script: str, *arguments: object, **env: str) -> list[str]:
    env = environment(PYTHON=str(recorder), **env)
    command = ['bash', str(TOOLS / script), *map(str, arguments)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    succeeded(result)
    return launched(recorder)


def test_one_machine_gets_a_free_port(recorder):
    options = dist(recorder, 'dist_train.sh', 'config.py', 4, '--amp', '--work-dir', 'a b')
    port = next(int(o.partition('=')[2]) for o in options if o.startswith('--master_port='))
    assert 1024 < port < 65536
    assert '--nnodes=1' in options
    assert '--node_rank=0' in options
    assert '--master_addr=127.0.0.1' in options
    assert '--nproc_per_node=4' in options
    tail = ['config.py', '--launcher', 'pytorch', '--amp', '--work-dir', 'a b']
    assert options[-7:] == [str(TOOLS / 'train.py'), *tail]


def test_several_machines_meet_at_the_first(recorder):
    env = dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1')
    options = dist(recorder, 'dist_test.sh', 'config.py', 'some.pth', 8, '--tta', **env)
    assert options == [
        '--nnodes=2', '--node_rank=1', '--master_addr=10.0.0.1', '--nproc_per_node=8',
        '--master_port=29500', str(TOOLS / 'test.py'), 'config.py', 'some.pth',
        '--launcher', 'pytorch', '--tta',
    ]  # fmt: skip


def test_a_port_that_is_given_is_taken(recorder):
    assert '--master_port=1234' in dist(recorder, 'dist_train.sh', 'config.py', 1, PORT='1234')


@pytest.mark.parametrize(
    ('script', 'arguments'),
    [
        ('dist_train.sh', ['config.py']),
        ('dist_test.sh', ['config.py', 'some.pth']),
        ('slurm_train.sh', ['partition', 'job']),
        ('slurm_test.sh', ['partition', 'job', 'config.py']),
    ],
)
def test_too_few_arguments_print_the_usage(script, arguments, tmp_path):
    result = bash(script, *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert f'bash tools/{script} ' in result.stderr
    assert 'GPUS' in result.stderr


# --- Slurm ---------------------------------------------------------------------------------------


@pytest.fixture
def srun(tmp_path) -> dict[str, str]:
    """A stand-in for srun; the environment that has it first on its path."""
    path = tmp_path / 'srun'
    path.write_text(SRUN.format(python=sys.executable, out=str(tmp_path / 'call.json')))
    path.chmod(0o755)
    return dict(PATH=f'{tmp_path}:/usr/bin:/bin')


def test_slurm_train_asks_for_the_resources(srun, tmp_path):
    env = dict(GPUS='8', GPUS_PER_NODE='2', CPUS_PER_TASK='3', SRUN_ARGS='--quotatype=auto -x n1')
    arguments = ['gpu', 'a job', 'config.py', '--work-dir', 'a b']
    succeeded(bash('slurm_train.sh', *arguments, cwd=tmp_path, **srun, **env))
    assert json.loads((tmp_path / 'call.json').read_text()) == [
        '-p', 'gpu', '--job-name=a job', '--gres=gpu:2', '--ntasks=8', '--ntasks-per-node=2',
        '--cpus-per-task=3', '--kill-on-bad-exit=1', '--quotatype=auto', '-x', 'n1',
        sys.executable, '-u', str(TOOLS / 'train.py'), 'config.py', '--launcher=slurm',
        '--work-dir', 'a b',
    ]  # fmt: skip


def test_slurm_test_has_mmsegs_defaults(srun, tmp_path):
    succeeded(bash('slurm_test.sh', 'gpu', 'job', 'config.py', 'some.pth', cwd=tmp_path, **srun))
    assert json.loads((tmp_path / 'call.json').read_text()) == [
        '-p', 'gpu', '--job-name=job', '--gres=gpu:4', '--ntasks=4', '--ntasks-per-node=4',
        '--cpus-per-task=5', '--kill-on-bad-exit=1',
        sys.executable, '-u', str(TOOLS / 'test.py'), 'config.py', 'some.pth', '--launcher=slurm',
    ]  # fmt: skip


@pytest.mark.stack
def test_a_slurm_task_trains(srun, tmp_path):
    small_config(tmp_path, iterations=2)
    env = dict(RUN_TASKS='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')
    arguments = ['cpu', 'job', 'small.py', '--work-dir', 'work']
    output = succeeded(bash('slurm_train.sh', *arguments, cwd=tmp_path, **srun, **env))
    assert 'Iter(train) [2/2]' in output
    assert (tmp_path / 'work' / 'last_checkpoint').is_file()
    # Again, as after a time limit: load_from is for the first start.
    arguments += ['--resume', '--cfg-options', 'load_from=nowhere.pth', 'train_cfg.max_iters=3']
    env['PYTHON'] = forked_python()
    output = succeeded(bash('slurm_train.sh', *arguments, cwd=tmp_path, **srun, **env))
    assert re.search(r'--resume: continues from .*iter_2\.pth.*nowhere\.pth', output)
    assert 'Iter(train) [3/3]' in output


@pytest.mark.parametrize('name', ['dist_train.sh', 'dist_test.sh'])
def test_interpreter_of_make_where_python_has_no_torch(repo_root, tmp_path, name):
    for path, text in (('bin/python', 'exit 1'), ('.venv/bin/python', 'echo "made $@"')):
        script = tmp_path / path
        script.parent.mkdir(parents=True)
        script.write_text(f'#!/bin/sh\n{text}\n')
        script.chmod(0o755)
    (tmp_path / 'tools').mkdir()
    shutil.copy(repo_root / 'tools' / name, tmp_path / 'tools')
    env = dict(os.environ, PATH=f'{tmp_path / "bin"}:{os.environ["PATH"]}', PORT='29501')
    env.pop('PYTHON', None)
    command = ['bash', tmp_path / 'tools' / name, 'config.py', '1', '1']
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.startswith('made -m torch.distributed.run'), done.stderr
    # Named, it is taken as it is.
    chosen = subprocess.run(command, env=dict(env, PYTHON='false'), capture_output=True)
    assert chosen.returncode == 1
