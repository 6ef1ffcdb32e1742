"""A resumed run draws what it would have drawn; two models with one seed see the same images."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.runner.loops import _InfiniteDataloaderIterator
from mmseg.registry import HOOKS
from torch.utils.data import DataLoader

from mmseg_fusion.engine.hooks import IterationSeedHook


class Noise(torch.utils.data.Dataset):
    """Its items are numbers of all three generators, drawn when they are loaded."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(1).item()


def batches(
    seed: int, workers: int = 0, skip: int = 0, draws: int = 0, skip_iter: bool = False
) -> list:
    """Six batches of a training loop, and a number that its model draws with each.

    Args:
        seed: of the run.
        workers: processes that load.
        skip: how many were seen before the run was cut off.
        draws: how many numbers a model draws besides.
        skip_iter: whether MMEngine's newer loop resumes, which asks the batches to skip.
    """
    random.seed(7), np.random.seed(7), torch.manual_seed(7 + draws)
    loader = DataLoader(
        Noise(), batch_size=2, num_workers=workers, sampler=InfiniteSampler(Noise(), seed=seed),
        worker_init_fn=lambda worker: (random.seed(seed), np.random.seed(seed)),
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    loop = SimpleNamespace(dataloader_iterator=_InfiniteDataloaderIterator(loader))
    runner = SimpleNamespace(train_loop=loop, seed=seed)
    HOOKS.build(dict(type='IterationSeedHook')).before_train_epoch(runner)
    if skip_iter:
        loop.dataloader_iterator.skip_iter(skip)
    else:
        for _ in range(skip):
            next(loop.dataloader_iterator)
    # What is drawn between two batches, by validation or dropout, has no influence.
    found = []
    for _ in range(6 - skip):
        batch = [x.tolist() for x in next(loop.dataloader_iterator)]
        found.append((batch, torch.rand(1).item()))
        torch.rand(draws), np.random.rand(draws)
    return found


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('skip_iter', [False, True])
def test_a_resumed_run_draws_what_it_would_have_drawn(workers, skip_iter):
    whole = batches(3, workers)
    assert batches(3, workers, skip=4, skip_iter=skip_iter) == whole[4:]
    assert whole != batches(4, workers)
    assert len({str(b) for b in whole}) == 6


def test_a_model_that_draws_more_sees_the_same_images():
    assert batches(3, draws=11) == batches(3)


def test_every_process_draws_its_own(monkeypatch):
    first = batches(3)
    monkeypatch.setattr('mmseg_fusion.engine.hooks.iteration_seed_hook.get_rank', lambda: 1)
    second = batches(3)
    for (a, x), (b, y) in zip(first, second):
        assert a[0] == b[0]  # the sampler is not the hook's
        assert a[1:] != b[1:]
        assert x != y


def test_a_loop_over_epochs_is_seeded_per_epoch():
    runner = SimpleNamespace(train_loop=SimpleNamespace(), seed=3, epoch=0)
    found = []
    for epoch in (0, 1, 0):
        runner.epoch = epoch
        IterationSeedHook().before_train_epoch(runner)
        found.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert found[0] == found[2] != found[1]
