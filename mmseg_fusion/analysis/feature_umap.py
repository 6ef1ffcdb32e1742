"""Last features in two dimensions, coloured by class (figure 4 of arXiv 2303.08646, section 8).

The paper takes the features before the classifier, at pixels of eight classes that are hard to
distinguish, and compares by eye how separate and compact the classes of each model are. UMAP
distorts distances. Two numbers therefore describe the features themselves: :func:`silhouette` and
:func:`within_between`.

The paper names neither the number of pixels nor UMAP's settings; all of them are chosen here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .figures import legend_below, new_figure
from .layer_features import IGNORE, DataInfo, InputError, Observation, check_classes
from .pixel_relation import wrapped

#: Features (N, C) to points (N, 2), both float32.
Embed = Callable[[np.ndarray], np.ndarray]

#: With fewer pixels neither UMAP nor a picture says anything.
MIN_PIXELS = 5


# ------------------------------------------------------------------------------------- the pixels


@dataclass
class Sample:
    """The features of the same pixels in several models.

    Attributes:
        features: per model, (N, C) float32 on the CPU; C may differ.
        labels: (N,) class ids.
        places: (N, 3) index of the image, and row and column of the pixel in its label.
        images: paths of the images.
    """

    features: list[Tensor]
    labels: np.ndarray
    places: np.ndarray
    images: list[str]


@dataclass
class _Kept:
    """Pixels of one class, the first in line first: ``rounds``, then ``draws``."""

    rounds: np.ndarray
    draws: np.ndarray
    places: np.ndarray
    features: list[Tensor]


class PixelSample:
    """Draws random pixels of every class from a stream of images, equally many of every image.

    In each image the pixels of a class are put in random order. The first pixels of all images form
    the first round, the second pixels the second round, and so on; within a round the order is
    random. The first ``pixels_per_class`` pixels of all rounds are kept. Every image thus gives the
    same number of pixels, plus or minus one, as long as it has enough. Only the kept pixels are
    stored.

    Candidates are the pixels of the label under the centres of the feature's cells, and a pixel has
    the feature of its cell. Labels are thus resized to the features by nearest neighbour, and
    features are not resized (chosen: interpolated features are mixtures that no classifier has
    seen, and would count every cell many times). If the features of the models have different
    strides, the coarsest feature determines the pixels; in the finer features each pixel also has a
    separate cell.

    Args:
        num_classes: number of classes K.
        pixels_per_class: maximum number of pixels per class.
        seed: of the random numbers.
    """

    def __init__(self, num_classes: int, pixels_per_class: int = 500, seed: int = 0) -> None:
        self.num_classes = num_classes
        self.pixels_per_class = pixels_per_class
        self.seed = seed
        #: (K,) pixels of every class that there were to choose from.
        self.counts = np.zeros(num_classes, np.int64)
        self.images: list[str] = []
        self._kept: dict[int, _Kept] = {}

    def add(self, views: Sequence[Observation]) -> None:
        """Draws from one image.

        Args:
            views: the image through each model, whose label is that of the first.

        Raises:
            InputError: the image has no label, a label is no class, the models see images of
                different sizes, or a feature is not finite.
        """
        first = views[0]
        if first.label is None:
            raise InputError(
                f'{first.path} has no label; give labels with --ann-dir (or LoadAnnotations in the '
                'pipeline)'
            )
        for view in views[1:]:
            if view.placement.size != first.placement.size:
                raise InputError(
                    'models side by side need the same images: '
                    f'{first.path} is {first.placement.size}, {view.path} is '
                    f'{view.placement.size} (height, width); check the data loaders of the configs'
                )
        for number, view in enumerate(views, 1):
            if not bool(view.feature.isfinite().all()):
                raise InputError(
                    f'the feature of model {number} is not finite on {view.path}; check its '
                    'checkpoint, or name another layer with --layer'
                )
        label = first.label
        # Where each pixel of the label lies, whatever resolution the label has.
        placements = [dataclasses.replace(view.placement, size=label.shape) for view in views]
        grids = [tuple(view.feature.shape[1:]) for view in views]
        numbers = np.arange(label.size).reshape(label.shape)
        under = [p.on_grid(numbers, grid, fill=-1) for p, grid in zip(placements, grids)]
        pixels = min((np.unique(cells[cells >= 0]) for cells in under), key=len)
        categories = label.reshape(-1)[pixels]
        known = categories != IGNORE
        pixels, categories = pixels[known], categories[known]
        check_classes(first.path, categories, self.num_classes)
        image = len(self.images)
        self.images.append(first.path)
        self.counts += np.bincount(categories, minlength=self.num_classes)
        # An image of its own stream: what it gives does not depend on those before.
        random = np.random.default_rng([self.seed, image])
        for category in np.unique(categories).tolist():
            mine = random.permutation(pixels[categories == category])[: self.pixels_per_class]
            draws = random.random(len(mine))
            self._merge(category, image, label.shape[1], mine, draws, views, placements)

    def _merge(
        self,
        category: int,
        image: int,
        width: int,
        pixels: np.ndarray,
        draws: np.ndarray,
        views: Sequence[Observation],
        placements: Sequence[Any],
    ) -> None:
        old = self._kept.get(category)
        rounds = np.arange(len(pixels))
        held = 0
        if old is not None:
            held = len(old.rounds)
            rounds, draws = np.append(old.rounds, rounds), np.append(old.draws, draws)
        order = np.lexsort((draws, rounds))[: self.pixels_per_class]
        stay, new = order[order < held], order[order >= held] - held
        if not len(new):
            return
        places = [(image, *divmod(int(p), width)) for p in pixels[new]]
        features = []
        for view, placement in zip(views, placements):
            grid = tuple(view.feature.shape[1:])
            cells = [placement.cell((column, row), grid) for _, row, column in places]
            index = torch.tensor(cells, device=view.feature.device)
            features.append(view.feature[:, index[:, 0], index[:, 1]].T.float().cpu())
        chosen = np.append(stay, new + held)
        if old is not None:
            places = np.concatenate([old.places[stay], places])
            features = [torch.cat([a[stay], b]) for a, b in zip(old.features, features)]
        self._kept[category] = _Kept(rounds[chosen], draws[chosen], np.asarray(places), features)

    def most_frequent(self, count: int) -> list[int]:
        """The classes with most pixels to choose from, the largest first."""
        order = np.argsort(-self.counts, kind='stable')[:count]
        return [int(c) for c in order if self.counts[c]]

    def take(self, classes: Sequence[int]) -> Sample:
        """The drawn pixels of some classes; classes without a pixel are left out.

        Args:
            classes: ids of the classes.

        Raises:
            InputError: fewer than five pixels were drawn.
        """
        kept = [(c, self._kept[c]) for c in classes if c in self._kept]
        total = sum(len(entry.rounds) for _, entry in kept)
        if total < MIN_PIXELS:
            raise InputError(
                f'{total} labelled pixels of the classes {list(classes)} in {len(self.images)} '
                f'images are too few, expected at least {MIN_PIXELS}; take more images '
                '(--num-samples, --images), other --classes or more --pixels-per-class'
            )
        return Sample(
            features=[torch.cat(of_model) for of_model in zip(*(e.features for _, e in kept))],
            labels=np.repeat([c for c, _ in kept], [len(e.rounds) for _, e in kept]),
            places=np.concatenate([e.places for _, e in kept]),
            images=self.images,
        )


def find_classes(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Ids of classes given by name or number, without repetition.

    Args:
        names: the given names or numbers; an equal class name has priority over a number.
        classes: names of all classes.

    Raises:
        InputError: there is no such class; the message lists near matches, or all.
    """
    ids = []
    for name in names:
        if name in classes:
            ids.append(list(classes).index(name))
        elif name.isdecimal() and int(name) < len(classes):
            ids.append(int(name))
        else:
            near = difflib.get_close_matches(name, classes, n=5, cutoff=0.6)
            hint = f'Did you mean {", ".join(near)}? ' if near else ''
            raise InputError(
                f'--classes: there is no class {name!r}. {hint}Expected a number from 0 to '
                f'{len(classes) - 1} or one of: {", ".join(classes)}'
            )
    return list(dict.fromkeys(ids))


# ------------------------------------------------------------------------------------ the numbers


def _checked(features: Tensor, labels: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Features in float64, which class each is of, and how many each class has."""
    if features.dim() != 2 or labels.shape != (len(features),):
        raise ValueError(
            f'expected features (N, C) and labels (N,), got {tuple(features.shape)} and '
            f'{tuple(labels.shape)}'
        )
    _, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return features.detach().cpu().double(), torch.from_numpy(index), torch.from_numpy(counts)


def silhouette(features: Tensor, labels: np.ndarray) -> float:
    r"""Mean silhouette coefficient (Rousseeuw, 1987), in Euclidean distance.

    The coefficient of a pixel is :math:`(b - a) / \max(a, b)`. Here a is its mean distance to the
    other pixels of its class, and b the smallest of its mean distances to the pixels of each other
    class. It is 1 if the classes are separate points, 0 if they overlap, and negative if pixels are
    nearer to another class than to their own. A pixel that is alone in its class counts as 0.

    Args:
        features: one per pixel.
        labels: class ids.

    Shape:
        - features: (N, C).
        - labels: (N,).

    Returns:
        The mean over all pixels; NaN of fewer than two classes.

    Raises:
        ValueError: the shapes do not fit.
    """
    points, index, counts = _checked(features, labels)
    if len(counts) < 2:
        return math.nan
    member = torch.nn.functional.one_hot(index).double()
    # Distances by matrix products are exact enough without an offset, and take a quarter of the
    # time: 1024 x 8000 points of 64 channels, torch 2.13.0, one thread, median of 7 turns.
    points = points - points.mean(0)
    total = 0.0
    # A stripe of the distances at a time: all of them are N x N.
    for start in range(0, len(points), 1024):
        stripe = slice(start, start + 1024)
        distances = torch.cdist(points[stripe], points, compute_mode='use_mm_for_euclid_dist')
        sums = distances @ member
        own = index[stripe, None]
        number = counts[own]
        inside = sums.gather(1, own) / (number - 1).clamp(min=1)
        outside = (sums / counts).scatter(1, own, math.inf).amin(1, keepdim=True)
        largest = torch.maximum(inside, outside)
        value = torch.where(largest > 0, (outside - inside) / largest, 0.0)
        total += float(value[number > 1].sum())
    return total / len(points)


def within_between(features: Tensor, labels: np.ndarray) -> float:
    r"""Mean distance of pixels to their class centre, divided by that between the centres.

    .. math::
        \frac{\frac1K \sum_k \frac1{N_k} \sum_{i \in k} \lVert x_i - \mu_k \rVert}
        {\frac2{K (K - 1)} \sum_{k < l} \lVert \mu_k - \mu_l \rVert}

    with the class centres :math:`\mu_k`; every class has the same weight. A smaller value means
    more compact classes for the same distance between them; the length of the features cancels.

    Args:
        features: one per pixel.
        labels: class ids.

    Shape:
        - features: (N, C).
        - labels: (N,).

    Returns:
        The ratio; NaN of fewer than two classes, and where all centres coincide.

    Raises:
        ValueError: the shapes do not fit.
    """
    points, index, counts = _checked(features, labels)
    if len(counts) < 2:
        return math.nan
    sums = points.new_zeros(len(counts), points.shape[1]).index_add_(0, index, points)
    centers = sums / counts[:, None]
    lengths = (points - centers[index]).norm(dim=1)
    within = (lengths.new_zeros(len(counts)).index_add_(0, index, lengths) / counts).mean()
    between = torch.nn.functional.pdist(centers).mean()
    return float(within / between) if between > 0 else math.nan


# ---------------------------------------------------------------------------------- the embedding


def load_umap() -> type:
    """The class ``umap.UMAP`` of umap-learn, an optional package.

    Raises:
        ImportError: it is not installed, or cannot be imported; the message says what to install.
    """
    try:
        with warnings.catch_warnings():
            # Its parametric variant would like TensorFlow, which nothing here needs.
            warnings.simplefilter('ignore')
            from umap import UMAP
    except ImportError as error:
        raise ImportError(
            f'umap-learn cannot be imported ({error}); install it with '
            "pip install 'mmseg-fusion[umap]', or draw principal components with --embedding pca"
        ) from error
    return UMAP


def umap_embedding(
    features: np.ndarray, seed: int = 0, num_neighbors: int = 15, min_dist: float = 0.1
) -> np.ndarray:
    """UMAP in two dimensions, with Euclidean distances.

    Args:
        features: one per pixel, finite.
        seed: of its random numbers; the result depends on the machine besides.
        num_neighbors: number of neighbours that are kept close; all other pixels if there are
            fewer.
        min_dist: smallest distance of two points in the plot.

    Shape:
        - features: (N, C).
        - returned: (N, 2).

    Raises:
        ImportError: umap-learn is not installed.
    """
    reducer = load_umap()(
        n_components=2,
        n_neighbors=min(num_neighbors, len(features) - 1),
        min_dist=min_dist,
        random_state=seed,
        n_jobs=1,  # what the seed makes of any other number, with a warning
    )
    return reducer.fit_transform(features)


def pca_embedding(features: np.ndarray) -> np.ndarray:
    """The two principal components, each with its largest weight positive.

    Args:
        features: one per pixel, finite.

    Shape:
        - features: (N, C).
        - returned: (N, 2); the second is 0 where there is only one channel.
    """
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)
    points = centred @ (axes * np.where(largest < 0, -1, 1)).T
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1]))).astype(np.float32)


@dataclass
class Embedding:
    """The embedded pixels of one model.

    Attributes:
        name: what the model is called.
        points: (N, 2).
        channels: of the features.
        silhouette: of the features, see :func:`silhouette`.
        within_between: of the features, see :func:`within_between`.
    """

    name: str
    points: np.ndarray
    channels: int
    silhouette: float
    within_between: float


def embed_sample(
    sample: Sample, names: Sequence[str], embed: Embed = umap_embedding
) -> list[Embedding]:
    """Embeds the features of every model separately, and computes their numbers.

    Args:
        sample: the pixels.
        names: what the models are called.
        embed: how.

    Raises:
        ImportError: ``embed`` is that of UMAP, and umap-learn is not installed.
        ValueError: ``embed`` gives no points in the plane.
    """
    embeddings = []
    for name, features in zip(names, sample.features):
        points = np.asarray(embed(features.numpy()))
        if points.shape != (len(features), 2) or not np.isfinite(points).all():
            raise ValueError(
                f'embed: expected {len(features)} finite points in the plane, got shape '
                f'{points.shape} with {int((~np.isfinite(points)).sum())} values not finite'
            )
        embeddings.append(
            Embedding(
                name,
                points,
                features.shape[1],
                silhouette(features, sample.labels),
                within_between(features, sample.labels),
            )
        )
    return embeddings


def save_embeddings(
    maps: Sequence[Embedding],
    sample: Sample,
    classes: Sequence[str],
    path: str | Path,
    **about: Any,
) -> None:
    """Writes points, pixels and numbers as JSON; an undefined number is null.

    Args:
        maps: one per model.
        sample: the pixels.
        classes: names of all classes.
        path: file to write.
        **about: further entries, as the seed.
    """
    drawn = list(dict.fromkeys(sample.labels.tolist()))
    models = [
        dict(
            name=entry.name,
            channels=entry.channels,
            silhouette=None if math.isnan(entry.silhouette) else entry.silhouette,
            within_between=None if math.isnan(entry.within_between) else entry.within_between,
            points=entry.points.tolist(),
        )
        for entry in maps
    ]
    content = dict(
        **about,
        classes=[classes[c] for c in drawn],
        images=sample.images,
        # Image, row and column in its label; then what class each is of, and where it is drawn.
        pixels=sample.places.tolist(),
        labels=[classes[c] for c in sample.labels.tolist()],
        models=models,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + '\n', encoding='utf-8')


def draw_embeddings(
    maps: Sequence[Embedding],
    labels: np.ndarray,
    info: DataInfo,
    path: str | Path,
    title: str = '',
    seed: int = 0,
) -> None:
    """Models side by side, a point per pixel in the colour of its class.

    Axes have no ticks, since position and scale of an embedding have no meaning. Points are drawn
    in random order, so that no class lies on top.

    Args:
        maps: one per model.
        labels: (N,) class ids of the pixels.
        info: classes and colours.
        path: picture to write, in any format of Matplotlib.
        title: of the picture.
        seed: of the order.
    """
    from matplotlib.lines import Line2D

    drawn, counts = np.unique(labels, return_counts=True)
    heads = [
        f'{wrapped(entry.name)}\n'
        f'silhouette {entry.silhouette:.3f}, within / between {entry.within_between:.3f}'
        for entry in maps
    ]
    panel = 4.2
    per_line = max(2, int(panel * len(maps) / 1.9))
    lines = math.ceil(len(drawn) / per_line)
    above = 0.2 * (1 + max(head.count('\n') for head in heads)) + 0.3 * bool(title)
    figure = new_figure(panel * len(maps) + 0.2, panel + above + 0.22 * lines + 0.2)
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    # Pale and dark colours of a palette are seen on grey alone.
    ground = '#e4e4e4'
    palette = np.asarray(info.palette)[:, :3] / 255
    order = np.random.default_rng(seed).permutation(len(labels))
    size = min(40.0, max(3.0, 16000 / len(labels)))
    for ax, entry, head in zip(axes, maps, heads):
        x, y = entry.points[order].T
        ax.scatter(x, y, s=size, c=palette[labels[order]], linewidths=0, alpha=0.85)
        ax.set(xticks=[], yticks=[], facecolor=ground)
        # Distances along both axes are of one kind.
        ax.set_aspect('equal', adjustable='datalim')
        ax.set_title(head, fontsize=10)
    handles = [
        Line2D(
            [], [], ls='', marker='o', ms=8, mec='0.4', mew=0.5, color=palette[c],
            label=f'{info.classes[c]} ({n})',
        )
        for c, n in zip(drawn.tolist(), counts.tolist())
    ]  # fmt: skip
    legend_below(figure, handles, min(len(handles), per_line))
    if title:
        figure.suptitle(title, fontsize=11)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
