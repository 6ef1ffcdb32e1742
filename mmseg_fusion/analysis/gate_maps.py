"""The gates of GFF, and the errors without one of them (figures 6, 7, 9, 10).

Li et al., "Gated Fully Fusion for Semantic Segmentation", AAAI 2020, arXiv 1904.01803. The gates of
a :class:`~mmseg_fusion.models.necks.gated_fully_fusion.GatedFullyFusion`, in a ``GFFHead`` or as
the neck of a segmentor, are read through forward hooks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmcv
import numpy as np
import torch
from torch import Tensor, nn

from ..models.necks.gated_fully_fusion import GATED, GatedFullyFusion
from .figures import (
    WHITE,
    class_colours,
    class_patches,
    legend_below,
    new_figure,
    patch,
    short,
    shown_ids,
)
from .layer_features import (
    IGNORE,
    DataInfo,
    InputError,
    Observation,
    captured,
    check_classes,
    last_head,
    observe,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Of the pixels that a gate of 0 spoils.
_MARK = (214, 39, 40)


@dataclass(frozen=True)
class Gate:
    """The gate of one level on one image.

    Attributes:
        name: ``'level 1'`` for the finest one, or ``'context'``.
        stride: pixels of the network's input per cell.
        channels: gates per cell, of which ``values`` is the mean.
        values: (h, w), float32, from 0 to 1, over the whole network input.
        inside: (h, w) bool, the cells whose centre is in the image and not in its padding.
    """

    name: str
    stride: int
    channels: int
    values: np.ndarray
    inside: np.ndarray

    @property
    def mean(self) -> float:
        """Over the image, its padding left out."""
        return float(self.values[self.inside].mean(dtype=np.float64))


@dataclass(frozen=True)
class GateMaps:
    """All gates on one image, and the predictions without one of them.

    Attributes:
        module: dotted name of the fusion.
        seen: image, label and prediction.
        gates: one per level, the finest first.
        zeroed: by level, counted from 1, the (H, W) class ids predicted with that gate set to 0.
    """

    module: str
    seen: Observation
    gates: tuple[Gate, ...]
    zeroed: dict[int, np.ndarray]


def find_gates(model: nn.Module, name: str = 'auto') -> str:
    """Dotted name of the fusion of a segmentor whose gates can be looked at.

    Args:
        model: a segmentor.
        name: which one, if there are several; ``'auto'`` for the only one.

    Raises:
        InputError: there is none, several, or none of that name, or it has no gates.
    """
    names = [
        n
        for n, module in model.named_modules()
        if isinstance(module, GatedFullyFusion) and not n.startswith('auxiliary_head.')
    ]
    if not names:
        head = type(getattr(model, 'decode_head', None)).__name__
        raise InputError(
            f'{type(model).__name__} with decode head {head} has no gates: expected '
            "model.decode_head.type='GFFHead', or model.neck.type='GatedFullyFusion'"
        )
    if name != 'auto' and name not in names:
        raise InputError(f'{name!r} (--layer) is no GatedFullyFusion; there are: {_listed(names)}')
    if name == 'auto' and len(names) > 1:
        raise InputError(f'name one of the fusions with --layer: {_listed(names)}')
    name = names[0] if name == 'auto' else name
    fusion = model.get_submodule(name)
    if fusion.gates is None:
        raise InputError(
            f'{name} has no gates: its fusion is {fusion.fusion!r}; a model with '
            f'model.{name}.fusion={" or ".join(map(repr, GATED))} has them'
        )
    return name


def _listed(names: Sequence[str]) -> str:
    return ', '.join(names)


def level_names(model: nn.Module, name: str) -> list[str]:
    """What the levels of a fusion are called, the finest first.

    Args:
        model: a segmentor.
        name: dotted name of the fusion, of :func:`find_gates`.
    """
    names = [f'level {i}' for i, _ in enumerate(model.get_submodule(name).gates, 1)]
    owner = model.get_submodule(name.rpartition('.')[0])
    if getattr(owner, 'fuse_context', False):
        names[-1] = 'context'
    return names


def check_levels(model: nn.Module, name: str, levels: Sequence[int]) -> None:
    """Raises :class:`InputError` if a fusion has no gate of a number, counted from 1."""
    names = level_names(model, name)
    for level in levels:
        if not 1 <= level <= len(names):
            listed = _listed([f'{i} ({what})' for i, what in enumerate(names, 1)])
            raise InputError(
                f'--zero-gate {level}: {name} has no such gate; expected one of {listed}, or all'
            )


@contextlib.contextmanager
def zero_gate(fusion: GatedFullyFusion, level: int) -> Iterator[None]:
    r"""Sets the gate of a level to 0 inside of the context.

    In equation 5 the level then sends nothing, and receives all that the others send:
    :math:`\tilde X_l = X_l + \sum_{i \ne l} G_i X_i`.

    Args:
        fusion: with gates.
        level: counted from 1, the finest first, as in the paper.
    """

    def zero(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    handle = fusion.gates[level - 1].register_forward_hook(zero)
    try:
        yield
    finally:
        handle.remove()


def gate_maps(
    model: nn.Module,
    batch: Mapping[str, Any],
    levels: Sequence[int] = (),
    layer: str = 'auto',
    ignore_index: int = IGNORE,
) -> GateMaps:
    """Runs a segmentor on one image and keeps its gates; runs again per gate that is set to 0.

    The image is processed as a whole, whatever ``test_cfg.mode`` is.

    Args:
        model: a segmentor in evaluation mode.
        batch: one collated sample of a test pipeline.
        levels: whose gates are set to 0, one after the other, counted from 1.
        layer: dotted name of the fusion, ``'auto'`` for the only one.
        ignore_index: of the data set.

    Raises:
        InputError: there are no such gates, or they do not run at test time; or the label has
            another size than the image, or holds ids that are no class.
    """
    name = find_gates(model, layer)
    check_levels(model, name, levels)
    fusion = model.get_submodule(name)

    def look() -> Observation:
        return observe(model, batch, f'{name}.gates.0', 'output', ignore_index=ignore_index)

    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(captured(gate, 'output')) for gate in fusion.gates]
        seen = look()
    _check_label(seen, last_head(model)[1].num_classes)
    zeroed = {}
    for level in levels:
        with zero_gate(fusion, level):
            zeroed[level] = look().prediction
    return GateMaps(
        module=name,
        seen=seen,
        gates=tuple(
            _gate(what, calls[-1][0].float().cpu(), seen)
            for what, calls in zip(level_names(model, name), kept)
        ),
        zeroed=zeroed,
    )


def _gate(name: str, output: Tensor, seen: Observation) -> Gate:
    grid = output.shape[1:]
    inside = seen.placement.on_grid(np.ones(seen.placement.size, bool), grid, fill=False)
    return Gate(
        name=name,
        stride=_stride(seen.placement.input_size, grid),
        channels=len(output),
        values=output.mean(0).numpy(),
        inside=inside,
    )


def _stride(size: Sequence[int], grid: Sequence[int]) -> int:
    """Stride of a feature of an image: a power of two if one gives it, as backbones round up."""
    for stride in (1 << i for i in range(8)):
        if all(-(-pixels // stride) == cells for pixels, cells in zip(size, grid)):
            return stride
    return round(size[1] / grid[1])


def _check_label(seen: Observation, num_classes: int) -> None:
    if seen.label is None:
        return
    if seen.label.shape != seen.placement.size:
        height, width = seen.placement.size
        raise InputError(
            f'the label of {seen.path} is {seen.label.shape[0]} x {seen.label.shape[1]}, but its '
            f'image is {height} x {width} (height x width): give the label of this image, and '
            'let LoadAnnotations stand behind Resize in the test pipeline'
        )
    check_classes(seen.path, seen.label, num_classes)


# --- numbers -----------------------------------------------------------------------------------


def labelled(views: Sequence[GateMaps]) -> bool:
    """Whether every image has a label."""
    return all(view.seen.label is not None for view in views)


def spoiled(before: np.ndarray, after: np.ndarray, label: np.ndarray | None) -> np.ndarray:
    """The pixels that figure 7b highlights: right before, and wrong after.

    Args:
        before: class ids predicted with all gates.
        after: class ids predicted with one of them set to 0.
        label: class ids, 255 where none is known; None for the pixels whose prediction changes.

    Shape:
        - before, after, label, returned: (H, W); returned as bool.
    """
    if label is None:
        return before != after
    return (label != IGNORE) & (before == label) & (after != label)


def gate_rows(views: Sequence[GateMaps]) -> list[dict[str, Any]]:
    """The numbers of the picture, one row per level, over all images.

    ``mean_gate`` is a mean over the cells of all images. ``become_wrong`` and ``become_right`` are
    shares of the labelled pixels; where an image has no label, there is ``changed`` instead, a
    share of all pixels. They are None for a gate that was not set to 0, and NaN if no pixel is
    labelled.

    Args:
        views: one entry per image, of the same model.
    """
    by_label = labelled(views)
    pixels = sum(
        int((v.seen.label != IGNORE).sum()) if by_label else v.seen.prediction.size for v in views
    )

    def share(masks: Iterable[np.ndarray]) -> float:
        return sum(int(mask.sum()) for mask in masks) / pixels if pixels else math.nan

    rows = []
    for level, first in enumerate(views[0].gates, 1):
        gates = [view.gates[level - 1] for view in views]
        values = np.concatenate([gate.values[gate.inside] for gate in gates])
        row = dict(
            gate=level,
            name=first.name,
            stride=first.stride,
            channels=first.channels,
            mean_gate=float(values.mean(dtype=np.float64)),
        )
        row.update(dict.fromkeys(('become_wrong', 'become_right') if by_label else ('changed',)))
        if level in views[0].zeroed:
            answers = [
                (v.seen.prediction, v.zeroed[level], v.seen.label if by_label else None)
                for v in views
            ]
            row['become_wrong' if by_label else 'changed'] = share(spoiled(*a) for a in answers)
            if by_label:
                row['become_right'] = share(spoiled(a, b, label) for b, a, label in answers)
        rows.append(row)
    return rows


# --- picture -----------------------------------------------------------------------------------


def draw_gate_maps(
    views: Sequence[GateMaps], info: DataInfo, path: str | Path, title: str = ''
) -> None:
    """Figures 6 and 7: image, label, prediction and gates, and below them the errors.

    All gates are on one scale from 0 to 1; cells of padding are cut off. Below a gate that was set
    to 0, the pixels that become wrong are red; without a label, the pixels whose prediction
    changes.

    Args:
        views: one entry per image, of the same model.
        info: of the data set: classes and colours.
        path: PNG file to write.
        title: of the picture.

    Raises:
        ValueError: there is nothing to draw.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if not views:
        raise ValueError('draw_gate_maps: expected at least one image, got none')
    plain = ['image', *(['label'] if labelled(views) else []), 'prediction']
    figure, axes = _panels(views, len(plain) + len(views[0].gates))
    colours = class_colours(info.palette)
    for view, (row, *below) in zip(views, axes):
        _draw_plain(view, dict(zip(plain, row)), colours)
        _draw_gates(view, row[len(plain) :])
        for zeroed in below:
            _draw_zeroed(view, zeroed, len(plain), labelled(views))
    mappable = ScalarMappable(Normalize(0, 1), 'viridis')
    bar = figure.colorbar(mappable, ax=axes, fraction=0.03, pad=0.01, aspect=30, shrink=0.8)
    bar.set_label('gate', fontsize=10)
    _add_legend(figure, views, info)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def _panels(views: Sequence[GateMaps], columns: int) -> tuple[Figure, np.ndarray]:
    """A figure, and its axes by view, row and column: a second row where gates were set to 0."""
    rows = 2 if views[0].zeroed else 1
    ratios = [view.seen.placement.size[0] / view.seen.placement.size[1] for view in views]
    cell = 2.5
    # A name below and two lines above; one line above what is marked.
    heights = [h for r in ratios for h in (cell * r + 0.5, cell * r + 0.2)[:rows]]
    figure = new_figure(cell * columns + 0.9, sum(heights) + 0.8)
    grid = dict(height_ratios=heights)
    axes = figure.subplots(rows * len(views), columns, squeeze=False, gridspec_kw=grid)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    return figure, axes.reshape(len(views), rows, columns)


def _draw_plain(view: GateMaps, panels: Mapping[str, Any], colours: np.ndarray) -> None:
    """Image, prediction, and label if there is a panel for it."""
    seen = view.seen
    height, width = seen.placement.size
    for name, ax in panels.items():
        picture = seen.image if name == 'image' else colours[getattr(seen, name)]
        ax.imshow(picture, extent=(0, width, height, 0))
        ax.set_title(name, fontsize=10)
    panels['image'].set_xlabel(short(Path(seen.path).name, 36), fontsize=9)


def _draw_gates(view: GateMaps, row: Sequence[Any]) -> None:
    """The gates of all levels, from 0 to 1."""
    height, width = view.seen.placement.size
    options = dict(cmap='viridis', vmin=0, vmax=1, extent=_extent(view.seen), interpolation='none')
    for level, (ax, gate) in enumerate(zip(row, view.gates), 1):
        ax.imshow(gate.values, **options)
        # What is outside is padding.
        ax.set(xlim=(0, width), ylim=(height, 0))
        mean = f'mean gate {gate.mean:.3f}'
        if gate.channels > 1:
            mean = f'mean of {gate.channels} channels, {gate.mean:.3f}'
        ax.set_title(f'$G_{{{level}}}$: {gate.name}, stride {gate.stride}\n{mean}', fontsize=9)


def _add_legend(figure: Figure, views: Sequence[GateMaps], info: DataInfo) -> None:
    """The classes of all predictions, and of the labels where every image has one."""
    maps = [view.seen.prediction for view in views]
    if labelled(views):
        maps += [view.seen.label for view in views]
    shown = shown_ids(maps)
    handles = class_patches(shown, info.classes, info.palette)
    if IGNORE in shown and len(info.classes) <= IGNORE:
        handles.append(patch(WHITE, 'ignored'))
    legend_below(figure, handles, max(2, round(figure.get_figwidth() / 1.6)))


def _extent(seen: Observation) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of the network's input in pixels of the image file."""
    top, left, height, width = seen.placement.box
    down, across = seen.placement.size[0] / height, seen.placement.size[1] / width
    rows, columns = seen.placement.input_size
    return -left * across, (columns - left) * across, (rows - top) * down, -top * down


def _draw_zeroed(view: GateMaps, row: Sequence[Any], first: int, by_label: bool) -> None:
    """Figure 7b below the gates, the first of which is in column ``first``."""
    seen = view.seen
    height, width = seen.placement.size
    kind = 'that become wrong' if by_label else 'whose prediction\nchanges (there is no label)'
    row[0].text(
        0.5, 0.5, f'one gate set to 0:\nin red the pixels\n{kind}', ha='center', va='center',
        fontsize=9, color=np.array(_MARK) / 255, transform=row[0].transAxes,
    )  # fmt: skip
    # Pale and grey, so that the marks stand out.
    grey = mmcv.imresize(mmcv.bgr2gray(mmcv.rgb2bgr(seen.image)), (width, height))
    pale = np.repeat((128 + grey // 2)[..., None], 3, 2)
    label = seen.label if by_label else None
    pixels = (label != IGNORE).sum() if by_label else seen.prediction.size
    for column, ax in enumerate(row):
        level = column - first + 1
        if level not in view.zeroed:
            ax.set_axis_off()
            continue
        mask = spoiled(seen.prediction, view.zeroed[level], label)
        marks = pale.copy()
        marks[mask] = _MARK
        ax.imshow(marks, extent=(0, width, height, 0))
        share = 100 * mask.sum() / max(pixels, 1)
        what = 'become wrong' if by_label else 'change'
        ax.set_title(f'$G_{{{level}}} = 0$: {share:.2f} % {what}', fontsize=9)
