"""Random numbers that depend on the seed and the iteration alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seeds Python, NumPy and PyTorch anew before every training batch is loaded.

    Two things follow. A run that was cut off goes on with the very numbers that it would have
    drawn (MMEngine restores weights, optimizer and the place in the data, but no random state).
    And two models that are trained with one seed see the same images, cut and coloured alike,
    whatever numbers their layers draw, so that their difference is a paired one.

    The seed is the runner's (``randomness=dict(seed=...)``). With worker processes the images are
    drawn in these, from seeds that MMEngine derives from the same one. On resume what was seen
    before is loaded once more, so that the workers are where they were.

    Example:
        >>> from mmengine.registry import HOOKS
        >>> HOOKS.build(dict(type='IterationSeedHook')).priority
        'VERY_HIGH'
    """

    # Before a hook that measures or trains with the loader of the run.
    priority = 'VERY_HIGH'

    def before_train_epoch(self, runner: Runner) -> None:
        """Wraps the loop's batches; a loop over epochs, which has none, is seeded per epoch."""
        loop = runner.train_loop
        if hasattr(loop, 'dataloader_iterator'):
            if not isinstance(loop.dataloader_iterator, _SeededBatches):
                loop.dataloader_iterator = _SeededBatches(loop.dataloader_iterator, runner.seed)
        else:
            _seed(runner.seed, runner.epoch)


class _SeededBatches:
    """Batches of ``batches``, each loaded, and used, with numbers of its own."""

    def __init__(self, batches: Iterator[Any], seed: int) -> None:
        self.batches, self.seed, self.count = batches, seed, 0

    def __iter__(self) -> _SeededBatches:
        return self

    def __next__(self) -> Any:
        _seed(self.seed, self.count)
        self.count += 1
        return next(self.batches)

    def skip_iter(self, num_iters: int) -> None:
        """Loads ``num_iters`` batches for nothing; newer versions of MMEngine call it on resume.

        Their own moves the sampler alone, and leaves workers with the numbers of a fresh start.
        """
        for _ in range(num_iters):
            next(self)


def _seed(seed: int, step: int) -> None:
    # Every process its own numbers: their images differ, and so shall their flips.
    numbers = np.random.SeedSequence([seed, get_rank(), step])
    value = int(numbers.generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
