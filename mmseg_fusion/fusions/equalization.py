"""Algorithm 1 of arXiv 2402.01149 for any PyTorch module, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .fold import constants, fold_plan, install_equalizer
from .plan import plan_layers
from .single_value import explain_single_value
from .state import kept_state
from .statistics import BranchStatistics, measure_branches, measuring, reduce_statistics
from .trace import Fusion, FusionTracer, Lost, select_fusions

#: Components that come pretrained, whose fusions ``layers='auto'`` leaves alone.
PRETRAINED = ('backbone', 'encoder', 'image_encoder')


def is_inside(name: str, components: Iterable[str]) -> bool:
    """Whether a layer lies in a component of one of these names, at any depth."""
    return not set(components).isdisjoint(name.split('.')[:-1])


def common_module(names: Sequence[str]) -> str:
    """The innermost module that contains all the named layers, for ``layers=[...]``."""
    levels = zip(*(name.split('.') for name in names))
    return '.'.join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


@dataclass(frozen=True)
class BranchScale:
    """One branch of one fusion layer.

    Attributes:
        layer: name of the fusion layer.
        branch: number of the branch in the concatenation.
        channels: its channels.
        size: its spatial size before it was resized, in cells.
        mean: its mean before.
        std: its standard deviation before.
        after: the standard deviation of the equalized branch, as the layer's former weight would
            see it; 1 for an equalized branch, None if it was not measured again.
        done: whether the branch was equalized.
    """

    layer: str
    branch: int
    channels: int
    size: tuple[int, ...]
    mean: float
    std: float
    after: float | None
    done: bool


@dataclass
class EqualizationReport:
    """The result of :func:`equalize`; ``print`` it for a table.

    Attributes:
        layers: per fusion layer, in the order in which they run, the result of
            :func:`~mmseg_fusion.fusions.plan_equalization`.
        after: by name of the layer, the standard deviations per branch after equalization.
        passed_over: names of fusion layers that were not selected: layers in pretrained components,
            or not named.
        lost: concatenations for which no layer was found.
    """

    layers: list[dict[str, Any]]
    after: dict[str, list[float]] = field(default_factory=dict)
    passed_over: list[str] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)

    @property
    def branches(self) -> list[BranchScale]:
        """All measured branches."""
        return [
            BranchScale(
                layer=plan['name'],
                branch=i,
                channels=plan['channels'][i],
                size=tuple(plan['sizes'][i]),
                mean=plan['mean'][i],
                std=std,
                after=self.after[plan['name']][i] if plan['name'] in self.after else None,
                done=not plan['reason'] and std > 0,
            )
            for plan in self.layers
            for i, std in enumerate(plan['std'])
        ]

    def __str__(self) -> str:
        rows = [('layer', 'branch', 'channels', 'size', 'mean', 'std', 'after')]
        for b in self.branches:
            after = '-' if b.after is None else f'{b.after:.4f}'
            size = ' x '.join(map(str, b.size))
            rows.append(
                (b.layer, str(b.branch), str(b.channels), size, f'{b.mean:.4f}', f'{b.std:.4f}',
                 after if b.done else 'left alone')
            )  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ['  '.join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
        if not any(b.done for b in self.branches):
            lines = lines if len(rows) > 1 else []
            lines.append('Nothing to do: no layer that was asked for takes concatenated features.'
                         if not self.layers else 'Nothing was equalized.')  # fmt: skip
        lines += [f'{p["name"]} is left alone: {p["reason"]}' for p in self.layers if p['reason']]
        if self.passed_over:
            lines.append(f'Not asked for: {", ".join(self.passed_over)}')
        lines += [f'Not followed to a layer: {lost}' for lost in self.lost]
        return '\n'.join(lines)


def find_fusions(model: nn.Module, run: Callable[[], object]) -> tuple[list[Fusion], list[Lost]]:
    """The fusions of a model, and the concatenations for which no layer was found.

    Args:
        model: the model; it runs in the mode of :func:`~mmseg_fusion.fusions.measuring`.
        run: runs one forward pass of it.
    """
    with measuring(model), FusionTracer(model, count_running=False) as tracer:
        run()
        return tracer.fusions, tracer.lost


def plan_model(
    fusions: Sequence[Fusion],
    model: nn.Module,
    batches: Iterable,
    run: Callable[[Any], object],
    equalize_mean: Literal['auto'] | bool = 'auto',
    counted: int | None = None,
    watch: Callable[[], Any] | None = None,
    remeasure: bool = False,
) -> list[dict[str, Any]]:
    """Measures the branches of ``fusions``, of all processes together, and plans the layers.

    Args:
        fusions: layers of the model, in the order in which they run.
        model: the model; it is left as it is.
        batches: arguments of ``run``, one item per forward pass; iterated once or more often.
        run: runs one forward pass of the model.
        equalize_mean: as for :func:`equalize`.
        counted: as for :func:`~mmseg_fusion.fusions.measure_branches`.
        watch: called before each measurement; returns a context manager that yields a callback. The
            callback gets the number of each batch after its pass.
        remeasure: as for :func:`equalize`.

    Returns:
        The result of :func:`~mmseg_fusion.fusions.plan_equalization`, per layer.
    """

    def measure() -> dict[str, BranchStatistics]:
        if watch is None:
            return reduce_statistics(measure_branches(model, batches, run, counted)[1])
        with watch() as on_batch:
            return reduce_statistics(measure_branches(model, batches, run, counted, on_batch)[1])

    return plan_layers(fusions, measure, equalize_mean, remeasure)


def equalize(
    model: nn.Module,
    batches: Iterable,
    forward: Callable[[nn.Module, Any], object] | None = None,
    *,
    layers: Literal['auto'] | Sequence[str] = 'auto',
    mode: Literal['fold', 'module'] = 'fold',
    equalize_mean: Literal['auto'] | bool = 'auto',
    pretrained: Sequence[str] = PRETRAINED,
    remeasure: bool = True,
    measure_after: bool = True,
) -> EqualizationReport:
    """Brings the branches of every fusion of any module to one scale (arXiv 2402.01149, alg. 1).

    Call it once, after the decoder is initialized and a pretrained backbone is loaded, and before
    the first training step. It finds the layers that take features concatenated along the channels.
    It measures the mean and standard deviation of each branch over ``batches``, and divides the
    block of the layer's weight that takes the branch (equation 9). It only needs torch.

    The model is measured in the mode of :func:`~mmseg_fusion.fusions.measuring`: batch statistics
    in norm layers, dropout off. Buffers, training flags and random states are restored. Under
    ``torch.distributed`` each process passes its own batches, and the moments are summed.

    Args:
        model: any module; wrappers for parallel training and compilation are removed.
        batches: an iterable that can be iterated several times, such as a list or a DataLoader. If
            a norm layer sees a pooled 1 x 1 map, each item must have several images.
        forward: called as ``forward(model, batch)`` for each. By default ``model(batch)``,
            ``model(**batch)`` for a dict and ``model(batch[0])`` for a tuple or list, such as
            images and labels; tensors are brought to the model's device.
        layers: ``'auto'`` for every fusion outside of ``pretrained``, or names of fusion layers or
            of modules that contain them, anywhere in the model.
        mode: ``'fold'`` divides the weights; ``'module'`` puts explicit equalizers with constant
            values before the layers (their tensors are not in the state dict).
        equalize_mean: ``'auto'`` removes the means if the layer has a bias and no batch or instance
            norm behind it removes them; True removes them if the layer has a bias (not in
            transposed convolutions, where a bias cannot do this); False never does.
        pretrained: names of components, at any depth, that ``'auto'`` does not change.
        remeasure: True measures again after every fusion, with one pass over ``batches`` each, and
            every branch ends at 1. False does so only behind a fusion whose raw output is used, as
            the hook for MMSegmentation does. A branch that is resized behind another fusion may
            then be off by some per cent (9 % in segmentation_models_pytorch's UPerNet on noise).
        measure_after: whether the branches are measured once more at the end.

    Returns:
        The report: layers and branches, scales before and after, and what was not changed and why.
        It is empty for a model that fuses only by sums.

    Raises:
        TypeError: ``batches`` is an iterator, which can be iterated only once.
        ValueError: an argument is wrong, ``batches`` is empty, ``layers`` names something that is
            no fusion layer (the candidates are listed), or a batch is too small for a norm layer.
        FloatingPointError: a branch is not finite; no weight has been changed then.

    Example:
        >>> from collections import OrderedDict
        >>> head = nn.Sequential(OrderedDict(fuse=nn.Conv2d(6, 4, 1)))
        >>> def forward(model, batch):
        ...     return model(torch.cat([batch, 10 * batch], 1))
        >>> report = equalize(head, [torch.randn(2, 3, 8, 8)], forward)
        >>> [branch.layer for branch in report.branches]
        ['fuse', 'fuse']
    """
    if mode not in ('fold', 'module'):
        raise ValueError(f"mode must be 'fold' or 'module', got {mode!r}")
    if isinstance(layers, str) and layers != 'auto':
        raise ValueError(f"layers must be 'auto' or a list of names, got {layers!r}")
    if equalize_mean not in ('auto', True, False):
        raise ValueError(f"equalize_mean must be 'auto', True or False, got {equalize_mean!r}")
    if isinstance(batches, Iterator):
        raise TypeError(
            f'batches is a {type(batches).__name__}, which can be gone through only once; pass a '
            'list, e.g. list(batches), or a DataLoader'
        )
    model = unwrapped(model)
    call = forward or call_with

    def run(batch: Any) -> object:
        try:
            return call(model, batch)
        except ValueError as error:
            raise explain_single_value(
                error, 'equalize: a norm layer sees one value per channel; give more images a batch'
            ) from error

    with kept_state(model):
        first = next(iter(batches), None)
        if first is None:
            raise ValueError('batches is empty: equalize measures at least one')
        fusions, lost = find_fusions(model, lambda: run(first))
        if layers == 'auto':
            chosen = [f for f in fusions if not is_inside(f.name, pretrained)]
        else:
            chosen = select_fusions(fusions, layers)
        if mode == 'module':
            refuse_uncalled(chosen)
        plans = plan_model(chosen, model, batches, run, equalize_mean, remeasure=remeasure)
    for plan in plans:
        if not plan['reason']:
            layer = model.get_submodule(plan['name'])
            if mode == 'fold':
                fold_plan(plan, layer)
            else:
                install_equalizer(layer, *constants(plan))
    report = EqualizationReport(
        plans,
        passed_over=[f.name for f in fusions if f not in chosen],
        lost=[x for x in lost if not is_inside(f'{x.name}.', pretrained)],
    )
    if measure_after and any(not plan['reason'] for plan in plans):
        with kept_state(model):
            statistics = reduce_statistics(measure_branches(model, batches, run)[1])
        for plan in plans:
            std = statistics[plan['name']].std
            if mode == 'fold':
                std = [s / d for s, d in zip(std, plan['divisor'])]
            report.after[plan['name']] = std
    return report


def refuse_uncalled(fusions: Iterable[Fusion]) -> None:
    """Explicit equalizers act when a layer is called: a layer that is never called has none.

    Raises:
        ValueError: the weight of a fusion layer is used without calling the layer.
    """
    names = [f.name for f in fusions if f.equalizable and not f.called]
    if names:
        raise ValueError(
            f'the weight of {", ".join(names)} is used without calling the '
            "layer, so mode='module' cannot put an equalizer before it; use mode='fold'"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DataParallel, DistributedDataParallel and ``torch.compile``."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif hasattr(model, '_orig_mod'):
            model = model._orig_mod
        else:
            return model


def call_with(model: nn.Module, batch: Any) -> object:
    """Runs a model on a batch as a DataLoader usually returns it."""
    device = next((p.device for p in model.parameters()), torch.device('cpu'))

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, dict):
        return model(**{key: moved(value) for key, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        return model(moved(batch[0]))
    return model(moved(batch))
