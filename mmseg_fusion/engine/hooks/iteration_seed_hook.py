"""Random numbers that depend only on the seed and the iteration."""

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
    """Seeds Python, NumPy and PyTorch before every training batch is loaded.

    This has two effects. An interrupted run continues with the same random numbers as without the
    interruption (MMEngine restores weights, optimizer and the position in the data, but no random
    state). And two models that are trained with the same seed see the same images with the same
    crops and colour changes, even if their layers draw different numbers of random values, so that
    their difference is paired.

    The seed is the runner's (``randomness=dict(seed=...)``). Worker processes augment the images
    with seeds that MMEngine derives from this seed. On resume the earlier batches are loaded once
    more, so that the workers reach the same random state.

    Example:
        >>> from mmengine.registry import HOOKS
        >>> HOOKS.build(dict(type='IterationSeedHook')).priority
        'VERY_HIGH'
    """

    # Before a hook that measures or trains with the loader of the run.
    priority = 'VERY_HIGH'

    def before_train_epoch(self, runner: Runner) -> None:
        """Wraps the loop's batches; a loop over epochs is seeded once per epoch."""
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
        """Loads and drops ``num_iters`` batches; newer versions of MMEngine call it on resume.

        MMEngine's own method only moves the sampler, and leaves workers at their initial random
        state.
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
