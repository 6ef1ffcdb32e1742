"""Processes of a test: what each is, and what an error and a hang in one give."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.dist import all_reduce, init_dist
from torch.multiprocessing import ProcessRaisedException

from .distributed import in_processes

pytestmark = pytest.mark.stack


def add(rank: int, world: int, more: int) -> dict:
    preloaded = 'mmseg.apis' in sys.modules and 'tests.preload' in sys.modules
    grouped = torch.distributed.is_initialized()
    init_dist('pytorch', backend='gloo')
    total = torch.tensor(10 * rank + more)
    all_reduce(total)
    return dict(
        pid=os.getpid(),
        total=int(total),
        world=torch.distributed.get_world_size(),
        preloaded=preloaded,
        grouped=grouped,
        drawn=(random.random(), float(np.random.rand())),
    )


def fail(rank: int, world: int) -> None:
    if rank == 1:
        raise KeyError('what went wrong')
    time.sleep(100)


def hang(rank: int, world: int, folder: Path) -> None:
    (folder / f'pid{rank}').write_text(str(os.getpid()))
    if rank == 0:
        init_dist('pytorch', backend='gloo')
        torch.distributed.barrier()
    while True:
        time.sleep(0.1)


def test_each_job_has_new_processes_and_a_group_of_its_own(tmp_path):
    jobs = [in_processes(add, 2, tmp_path / str(more), more) for more in (1, 2)]
    assert [found['total'] for job in jobs for found in job] == [12, 12, 14, 14]
    found = [one for job in jobs for one in job]
    assert len({os.getpid(), *(one['pid'] for one in found)}) == 5
    assert len({one['drawn'] for one in found}) == 4
    for one in found:
        assert one['world'] == 2
        assert one['preloaded']
        assert not one['grouped']


def test_an_error_in_one_is_raised_here_and_ends_the_other(tmp_path):
    with pytest.raises(ProcessRaisedException, match='what went wrong'):
        in_processes(fail, 2, tmp_path)
    assert not multiprocessing.active_children()


def test_a_hang_is_an_error_and_none_is_left(tmp_path):
    with pytest.raises(TimeoutError, match='hang did not end in 3 s'):
        in_processes(hang, 2, tmp_path, tmp_path, seconds=3)
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f'pid{rank}').read_text()), 0)
