"""A training run that is killed again and again ends with the weights of one that never was."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import TextIO

import pytest
import torch

from .running import TOOLS, Again, load, small_config

#: How often a run is killed; ``KILLS=10 pytest tests/tools/test_kills.py`` for more.
KILLS = int(os.environ.get('KILLS', '2'))
#: Of training, saved every 2.
ITERATIONS = 4 * KILLS
HOOKS = """
custom_hooks = [
    dict(type='ScaleEqualizerHook', mode='module', num_samples=4),
    dict(type='EMAHook', momentum=0.1),
]
default_hooks['checkpoint'].update(interval=2)
"""


def start(config: Path, work: Path, folder: Path) -> tuple[Again, TextIO]:
    """A run, and its log as it grows: what is read is where the run is."""
    pipe = folder / 'printed'
    if not pipe.exists():
        os.mkfifo(pipe)
    command = [str(TOOLS / 'train.py'), config.name, '--work-dir', str(work), '--resume']
    return Again(command, folder, pipe, pipe), pipe.open()


def finish(run: Again, printed: TextIO) -> None:
    with printed:
        said = printed.read()
    assert run.wait() == 0, said[-3000:]


@pytest.mark.stack
def test_killed_runs_end_with_the_same_weights(tmp_path):
    config = small_config(tmp_path, hook=True, iterations=ITERATIONS)
    with config.open('a') as file:
        file.write(HOOKS)
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    finish(*start(config, whole, tmp_path))

    # At random, but the same at every run of the test. Killed at a line of the log, then a little
    # later: as it trains, saves, or writes the name of what it saved.
    rng = random.Random(0)
    kills, moments = 0, []
    while kills < KILLS:
        run, printed = start(config, killed, tmp_path)
        lines = rng.randint(1, 8)
        for line in printed:
            if 'Iter(train)' in line or 'Saving checkpoint' in line:
                lines -= 1
                moment = line.partition('INFO - ')[2][:40].strip()
            if not lines:
                break
        time.sleep(rng.uniform(0, 0.4))
        if run.running():
            os.kill(run.pid, signal.SIGKILL)
        printed.close()
        if run.wait() == -signal.SIGKILL:
            kills += 1
            moments.append(moment)
        elif (killed / f'iter_{ITERATIONS}.pth').exists():
            break
        for path in killed.glob('*.pth'):
            load(path)  # never in part
    print(f'{kills} kills, at: {"; ".join(moments)}')
    assert kills
    finish(*start(config, killed, tmp_path))

    ours, expected = (load(work / f'iter_{ITERATIONS}.pth') for work in (killed, whole))
    assert ours['meta']['iter'] == expected['meta']['iter'] == ITERATIONS
    for part in ('state_dict', 'ema_state_dict'):
        assert ours[part].keys() == expected[part].keys()
        different = [k for k, v in expected[part].items() if not torch.equal(ours[part][k], v)]
        assert not different, (part, different[:5])
    assert len(expected['ema_state_dict']) > len(expected['state_dict'])
