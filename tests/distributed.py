"""What tests with several processes share."""

from __future__ import annotations

import atexit
import functools
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.multiprocessing as mp
from mmengine.registry import DefaultScope

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def leave(folder: Path, rank: int, world: int) -> None:
    """Ends this process once all have got here; what it found must be on the disk.

    A process that takes down Python with gloo's threads at work may be aborted by a tensor that
    they free too late: it leaves without doing so.
    """
    (folder / f'done{rank}').touch()
    while not all((folder / f'done{r}').exists() for r in range(world)):
        time.sleep(0.02)
    os._exit(0)


@functools.cache
def start_server() -> None:
    """Starts the program that forks a process per job: once it has imported what they need."""
    forkserver.set_forkserver_preload(['tests.preload'])
    path = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path)):
        forkserver.ensure_running()
    pid = forkserver._forkserver._forkserver_pid

    def stop() -> None:
        # Waited for: what it took is time of the tests.
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    atexit.register(stop)


def work(rank: int, world: int, port: int, folder: Path, function: Callable, args: tuple) -> None:
    """What one of the processes does."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    # As in a process that was not forked.
    random.seed()
    np.random.seed()
    torch.set_num_threads(1)
    with DefaultScope.overwrite_default_scope('mmseg'):
        torch.save(function(rank, world, *args), folder / f'rank{rank}.pth')
    leave(folder, rank, world)


def in_processes(
    function: Callable, world: int, folder: Path, *args: object, seconds: float = 300
) -> list:
    """Calls a function in several processes at once, which may make a process group.

    Each is new, with the environment that torch's launcher gives; what takes seconds to import it
    has from the process that it is a fork of.

    Args:
        function: of a module; called with the number of its process, ``world`` and ``args``.
        world: how many processes.
        folder: for what they find; made where it is not there.
        args: more arguments for the function.
        seconds: that they may take.

    Returns:
        What the function returned in each.

    Raises:
        torch.multiprocessing.ProcessRaisedException: where one raised; with its traceback.
        TimeoutError: where one did not end; none is left.
    """
    start_server()
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    started = mp.start_processes(
        work,
        (world, free_port(), folder, function, args),
        nprocs=world,
        join=False,
        start_method='forkserver',
    )
    try:
        while not started.join(max(0, end - time.monotonic())):
            if time.monotonic() >= end:
                raise TimeoutError(f'{function.__name__} did not end in {seconds} s')
    finally:
        for process in started.processes:
            process.kill()
            process.join()
    return [torch.load(folder / f'rank{r}.pth', weights_only=False) for r in range(world)]
