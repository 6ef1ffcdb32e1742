"""``tools/train.py --resume``: the work dir's own last intact checkpoint, and nothing else."""

from __future__ import annotations

import logging
import os
import re
import runpy
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from mmseg_fusion.checkpoints import candidates, last_intact
from mmseg_fusion.errors import CheckpointError

from .running import TOOLS, load, small_config

pytestmark = pytest.mark.filterwarnings('ignore')


#: The second in which the last run of this process ended.
LAST_RUN: list[int] = []


def train(*arguments: object, folder: Path) -> str:
    """Runs ``tools/train.py`` in this process, in ``folder``; what it logged."""
    work = folder / arguments[arguments.index('--work-dir') + 1]
    # MMEngine names a run and its log by the second. A second one in it, in whatever folder, would
    # write into the first one's.
    while [int(time.time())] == LAST_RUN or (work / time.strftime('%Y%m%d_%H%M%S')).exists():
        time.sleep(0.05)
    before = set(work.glob('*/*.log'))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv', ['train.py', *map(str, arguments)])
        # mmengine's loggers hold on to the standard error of an earlier test.
        patch.setattr(logging, 'raiseExceptions', False)
        try:
            runpy.run_path(str(TOOLS / 'train.py'), run_name='__main__')
        finally:
            LAST_RUN[:] = [int(time.time())]
    (log,) = set(work.glob('*/*.log')) - before
    return log.read_text()


def iterations(log: str) -> list[int]:
    """Those that were trained."""
    return [int(number) for number in re.findall(r'Iter\(train\) \[\s*(\d+)/', log)]


def same_weights(one: Path, other: Path) -> bool:
    one, other = load(one)['state_dict'], load(other)['state_dict']
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> Path:
    """A folder with two configs that begin from the last checkpoint of a third, and their runs.

    ``psp.py`` is trained in ``psp``. ``next.py`` has its model, ``gff.py`` another, and both
    ``load_from`` it; ``next`` and ``gff`` are their whole runs.
    """
    folder = tmp_path_factory.mktemp('resume')
    base = small_config(folder)
    head = (
        "type='PSPHead', in_channels=64, in_index=3, channels=8, pool_scales=(1, 2),\n"
        "    num_classes=8, norm_cfg=dict(type='BN'), dropout_ratio=0.0"
    )
    common = (
        "_base_ = 'small.py'\nrandomness = dict(_delete_=True, seed=0)\n"
        "load_from = 'psp/iter_6.pth'\n"
    )
    model = 'model = dict(auxiliary_head=None, decode_head=dict(_delete_=True, {}))\n'
    (folder / 'next.py').write_text(common + model.format(head))
    (folder / 'psp.py').write_text("_base_ = 'next.py'\nload_from = None\n")
    (folder / 'gff.py').write_text(
        common + model.format(
            "type='GFFHead', in_channels=[8, 16, 32, 64], channels=8, num_classes=8,\n"
            '    in_index=[0, 1, 2, 3], neck=dict(num_convs=0), dropout_ratio=0.0,\n'
            "    context=dict(type='PSPHead', channels=8, pool_scales=(1, 2)),\n"
            "    norm_cfg=dict(type='BN')"
        )
    )  # fmt: skip
    assert base.name == 'small.py'
    for name in ('psp', 'next', 'gff'):
        train(f'{name}.py', '--work-dir', name, folder=folder)
    return folder


def killed(runs: Path, name: str, to: Path, after: int = 3) -> Path:
    """What is left in ``to`` of the run ``name`` that was killed after some iterations."""
    to.mkdir()
    for count in range(3, after + 1, 3):
        shutil.copy(runs / name / f'iter_{count}.pth', to)
    (to / 'last_checkpoint').write_text(str(to / f'iter_{after}.pth'))
    return to


@pytest.mark.stack
@pytest.mark.parametrize('name', ['next', 'gff'])
def test_load_from_is_for_the_first_start(runs, tmp_path, name):
    # mmengine goes on from load_from: it trains nothing (next: 6 of 6 iterations are done), or
    # stops with "parameter group that doesn't match" (gff).
    work = killed(runs, name, tmp_path / 'work')
    log = train(f'{name}.py', '--work-dir', work, '--resume', folder=runs)
    assert f'--resume: continues from {work / "iter_3.pth"}, the last one of {work}' in log
    assert "load_from='psp/iter_6.pth' is what a fresh start would take" in log
    assert iterations(log) == [4, 5, 6]
    assert same_weights(work / 'iter_6.pth', runs / name / 'iter_6.pth')


@pytest.mark.stack
def test_load_from_on_the_command_line_is_for_the_first_start_too(runs, tmp_path):
    # KSAC's stages: the same command again, with --resume.
    work = killed(runs, 'next', tmp_path / 'work')
    options = ['--cfg-options', 'load_from=psp/iter_6.pth']
    log = train('--resume', 'next.py', '--work-dir', work, *options, folder=runs)
    assert iterations(log) == [4, 5, 6]
    assert same_weights(work / 'iter_6.pth', runs / 'next' / 'iter_6.pth')


@pytest.mark.stack
def test_nothing_to_resume_is_a_fresh_start(runs, tmp_path):
    work = tmp_path / 'work'
    log = train('next.py', '--work-dir', work, '--resume', folder=runs)
    assert f"{work} holds no checkpoint: a fresh start from load_from='psp/iter_6.pth'" in log
    assert iterations(log) == [1, 2, 3, 4, 5, 6]
    assert same_weights(work / 'iter_6.pth', runs / 'next' / 'iter_6.pth')


@pytest.mark.stack
def test_a_truncated_last_checkpoint_is_passed_over(runs, tmp_path):
    work = killed(runs, 'next', tmp_path / 'work', after=6)
    whole = (work / 'iter_6.pth').read_bytes()
    (work / 'iter_6.pth').write_bytes(whole[: len(whole) // 2])
    log = train('next.py', '--work-dir', work, '--resume', folder=runs)
    (warning,) = (line for line in log.splitlines() if 'cannot be resumed from' in line)
    assert 'WARNING' in warning
    assert str(work / 'iter_6.pth') in warning
    assert f'going back to {work / "iter_3.pth"}' in warning
    assert 'it is truncated' in warning
    assert iterations(log) == [4, 5, 6]
    assert same_weights(work / 'iter_6.pth', runs / 'next' / 'iter_6.pth')


def test_no_intact_checkpoint_stops_and_keeps_them(runs, tmp_path):
    work = killed(runs, 'next', tmp_path / 'work')
    (work / 'iter_3.pth').write_bytes(b'')
    with pytest.raises(SystemExit, match=r'no checkpoint that a run can resume from.*iter_3\.pth'):
        train('next.py', '--work-dir', work, '--resume', folder=runs)
    assert (work / 'iter_3.pth').read_bytes() == b''
    assert [path.name for path in work.glob('*.pth')] == ['iter_3.pth']


@pytest.mark.stack
def test_a_checkpoint_that_is_given_is_taken(runs, tmp_path):
    work = killed(runs, 'next', tmp_path / 'work')
    given = runs / 'next' / 'iter_6.pth'
    options = ['--cfg-options', 'train_cfg.max_iters=7']
    log = train('next.py', '--work-dir', work, '--resume', given, *options, folder=runs)
    assert f'--resume: continues from {given}, that was given' in log
    assert iterations(log) == [7]


def test_a_checkpoint_of_another_model_says_so(runs, tmp_path):
    given = runs / 'psp' / 'iter_6.pth'
    with pytest.raises(SystemExit, match=r'is none of this run.*load_from=.*without --resume'):
        train('gff.py', '--work-dir', tmp_path / 'work', f'--resume={given}', folder=runs)
    weights = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=load(given)['state_dict']), weights)
    with pytest.raises(SystemExit, match=r'weights\.pth is none of this run.*load_from='):
        train('next.py', '--work-dir', tmp_path / 'work', f'--resume={weights}', folder=runs)


@pytest.mark.stack
def test_a_run_that_is_complete_says_so(runs, tmp_path):
    work = killed(runs, 'next', tmp_path / 'work', after=6)
    log = train('next.py', '--work-dir', work, '--resume', folder=runs)
    assert 'nothing is left to train' in log
    assert 'iteration 6 of 6' in log
    assert iterations(log) == []


# --- which checkpoint is the last ------------------------------------------------------------


def saved(path: Path, **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=dict(a=torch.zeros(1)), meta={}, message_hub={}, **more), path)
    return path


def test_order_of_the_checkpoints(tmp_path):
    assert candidates(tmp_path / 'nowhere') == []
    paths = {name: saved(tmp_path / f'{name}.pth') for name in ('iter_2', 'iter_10', 'iter_9')}
    saved(tmp_path / 'best_mIoU_iter_11.pth')
    (tmp_path / '.iter_12.pth.unfinished').touch()
    by_number = [paths['iter_10'], paths['iter_9'], paths['iter_2']]
    assert candidates(tmp_path) == by_number
    # Killed as it wrote the name.
    (tmp_path / 'last_checkpoint').touch()
    assert candidates(tmp_path) == by_number
    (tmp_path / 'last_checkpoint').write_text(f'{paths["iter_9"]}\n')
    assert candidates(tmp_path) == [paths['iter_9'], paths['iter_10'], paths['iter_2']]


def test_a_copied_work_dir_has_its_own(tmp_path):
    old = saved(tmp_path / 'old' / 'iter_3.pth')
    new = saved(tmp_path / 'new' / 'iter_3.pth')
    (new.parent / 'last_checkpoint').write_text(str(old))
    assert candidates(new.parent) == [new]
    # CheckpointHook.out_dir: they lie elsewhere.
    new.unlink()
    second = saved(tmp_path / 'old' / 'iter_2.pth')
    assert candidates(new.parent) == [old, second]


def test_what_a_run_cannot_resume_from_is_passed_over(tmp_path):
    torch.save(dict(state_dict=dict(a=torch.zeros(1))), tmp_path / 'iter_3.pth')
    os.mkdir(tmp_path / 'iter_4.pth')
    with pytest.raises(CheckpointError, match='not the state of a run'):
        last_intact(tmp_path)
    good = saved(tmp_path / 'iter_1.pth')
    path, passed_over = last_intact(tmp_path)
    assert path == str(good)
    assert list(passed_over) == [str(tmp_path / 'iter_3.pth')]
    assert last_intact(tmp_path / 'nowhere') == (None, {})
