"""The hook in two processes with gloo: the weights that one process gives on the same batches."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner

from ..distributed import in_processes
from .small import config

pytestmark = [pytest.mark.stack, pytest.mark.filterwarnings('ignore')]


def work(rank: int, world: int, folder: Path, options: dict) -> dict:
    """The weights and the record that a run begins with."""
    cfg = config(folder, max_iters=1, **options)
    cfg.launcher = 'pytorch' if world > 1 else 'none'
    cfg.env_cfg = dict(dist_cfg=dict(backend='gloo'))
    runner = Runner.from_cfg(cfg)
    hook = next(h for h in runner.hooks if type(h).__name__ == 'ScaleEqualizerHook')
    original, kept = hook.before_train, {}

    def keep(runner):
        original(runner)
        model = getattr(runner.model, 'module', runner.model)
        kept.update(state=copy.deepcopy(model.state_dict()), record=hook.record)

    hook.before_train = keep
    runner.train()
    return kept


def run(path: Path, world: int, options: dict) -> list[dict]:
    return in_processes(work, world, path, path, options)


@pytest.mark.parametrize(
    ('images', 'hook'),
    [
        (16, dict(batch_size=4)),  # two batches each
        (12, dict(batch_size=4)),  # three batches for two processes
        (4, dict(batch_size=4, mode='module')),  # one process has none
    ],
    ids=['even', 'uneven', 'one has none'],
)
def test_two_processes_give_the_weights_of_one(tmp_path, images, hook):
    options = dict(hook=hook, length=images)
    one = run(tmp_path / 'one', 1, options)[0]
    two = run(tmp_path / 'two', 2, options)
    for key, value in two[0]['state'].items():
        assert torch.equal(value, two[1]['state'][key])
        torch.testing.assert_close(value, one['state'][key], rtol=1e-6, atol=1e-6)
    assert two[0]['record'] == two[1]['record']
    assert two[0]['record']['num_images'] == images
    for ours, theirs in zip(two[0]['record']['layers'], one['record']['layers']):
        assert ours['std'] == pytest.approx(theirs['std'], rel=1e-9)
        assert ours['mean'] == pytest.approx(theirs['mean'], rel=1e-9)


def test_head_that_talks_in_its_forward_pass_does_not_hang(tmp_path):
    """EMAHead averages its bases over the processes in every pass; three batches for two."""
    head = dict(
        type='EMAHead', in_channels=32, in_index=3, channels=6, ema_channels=6, num_bases=4,
        num_stages=1, num_classes=8, norm_cfg=dict(type='BN'),
    )  # fmt: skip
    options = dict(
        head=head, hook=dict(batch_size=2), length=6, find_unused_parameters=True,
    )  # fmt: skip
    first, second = run(tmp_path, 2, options)
    assert first['record'] == second['record']
    assert first['record']['num_images'] == 6
    assert all(torch.equal(v, second['state'][k]) for k, v in first['state'].items())
