"""Mean and standard deviation of every branch of every fusion: algorithm 1 of arXiv 2402.01149."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from .state import kept_state
from .trace import Fusion, FusionTracer

# Below this share of the second moment a variance is rounding: the standard deviation is less than
# about 50 steps of float32 at the size of the mean.
_ROUNDING = 1e-11


@dataclass
class BranchStatistics:
    """First and second moments of the branches of one fusion, summed over images.

    Algorithm 1: ``m1`` and ``m2`` are sums over images of the image's mean of ``x`` and of
    ``x^2``, one scalar per branch.

    Attributes:
        channels: channels of each branch.
        count: images that were summed (times a layer ran, if it runs more than once).
        m1: per branch, the sum of means.
        m2: per branch, the sum of mean squares.

    Example:
        >>> statistics = BranchStatistics(channels=(1, 2))
        >>> statistics.add([torch.tensor([[[[0.0, 2.0]]]]), torch.full((1, 2, 3, 3), 5.0)])
        >>> statistics.mean, statistics.std
        ([1.0, 5.0], [1.0, 0.0])
    """

    channels: tuple[int, ...]
    count: int = 0
    m1: list[float] = field(default_factory=list)
    m2: list[float] = field(default_factory=list)

    def add(self, parts: Sequence[Tensor]) -> None:
        """Adds one batch; ``parts`` are the branches, each with the images in dimension 0."""
        first, second = [], []
        for part in parts:
            flat = part.detach().float().flatten(1)
            # The square of a large mean leaves no digit of float32 to a small deviation: the
            # deviations are squared around each image's mean, the rest is float64.
            mean = flat.mean(1, dtype=torch.float64)
            variance = (flat - mean.to(flat.dtype)[:, None]).square().mean(1, dtype=torch.float64)
            first.append(mean.sum().item())
            second.append((variance + mean.square()).sum().item())
        self.count += parts[0].shape[0]
        self._sum(first, second)

    def _sum(self, first: list[float], second: list[float]) -> None:
        self.m1 = [a + b for a, b in zip(self.m1, first)] if self.m1 else list(first)
        self.m2 = [a + b for a, b in zip(self.m2, second)] if self.m2 else list(second)

    def merge(self, other: BranchStatistics) -> None:
        """Adds the sums of another process."""
        if other.channels != self.channels:
            raise ValueError(f'branches {self.channels} and {other.channels} do not match')
        self.count += other.count
        self._sum(other.m1, other.m2)

    @property
    def mean(self) -> list[float]:
        """Mean of each branch, ``m1 / |S|``."""
        return [m / self.count for m in self.m1]

    @property
    def std(self) -> list[float]:
        """Standard deviation of each branch, ``sqrt(m2 / |S| - mean^2)``; 0 for a constant."""
        values = []
        for mean, second in zip(self.mean, self.m2):
            second /= self.count
            variance = second - mean * mean
            if not math.isfinite(variance):
                values.append(math.nan)
            else:
                values.append(math.sqrt(variance) if variance > _ROUNDING * second else 0.0)
        return values


def _is_dropout(module: nn.Module) -> bool:
    # Attention drops by its own training flag.
    kinds = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention)
    return isinstance(module, kinds) or type(module).__name__ == 'DropPath'


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Sets the mode in which the branches of a model are measured, and restores the old mode.

    It is the training mode without the random layers (chosen, since the paper names no mode). Batch
    norm layers use batch statistics, as they will when training starts; those of a backbone with
    ``norm_eval`` stay frozen. Dropout and drop path are off. SyncBN uses the batch of its own
    process, so that processes with different numbers of images never wait for each other. At the
    end buffers, training flags and random states are restored.
    """
    with torch.no_grad(), kept_state(model):
        model.train()
        replaced = []
        for module in model.modules():
            if _is_dropout(module):
                module.training = False
            elif 'SyncBatchNorm' in type(module).__name__ and module.training:

                def local(x: Tensor, m: nn.Module = module) -> Tensor:
                    return F.batch_norm(x, None, None, m.weight, m.bias, True, 0.0, m.eps)

                module.forward = local
                replaced.append(module)
        try:
            yield
        finally:
            for module in replaced:
                del module.forward


def split_batches(order: Sequence[int], size: int) -> list[list[int]]:
    """Batches of ``size`` in the given order; a last batch of one image joins the one before.

    A single image has no batch statistics if a map is pooled to 1 x 1.
    """
    batches = [list(order[i : i + size]) for i in range(0, len(order), size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        alone = batches.pop()
        batches[-1] += alone
    return batches


def measure_branches(
    model: nn.Module,
    batches: Iterable,
    run: Callable[[object], object],
    counted: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[dict[str, Fusion], dict[str, BranchStatistics]]:
    """Measures every branch of every fusion of ``model``: one forward pass per batch.

    No feature is stored: the memory does not grow with the number of images.

    Args:
        model: the model; it is measured in the mode of :func:`measuring`.
        batches: arguments of ``run``, one item per forward pass.
        run: runs one forward pass of the model.
        counted: only the first ``counted`` batches enter the sums; the others are only run.
        on_batch: called with the number of the batch after each pass.

    Returns:
        Fusions and their statistics by name of the layer, of this process alone: see
        :func:`reduce_statistics`.
    """
    statistics: dict[str, BranchStatistics] = {}
    counting = True

    def add(fusion: Fusion, x: Tensor) -> None:
        if counting:
            known = statistics.setdefault(fusion.name, BranchStatistics(fusion.channels))
            known.add(fusion.split(x))

    with measuring(model), FusionTracer(model, add) as tracer:
        for index, batch in enumerate(batches):
            counting = counted is None or index < counted
            run(batch)
            if on_batch is not None:
                on_batch(index)
        return {fusion.name: fusion for fusion in tracer.fusions}, statistics


def reduce_statistics(statistics: dict[str, BranchStatistics]) -> dict[str, BranchStatistics]:
    """Sums the statistics of all processes, in the order of their ranks: the same on each."""
    shares = [statistics]
    if distributed.is_available() and distributed.is_initialized():
        shares = [{} for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(shares, statistics)
    total: dict[str, BranchStatistics] = {}
    for share in shares:
        for name, part in share.items():
            total.setdefault(name, BranchStatistics(part.channels)).merge(part)
    return total
