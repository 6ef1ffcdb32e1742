"""tools/compare.py as a subprocess on FusionShapes; the statistics are in tests/analysis."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from mmseg_fusion.analysis.comparison import BEGIN, END

from .running import ROOT, TOOLS, Again, forked_python, load_tool, run_again, small_config

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


def of_its_own(printed: str) -> str:
    """What compare.py prints, without the line that the fork of mmengine says when imported."""
    return printed.replace('Could not import OneDL\n', '')


@pytest.fixture(scope='module')
def compared(tmp_path_factory) -> Path:
    """A folder in which two configs were compared, side by side."""
    folder = tmp_path_factory.mktemp('compared')
    paths = [p.name for p in configs(folder)]
    result = run_again(
        TOOL, *paths, '--seeds', 0, '--work-dir', 'work', '--threads', 1, '--jobs', 2,
        '--title', 'Width', '--plot', 'plot.png', cwd=folder, python=forked_python(),
    )  # fmt: skip
    (folder / 'printed.txt').write_text(of_its_own(result.stdout))
    return folder


@pytest.mark.stack
def test_compare_trains_tests_and_prints_one_table(compared):
    runs = results(compared / 'work' / 'results.json')
    assert list(runs) == [('narrow', 0), ('wide', 0)]
    for (name, seed), found in runs.items():
        assert (compared / 'work' / name / f'seed-{seed}' / 'iter_6.pth').is_file()
        assert len(found['IoU']) == 8
        assert found['mIoU'] == pytest.approx(sum(found['IoU'].values()) / 8, abs=1e-3)
        assert found['iterations'] == 6
    narrow, wide = runs['narrow', 0], runs['wide', 0]
    assert narrow['parameters'] < wide['parameters']
    # What tools/test.py says of the same checkpoint.
    work = compared / 'work' / 'wide' / 'seed-0'
    arguments = [work / 'config.py', work / 'iter_6.pth']
    said = run_again(TOOLS / 'test.py', *arguments, cwd=compared).stdout
    assert re.search(rf'mIoU: {wide["mIoU"]:.2f}\d*\b', said)
    lines = (compared / 'printed.txt').read_text().splitlines()
    assert lines[0] == 'Width'
    row = next(line for line in lines if line.startswith('wide ')).split()
    assert row[1] == f'{wide["mIoU"]:.2f}'
    assert row[4] == f'{wide["mIoU"] - narrow["mIoU"]:+.2f}'
    assert (compared / 'plot.png').stat().st_size > 1000


@pytest.mark.stack
def test_models_of_one_seed_see_the_same_images(compared):
    # The first loss differs with the weights; the first image does not: it is drawn before any.
    first = {}
    for name in ('narrow', 'wide'):
        scalars = next((compared / 'work' / name / 'seed-0').glob('*/vis_data/scalars.json'))
        first[name] = json.loads(scalars.read_text().splitlines()[0])
        config = (compared / 'work' / name / 'seed-0' / 'config.py').read_text()
        assert 'IterationSeedHook' in config
        assert 'seed=0' in config
    assert first['narrow']['loss'] != first['wide']['loss']


@pytest.mark.stack
def test_finished_runs_are_taken_from_the_record(compared, tmp_path):
    # As in a fresh clone: the record is there, the work directories are gone.
    names = [p.name for p in configs(tmp_path)]
    record = tmp_path / 'record.json'
    before = (compared / 'work' / 'results.json').read_text()
    record.write_text(before)
    options = ['--seeds', 0, '--title', 'Width', '--results', record]
    found = run_again(TOOL, *names, *options, cwd=tmp_path)
    assert record.read_text() == before
    assert of_its_own(found.stdout) == (compared / 'printed.txt').read_text()
    assert not (tmp_path / 'work_dirs').exists()
    # The page, the lines of another page, and the same again without any config.
    (tmp_path / 'other.md').write_text(f'a\n{BEGIN}\n{END}\nb\n')
    made = ['--write', 'page.md', '--insert', 'other.md']
    for _ in range(2):
        run_again(TOOL, '--from', 'record.json', *made, cwd=tmp_path)
    miou = f'{results(record)["wide", 0]["mIoU"]:.2f}'
    assert miou in (tmp_path / 'page.md').read_text()
    assert miou in (tmp_path / 'other.md').read_text()
    refused = ['--from', 'record.json', '--write', 'other.md']
    found = run_again(TOOL, *refused, cwd=tmp_path, check=False)
    assert found.returncode
    assert 'not made by this tool' in found.stderr


@pytest.mark.stack
def test_a_changed_config_is_refused_with_the_difference(compared, tmp_path):
    record = tmp_path / 'record.json'
    record.write_text((compared / 'work' / 'results.json').read_text())
    names = [p.name for p in configs(tmp_path)]
    with (tmp_path / 'wide.py').open('a') as file:
        file.write('optim_wrapper = dict(optimizer=dict(lr=0.5))\n')
    # By the record, and by what lies in the work directory.
    for where in (
        ['--results', record],
        ['--work-dir', compared / 'work', '--results', 'new.json'],
    ):
        found = run_again(TOOL, *names, '--seeds', 0, *where, cwd=tmp_path, check=False)
        assert found.returncode
        assert 'wide has changed' in found.stderr
        assert 'optim_wrapper.optimizer.lr: 0.003 -> 0.5' in found.stderr
        assert 'narrow has' not in found.stderr


@pytest.mark.stack
def test_one_failed_run_does_not_lose_the_others(compared, tmp_path):
    names = [p.name for p in configs(tmp_path)]
    with (tmp_path / 'narrow.py').open('a') as file:
        file.write("train_dataloader['dataset']['type'] = 'NoSuchDataset'\n")
    command = [*names, '--seeds', 0, '--threads', 1, '--work-dir', 'work', '--title', 'Width']
    found = run_again(TOOL, *command, cwd=tmp_path, check=False, python=forked_python())
    assert found.returncode
    assert '1 runs failed' in found.stderr
    assert 'narrow, seed 0' in found.stderr
    assert 'train.log ends with' in found.stderr
    assert 'NoSuchDataset' in found.stderr
    record = tmp_path / 'work' / 'results.json'
    assert results(record)['wide', 0] == results(compared / 'work' / 'results.json')['wide', 0]
    assert list(results(record)) == [('wide', 0)]
    assert 'not run yet' in found.stdout


def children(pid: int) -> list[int]:
    """Processes that a process has started, on Linux."""
    files = Path(f'/proc/{pid}/task').glob('*/children')
    return [int(child) for file in files for child in file.read_text().split()]


@pytest.mark.stack
@pytest.mark.skipif(sys.platform != 'linux', reason='finds the processes in /proc')
@pytest.mark.parametrize('whole', [True, False], ids=['all processes', 'compare alone'])
def test_killed_in_the_middle_gives_the_same_table(compared, tmp_path, whole):
    names = [p.name for p in configs(tmp_path)]
    # Of two configs one is trained: the other is there already.
    record = json.loads((compared / 'work' / 'results.json').read_text())
    record['runs'] = [r for r in record['runs'] if r['config'] == 'wide']
    (tmp_path / 'record.json').write_text(json.dumps(record))
    command = [
        *names, '--seeds', 0, '--work-dir', 'work', '--threads', 1, '--title', 'Width',
        '--results', 'record.json',
    ]  # fmt: skip
    nowhere = Path(os.devnull)
    python = sys.executable if whole else forked_python()
    process = Again([str(TOOL), *map(str, command)], tmp_path, nowhere, nowhere, python)
    folder = tmp_path / 'work' / 'narrow' / 'seed-0'
    deadline = time.monotonic() + 200
    while not (folder / 'last_checkpoint').is_file():
        assert process.running()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    trainings = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert trainings
    if whole:
        for pid in trainings:
            os.kill(pid, signal.SIGKILL)
        # Cut off between two checkpoints.
        assert not (folder / 'iter_6.pth').exists()
    assert not (folder / 'result.json').exists()

    again = run_again(TOOL, *command, cwd=tmp_path, python=python)
    expected = compared / 'work' / 'results.json'
    assert results(tmp_path / 'record.json') == {k: results(expected)[k] for k in results(expected)}
    said = of_its_own(again.stdout).splitlines()
    without_times = [re.sub(r'\d+\.\d+ +\d+ MB', '', line) for line in said]
    printed = (compared / 'printed.txt').read_text().splitlines()
    assert without_times == [re.sub(r'\d+\.\d+ +\d+ MB', '', line) for line in printed]
    assert '--resume: continues from' in (folder / 'train.log').read_text()
    if whole:
        # Of a training that was started from nothing: torch alone takes more.
        runs = json.loads((tmp_path / 'record.json').read_text())['runs']
        assert {r['config']: r['peak_memory_mb'] for r in runs}['narrow'] > 200


@pytest.mark.stack
def test_several_processes_per_run(tmp_path):
    names = [configs(tmp_path, iterations=2)[0].name]
    run_again(
        TOOL, *names, '--seeds', 3, '--launcher', 'pytorch', '--gpus-per-run', 2, '--threads', 1,
        '--cfg-options', 'default_hooks.checkpoint.interval=2', cwd=tmp_path,
        python=forked_python(),
    )  # fmt: skip
    record = json.loads((tmp_path / 'work_dirs/compare/results.json').read_text())
    assert [(r['config'], r['seed'], r['iterations']) for r in record['runs']] == [('narrow', 3, 2)]
    assert record['configs']['narrow']['options'] == {'default_hooks.checkpoint.interval': 2}


@pytest.fixture
def module(monkeypatch) -> ModuleType:
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location('compare', TOOL)
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'compare', tool)
    spec.loader.exec_module(tool)
    return tool


def test_commands_of_the_launchers(module, tmp_path):
    (tmp_path / 'narrow.py').touch()
    one = module.Run('narrow', 3, tmp_path, None, {})
    config, work = str(tmp_path / 'config.py'), ['--work-dir', str(tmp_path)]
    weights = tmp_path / 'iter_6.pth'

    def commands(*options: str) -> tuple[list[str], list[str]]:
        args = module.parse_args([str(tmp_path / 'narrow.py'), *options])
        return module.train_command(args, one), module.test_command(args, one, weights)

    train, test = commands('--amp')
    assert train == [sys.executable, str(TOOLS / 'train.py'), config, *work, '--amp']
    last = ['--work-dir', str(tmp_path / 'test')]
    assert test == [sys.executable, str(TOOLS / 'test.py'), config, str(weights), *last]
    train, test = commands('--launcher', 'pytorch', '--gpus-per-run', '4')
    assert train == ['bash', str(TOOLS / 'dist_train.sh'), config, '4', *work]
    assert test == ['bash', str(TOOLS / 'dist_test.sh'), config, str(weights), '4', *last]
    train, test = commands('--launcher', 'slurm', '--partition', 'long')
    script = str(TOOLS / 'slurm_train.sh')
    assert train == ['bash', script, 'long', 'narrow-3', config, *work]
    script = str(TOOLS / 'slurm_test.sh')
    assert test == ['bash', script, 'long', 'narrow-3-test', config, str(weights), *last]
    # Of a run that was cut off.
    (tmp_path / 'last_checkpoint').touch()
    assert commands()[0][-1] == '--resume'


def test_precision_and_processes_are_part_of_what_was_run(module, tmp_path, monkeypatch):
    names = [p.name for p in configs(tmp_path)]
    monkeypatch.chdir(tmp_path)

    def prints(*options: str) -> set[str]:
        args = module.parse_args([*names, *options])
        record = module.extended(module.comparison.empty('x', []), args)
        return {run.fingerprint for run in module.planned(record, args)}

    plain = prints()
    assert len(plain) == 2
    for options in (['--amp'], ['--launcher', 'pytorch', '--gpus-per-run', '2']):
        assert not prints(*options) & plain
    assert prints('--jobs', '2', '--threads', '1') == plain


def test_seeds_and_names_narrow_what_is_run(module, tmp_path, monkeypatch):
    names = [p.name for p in configs(tmp_path)]
    monkeypatch.chdir(tmp_path)
    performed = []

    def only_noted(args, runs, keep):
        performed.extend((run.name, run.seed) for run in runs)
        return []

    monkeypatch.setattr(module, 'perform_all', only_noted)

    def run(*options):
        performed.clear()
        monkeypatch.setattr('sys.argv', ['compare.py', *options])
        module.main()
        return performed

    everything = [(name, seed) for seed in (0, 1, 2) for name in ('narrow', 'wide')]
    assert run(*names, '--results', 'r.json') == everything
    again = ['--from', 'r.json', '--run']
    assert run(*again) == everything
    assert run(*again, '--seeds', '2', '0') == [r for r in everything if r[1] != 1]
    assert run(*again, '--seeds', '1', '--only', 'wide') == [('wide', 1)]
    with pytest.raises(SystemExit, match=r'--seeds: \[7\] are none of \[0, 1, 2\]'):
        run(*again, '--seeds', '7')
    # A seed of the command line joins the record, and it alone is run.
    assert run(*names, '--results', 'r.json', '--seeds', '3') == [('narrow', 3), ('wide', 3)]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'give configs'),
        (['narrow.py', '--from', 'x.json'], 'give configs'),
        (['narrow.py', '--run'], '--run goes with --from'),
        (['--from', __file__, '--seeds', 0], '--seeds goes with'),
        (['--from', 'x.json'], 'x.json is not a file'),
        (['narrow.py', 'narrow.py'], 'one name'),
        (['narrow.py', '--baseline', 'wide.py'], 'none of the configs'),
        (['narrow.py', '--seeds', 1, 1], 'stands twice'),
        (['narrow.py', '--gpus-per-run', 2], '--launcher'),
        (['narrow.py', '--launcher', 'slurm'], '--partition'),
        (['narrow.py', '--jobs', 0], '--jobs must be at least 1'),
        (['narow.py'], 'not a file'),
    ],
)
def test_wrong_arguments(arguments, message, module, tmp_path, monkeypatch, capsys):
    configs(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        module.parse_args([str(a) for a in arguments])
    assert error.value.code
    assert message in f'{error.value.code}{capsys.readouterr().err}'


def test_a_group_that_is_planned_again_keeps_its_note():
    tool = load_tool(TOOLS / 'compare.py')
    configs = sorted(str(path) for path in (ROOT / 'configs' / 'fusion_shapes').glob('gff*.py'))
    record = dict(groups=[], configs={}, seeds=[], runs=[])
    for last in (1, 2):
        args = tool.parse_args([*configs[:last], '--title', 'all', '--plan', '--results', 'r.json'])
        record = tool.extended(record, args)
        record['groups'][0].setdefault('note', 'written by hand')
    (group,) = record['groups']
    assert group['note'] == 'written by hand'
    assert group['configs'] == [Path(config).stem for config in configs[:2]]
