"""Predictions of several models, the truth, and the gains and losses of the second of two models.

Figures 1, 4, 5 and 8 of GFF (arXiv 1904.01803) show the pixels on which GFF is right and PSPNet is
wrong ("refined parts"). Here the pixels on which GFF is wrong and PSPNet is right are shown as
well.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from prettytable import PrettyTable

from .figures import WHITE, class_colours, class_patches, new_figure, patch, shown_ids
from .layer_features import IGNORE, DataInfo

#: Of pixels that are lost: only the first of two models has them right; and of those gained.
FIRST, SECOND = (214, 39, 40), (31, 119, 180)


@dataclass(frozen=True)
class Predictions:
    """Several models on one image.

    Attributes:
        path: of the image.
        image: (h, w, 3), RGB, of any size.
        label: (H, W) class ids, 255 where there is none.
        predictions: likewise, one per model.
    """

    path: str
    image: np.ndarray
    label: np.ndarray
    predictions: tuple[np.ndarray, ...]


def right(prediction: np.ndarray, label: np.ndarray) -> float:
    """The share of the labelled pixels on which a prediction is right."""
    labelled = label != IGNORE
    return float((prediction == label)[labelled].mean()) if labelled.any() else float('nan')


@dataclass(frozen=True)
class Gain:
    """Gains and losses of a second model against a first, by the class of the truth.

    Attributes:
        labelled: (K,) pixels that have a label.
        gained: (K,) labelled pixels on which only the second model is right.
        lost: (K,) labelled pixels on which only the first model is right.
    """

    labelled: np.ndarray
    gained: np.ndarray
    lost: np.ndarray

    def __add__(self, other: Gain) -> Gain:
        return Gain(
            self.labelled + other.labelled, self.gained + other.gained, self.lost + other.lost
        )

    @property
    def shares(self) -> tuple[float, float]:
        """Gained and lost, as shares of the labelled pixels; nan where there are none."""
        total = int(self.labelled.sum())
        if not total:
            return float('nan'), float('nan')
        return int(self.gained.sum()) / total, int(self.lost.sum()) / total

    @property
    def net(self) -> float:
        """Gained minus lost, as a share of the labelled pixels."""
        gained, lost = self.shares
        return gained - lost


def gained_and_lost(
    first: np.ndarray, second: np.ndarray, label: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where only the second, and where only the first of two predictions is right.

    Args:
        first: (H, W) class ids.
        second: likewise.
        label: likewise; pixels of 255 are neither.

    Returns:
        Two masks (H, W): gained and lost.
    """
    labelled = label != IGNORE
    a, b = first == label, second == label
    return labelled & b & ~a, labelled & a & ~b


def count_gain(first: np.ndarray, second: np.ndarray, label: np.ndarray, num_classes: int) -> Gain:
    """Counts :func:`gained_and_lost` by the class of the truth.

    Args:
        first: (H, W) class ids.
        second: likewise.
        label: likewise, below ``num_classes``; pixels of 255 are not counted.
        num_classes: K, number of classes.
    """
    masks = (label != IGNORE, *gained_and_lost(first, second, label))
    return Gain(
        *(np.bincount(label[mask].astype(np.int64), minlength=num_classes) for mask in masks)
    )


@dataclass(frozen=True)
class GainSummary:
    """Gain and loss over a set of images; images without a labelled pixel are left out.

    Attributes:
        total: counts over all images.
        images: number of images.
        gained: mean over the images of the share that is gained.
        lost: likewise, lost.
        better: images on which more is gained than lost.
        worse: images on which more is lost than gained.
    """

    total: Gain
    images: int
    gained: float
    lost: float
    better: int
    worse: int

    @property
    def net(self) -> float:
        """Mean over the images of gained minus lost."""
        return self.gained - self.lost

    @classmethod
    def of(cls, gains: Sequence[Gain]) -> GainSummary:
        """Over images.

        Args:
            gains: one per image.

        Raises:
            ValueError: no image has a labelled pixel.
        """
        gains = [g for g in gains if g.labelled.any()]
        if not gains:
            raise ValueError('expected an image with labelled pixels, got none')
        shares = np.array([g.shares for g in gains])
        net = [int(g.gained.sum()) - int(g.lost.sum()) for g in gains]
        return cls(
            sum(gains[1:], gains[0]),
            len(gains),
            *shares.mean(0).tolist(),
            sum(n > 0 for n in net),
            sum(n < 0 for n in net),
        )

    def table(self, classes: Sequence[str]) -> str:
        """Gained and lost per class of the truth, in per cent of its pixels, as text.

        Args:
            classes: their names; those without a pixel are left out.
        """
        table = PrettyTable(['class', '% of pixels', '% gained', '% lost', 'net'])
        table.align = 'r'
        table.align['class'] = 'l'
        labelled = self.total.labelled
        rows = zip(classes, labelled, self.total.gained, self.total.lost)
        for name, pixels, gained, lost in rows:
            if pixels:
                cells = (100 * pixels / labelled.sum(), 100 * gained / pixels, 100 * lost / pixels)
                net = 100 * (int(gained) - int(lost)) / int(pixels)
                table.add_row([name, *(f'{cell:.2f}' for cell in cells), f'{net:+.2f}'])
        return table.get_string()


def largest_gains(
    views: Iterable[Predictions], num_classes: int, count: int
) -> tuple[list[Predictions], list[Gain]]:
    """The images on which the second of two models gains most, and the gains on all images.

    Args:
        views: of two models each; iterated once, and no more than ``count`` are kept.
        num_classes: number of classes.
        count: how many to choose.

    Returns:
        The chosen images, the largest :attr:`Gain.net` first and the earlier one where they are
        equal; and a :class:`Gain` per image, in the order of ``views``.
    """
    gains: list[Gain] = []

    def counted() -> Iterable[tuple[float, Predictions]]:
        for view in views:
            gains.append(count_gain(*view.predictions, view.label, num_classes))
            # An image without labelled pixels comes last.
            yield (gains[-1].net if gains[-1].labelled.any() else -2.0), view

    chosen = heapq.nlargest(count, counted(), key=lambda pair: pair[0])
    return [view for _, view in chosen], gains


def compared(first: np.ndarray, second: np.ndarray, label: np.ndarray) -> np.ndarray:
    """A picture of the pixels on which only one of two predictions is right.

    Args:
        first: (H, W) class ids.
        second: likewise.
        label: likewise; 255 is shown white.

    Returns:
        (H, W, 3): :data:`FIRST` where only ``first`` is right, :data:`SECOND` where only ``second``
        is, light grey where both are, dark grey where none is.
    """
    gained, lost = gained_and_lost(first, second, label)
    picture = np.full((*label.shape, 3), 225, np.uint8)
    picture[(first != label) & (second != label)] = 140
    picture[lost] = FIRST
    picture[gained] = SECOND
    picture[label == IGNORE] = 255
    return picture


def draw_predictions(
    views: Sequence[Predictions],
    names: Sequence[str],
    info: DataInfo,
    path: str | Path,
    title: str = '',
) -> None:
    """A row per image: image, truth, a prediction per model, and of two models where they differ.

    For two models, the last picture shows the gains and losses of the second model, with their
    shares below.

    Args:
        views: one entry per image.
        names: of the models.
        info: of the data set: classes and colours.
        path: PNG file to write.
        title: a line above it all.

    Raises:
        ValueError: there is nothing to draw.
    """
    from matplotlib.patches import Patch

    if not views:
        raise ValueError('draw_predictions: expected at least one image, got none')
    colours = class_colours(info.palette)
    two = len(names) == 2
    titles = ['image', 'truth', *names] + ['gained and lost'] * two
    ratio = views[0].label.shape[0] / views[0].label.shape[1]
    figure = new_figure(2.4 * len(titles), (2.4 * ratio + 0.25) * len(views) + 0.9)
    axes = figure.subplots(len(views), len(titles), squeeze=False)
    for number, view in enumerate(views):
        shape = view.label.shape[::-1]
        pictures = [cv2.resize(view.image, shape, interpolation=cv2.INTER_AREA)]
        pictures += [colours[view.label], *(colours[p] for p in view.predictions)]
        if two:
            pictures.append(compared(*view.predictions, view.label))
        shares = [f'{100 * right(p, view.label):.1f} % right' for p in view.predictions]
        below = [Path(view.path).name, '', *shares]
        if two:
            gained, lost = count_gain(*view.predictions, view.label, len(info.classes)).shares
            below.append(f'{100 * gained:.1f} % gained, {100 * lost:.1f} % lost')
        for ax, picture, head, text in zip(axes[number], pictures, titles, below):
            ax.imshow(picture, interpolation='none')
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(text, fontsize=8)
            if number == 0:
                ax.set_title(head, fontsize=9)
    shown = shown_ids(ids for view in views for ids in (view.label, *view.predictions))
    handles = class_patches(shown, info.classes, info.palette)
    if IGNORE in shown:
        handles.append(patch(WHITE, 'unlabelled'))
    if two:
        for what, name, colour in zip(('lost', 'gained'), names, (FIRST, SECOND)):
            label = f'{what}: only {name} is right'
            handles.append(Patch(facecolor=np.array(colour) / 255, label=label))
        handles.append(Patch(facecolor='0.88', label='both are right'))
        handles.append(Patch(facecolor='0.55', label='none is right'))
    if title:
        figure.suptitle(title, fontsize=9)
    figure.legend(handles=handles, loc='outside lower center', ncols=8, fontsize=7, frameon=False)
    figure.savefig(path, dpi=72)
