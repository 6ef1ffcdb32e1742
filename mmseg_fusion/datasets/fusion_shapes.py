"""FusionShapes: procedural scenes on which fusing feature levels matters, without any file."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
from mmengine.fileio import BaseStorageBackend, register_backend
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

SCHEME = 'fusion-shapes'
#: The streams of random numbers: a scene of one split never occurs in another.
SPLITS = ('train', 'val', 'test')
#: Below this, an island and its surroundings no longer fit.
MIN_SIDE = 48

FIELD, ISLAND, BROAD, FINE, LINE, RING, DOT, CROSS = range(8)
IGNORE = 255

_PATH = re.compile(
    SCHEME + rf'://(?P<split>{"|".join(SPLITS)})/(?P<kind>img|ann)/seed-(?P<seed>\d+)/'
    r'(?P<height>\d+)x(?P<width>\d+)/(?P<index>\d+)\.png'
)
_EXAMPLE = f'{SCHEME}://val/img/seed-0/128x128/000012.png'


@functools.lru_cache(maxsize=8)
def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return y, x


def _noise(rng: np.random.Generator, size: tuple[int, int], cells: float) -> np.ndarray:
    """Smooth noise with about ``cells`` bumps along the shorter side, in [0, 1] but for overshoot.

    Args:
        rng: where the numbers come from.
        size: height and width in pixels.
        cells: bumps along the shorter side.
    """
    height, width = size
    unit = min(size) / cells
    grid = rng.random((max(2, round(height / unit)), max(2, round(width / unit))), np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def _layout(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The large regions: where speckle lies, and the class of every pixel.

    Speckle is ``island`` where the border of the image cannot be reached through speckle, and
    ``field`` elsewhere: no local patch tells the two apart.
    """
    height, width = size
    side = min(size)
    y, x = _grid(height, width)
    relief = _noise(rng, size, 3.5)
    striped = relief > np.median(relief) + 0.12 * (rng.random() - 0.35)
    wobble = 0.35 * (_noise(rng, size, 9) - 0.5)
    for _ in range(rng.integers(2, 5)):
        cy, cx = (0.2 + 0.6 * rng.random(2)) * size
        radius = side * (0.09 + 0.09 * rng.random())
        stretch, angle = 0.65 + 0.35 * rng.random(), np.pi * rng.random()
        c, s = np.cos(angle) / radius, np.sin(angle) / radius
        u, v = c * (x - cx) + s * (y - cy), (c * (y - cy) - s * (x - cx)) / stretch
        distance = np.sqrt(u * u + v * v) + wobble
        # The moat round an island is at least 7 pixels wide.
        striped |= distance < 1 + max(0.45, 7 / (radius * stretch))
        striped &= distance >= 1

    count, parts, stats, _ = cv2.connectedComponentsWithStats(
        (~striped).astype(np.uint8), connectivity=4
    )
    # Crumbs of speckle, too small to be told from a stripe, become part of the stripes.
    large = stats[:, cv2.CC_STAT_AREA] >= 0.004 * side * side
    outer = np.zeros(count, bool)
    for edge in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
        outer[edge] = True
    kind = np.where(outer, FIELD, ISLAND)
    kind[~large] = IGNORE
    kind[0] = IGNORE
    label = kind.astype(np.uint8)[parts]
    speckled = label != IGNORE
    width_field = _noise(rng, size, 2.2)
    coarse = width_field > np.median(width_field)
    label[~speckled] = np.where(coarse, BROAD, FINE)[~speckled]
    return speckled, label


def _texture(rng: np.random.Generator, speckled: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Share of the second colour: speckle and stripes mix the same two, only arranged unlike."""
    y, x = _grid(*label.shape)
    angle = np.pi * rng.random()
    along = np.cos(angle) * x + np.sin(angle) * y
    fine, broad = 6.5 + 1.5 * rng.random(), 16 + 5 * rng.random()
    phase = along / np.where(label == BROAD, np.float32(broad), np.float32(fine)) + rng.random()
    # Edges are a pixel wide at any period, so that a piece of an edge does not tell the period.
    period = np.where(label == BROAD, np.float32(broad), np.float32(fine))
    stripes = np.clip((np.abs(phase - np.floor(phase) - 0.5) - 0.25) * period + 0.5, 0, 1)
    speckle = np.clip(2.2 * (_noise(rng, label.shape, min(label.shape) / 2.5) - 0.5) + 0.5, 0, 1)
    return np.where(speckled, speckle, stripes)


def _disc(canvas: np.ndarray, centre: tuple[int, int], radius: float, value: int, fill: int):
    """A filled circle whose radius is no whole number: a tiny one would look like a cross."""
    bits = 4
    y, x = (v << bits for v in centre[::-1])
    cv2.circle(canvas, (x, y), round(radius * 2**bits), value, fill, cv2.LINE_8, bits)


def _shapes(rng: np.random.Generator, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws lines, rings, dots and crosses into ``label``.

    Returns:
        Which pixels they cover and 0 or 1 for the colour there. The colour is drawn alike for
        all four classes: only the shape tells them apart.
    """
    height, width = label.shape
    shape = np.full(label.shape, IGNORE, np.uint8)
    tone = np.zeros(label.shape, np.uint8)

    def draw(kind: int, *strokes: tuple) -> None:
        light = int(rng.integers(2))
        for function, *where, thickness in strokes:
            function(shape, *where, kind, thickness)
            function(tone, *where, light, thickness)

    area = height * width / 128**2
    for _ in range(max(1, round(area**0.5 * rng.integers(1, 4)))):
        # From edge to edge through a point of the inner part.
        point, angle = (0.15 + 0.7 * rng.random(2)) * (width, height), np.pi * rng.random()
        step = np.array([np.cos(angle), np.sin(angle)]) * (height + width)
        ends = [tuple(int(v) for v in p) for p in (point - step, point + step)]
        draw(LINE, (cv2.line, *ends, int(rng.integers(2, 4))))

    # One shape per cell at most: they may touch a line, never each other.
    cell = 22
    rows, columns = height // cell, width // cell
    order = rng.permutation(rows * columns)
    wanted = [(RING, 3, 6), (DOT, 4, 9), (CROSS, 4, 9)]
    kinds = [
        kind
        for kind, low, high in wanted
        for _ in range(max(1, round(area * rng.integers(low, high))))
    ]
    pad_y, pad_x = (height - rows * cell) / 2, (width - columns * cell) / 2
    for place, kind in zip(order, kinds):
        row, column = divmod(int(place), columns)
        radius = {RING: 5, DOT: 3, CROSS: 5.5}[kind] + {RING: 4, DOT: 1.2, CROSS: 2}[kind] * (
            rng.random()
        )
        room = cell / 2 - radius - 2
        cy = round(pad_y + (row + 0.5) * cell + room * (2 * rng.random() - 1))
        cx = round(pad_x + (column + 0.5) * cell + room * (2 * rng.random() - 1))
        if kind == CROSS:
            tilt = np.pi / 2 * rng.random()
            dx, dy = round(radius * np.cos(tilt)), round(radius * np.sin(tilt))
            bars = (
                ((cx - dx, cy - dy), (cx + dx, cy + dy)),
                ((cx - dy, cy + dx), (cx + dy, cy - dx)),
            )
            draw(CROSS, *((cv2.line, *ends, 3) for ends in bars))
        elif kind == RING:
            draw(RING, (cv2.circle, (cx, cy), round(radius), int(rng.integers(2, 4))))
        else:
            draw(DOT, (_disc, (cx, cy), radius, cv2.FILLED))
    drawn = shape != IGNORE
    label[drawn] = shape[drawn]
    return drawn, tone


def draw_scene(
    index: int, seed: int = 0, split: str = 'train', size: tuple[int, int] = (128, 128)
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one scene; equal arguments always give equal pixels.

    Args:
        index: number of the scene in its split.
        seed: the whole data set changes with it.
        split: one of ``SPLITS``.
        size: height and width in pixels.

    Shape:
        - image: (H, W, 3) uint8, BGR.
        - label: (H, W) uint8, class ids and 255 for pixels to ignore.

    Returns:
        Image and label.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    speckled, label = _layout(rng, size)
    share = _texture(rng, speckled, label)

    # As in Pascal VOC, the seam between two regions belongs to neither.
    seam = np.zeros(size, bool)
    seam[:, 1:] |= label[:, 1:] != label[:, :-1]
    seam[1:] |= label[1:] != label[:-1]
    label[seam] = IGNORE

    base = 95 + 70 * rng.random(3)
    swing = rng.random(3) - 0.5
    swing *= 62 / max(1e-3, np.abs(swing).max())
    colours = np.stack([base - swing, base + swing]).astype(np.float32)
    light = (0.85 + 0.3 * _noise(rng, size, 2))[..., None]
    image = (colours[0] + share[..., None] * (colours[1] - colours[0])) * light

    drawn, tone = _shapes(rng, label)
    tones = np.stack([5 + 35 * rng.random(3), 215 + 40 * rng.random(3)]).astype(np.float32)
    image[drawn] = tones[tone[drawn]]

    if rng.random() < 0.5:
        # A piece that nobody labelled.
        sides = min(size) * (0.08 + 0.12 * rng.random(2))
        cy, cx = rng.random(2) * size
        corners = cv2.boxPoints(((cx, cy), tuple(sides), 180 * rng.random())).astype(np.int32)
        cv2.fillConvexPoly(label, corners, IGNORE)
        cv2.fillConvexPoly(image, corners, (60 + 130 * rng.random(3)).tolist())

    image = cv2.GaussianBlur(image, (3, 3), 0.6)
    image += rng.integers(-11, 12, image.shape, np.int8)
    return np.clip(image, 0, 255).astype(np.uint8), label


@functools.lru_cache(maxsize=4)
def _encoded(
    index: int, seed: int, split: str, size: tuple[int, int]
) -> dict[Literal['img', 'ann'], bytes]:
    """A scene as PNG files. The cache lets image and label of one sample share one drawing."""
    # Level 1: the bytes live for a moment only.
    flags = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    image, label = draw_scene(index, seed, split, size)
    return {
        'img': cv2.imencode('.png', image, flags)[1].tobytes(),
        'ann': cv2.imencode('.png', label, flags)[1].tobytes(),
    }


def _parse(path: str) -> re.Match | None:
    match = _PATH.fullmatch(str(path))
    small = match is not None and min(int(match['height']), int(match['width'])) < MIN_SIDE
    return None if small else match


@register_backend(SCHEME, prefixes=SCHEME, force=True)
class FusionShapesBackend(BaseStorageBackend):
    """Storage backend that draws ``fusion-shapes://`` paths instead of reading them.

    Everything in MMSegmentation that reads an image by its path (loading transforms, the
    visualization hook, inferencers) goes through mmengine's file backends, and so works on
    FusionShapes unchanged. The path contains everything that a scene depends on, e.g.
    ``fusion-shapes://val/img/seed-0/128x128/000012.png``, with ``ann`` instead of ``img`` for the
    label.
    """

    def get(self, filepath: str) -> bytes:
        """The PNG file of an image or a label.

        Args:
            filepath: a ``fusion-shapes://`` path.

        Raises:
            FileNotFoundError: the path names no scene.
        """
        match = _parse(filepath)
        if match is None:
            raise FileNotFoundError(
                f'no scene has the path {str(filepath)!r}; expected one like {_EXAMPLE!r}: the '
                f'split one of {", ".join(SPLITS)}, img or ann, height and width at least '
                f'{MIN_SIDE}'
            )
        size = (int(match['height']), int(match['width']))
        files = _encoded(int(match['index']), int(match['seed']), match['split'], size)
        return files[match['kind']]

    def get_text(self, filepath: str, encoding: str = 'utf-8') -> str:
        """Scenes are images only.

        Raises:
            FileNotFoundError: always.
        """
        raise FileNotFoundError(f'{filepath!r}: {SCHEME}:// has images only, no text')

    def exists(self, filepath: str) -> bool:
        """Whether the path names a scene."""
        return _parse(filepath) is not None


@DATASETS.register_module()
class FusionShapesDataset(BaseSegDataset):
    """Procedural scenes on which fusing feature levels matters; drawn on the fly, no files.

    Four classes are large regions in the same two colours. ``field`` and ``island`` have exactly
    the same speckle; an island is a region that is not connected to the border of the image. To
    distinguish them takes context over half the image. ``broad stripes`` and ``fine stripes``
    differ only in their period. The other four classes are thin or small (``line``, ``ring`` and
    ``cross`` with strokes of two or three pixels, ``dot`` six to eight pixels wide), in random
    colours that do not depend on the class. To recognize them takes resolution. Seams between
    regions, and in every other scene an unlabelled piece, have the ignore index.

    A scene depends only on its seed, split and index, and not on global random states, the order of
    access or the worker. The stock loading transforms read it through :class:`FusionShapesBackend`.
    Do not crop in the pipeline: a cropped island touches the border and has the wrong label.

    Args:
        size: height and width in pixels, each at least 48. The layout scales with the size,
            strokes and periods do not.
        length: number of scenes.
        seed: the whole data set changes with it.
        split: ``'train'``, ``'val'`` or ``'test'``; no scene occurs in two splits.
        **kwargs: of :class:`mmseg.datasets.BaseSegDataset`, but for those about files.

    Raises:
        TypeError: an argument about files was given.
        ValueError: a bad size, length, seed or split.

    Example:
        >>> scenes = FusionShapesDataset(size=(48, 64), length=2, pipeline=[])
        >>> len(scenes), len(scenes.metainfo['classes'])
        (2, 8)
    """

    METAINFO = {
        'classes': (
            'field',
            'island',
            'broad stripes',
            'fine stripes',
            'line',
            'ring',
            'dot',
            'cross',
        ),
        'palette': [
            [144, 180, 110],
            [214, 120, 60],
            [70, 110, 170],
            [120, 190, 220],
            [240, 220, 70],
            [200, 60, 150],
            [230, 60, 60],
            [120, 80, 200],
        ],
    }

    def __init__(
        self,
        size: Sequence[int] = (128, 128),
        length: int = 1000,
        seed: int = 0,
        split: Literal['train', 'val', 'test'] = 'train',
        **kwargs,
    ) -> None:
        for name in ('data_root', 'data_prefix', 'ann_file', 'img_suffix', 'seg_map_suffix'):
            if kwargs.get(name):
                raise TypeError(
                    f'FusionShapesDataset has no files, but got {name}={kwargs[name]!r}; remove '
                    f'{name} from the dataset in the config (its arguments are size, length, '
                    'seed and split)'
                )
        if isinstance(size, int) or len(size) != 2 or min(size) < MIN_SIDE:
            raise ValueError(
                f'FusionShapesDataset: size is (height, width), each at least {MIN_SIDE} pixels, '
                f'but got size={size!r}'
            )
        if length < 1 or seed < 0:
            raise ValueError(
                'FusionShapesDataset: length is at least 1 and seed at least 0, '
                f'but got length={length!r}, seed={seed!r}'
            )
        if split not in SPLITS:
            raise ValueError(
                f'FusionShapesDataset: split is one of {", ".join(SPLITS)}, but got {split!r}'
            )
        self.size = tuple(int(v) for v in size)
        self.length = int(length)
        self.seed = int(seed)
        self.split = split
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        """One entry per scene, with paths that :class:`FusionShapesBackend` draws."""
        place = f'seed-{self.seed}/{self.size[0]}x{self.size[1]}'
        return [
            {
                'img_path': f'{SCHEME}://{self.split}/img/{place}/{index:06d}.png',
                'seg_map_path': f'{SCHEME}://{self.split}/ann/{place}/{index:06d}.png',
                'label_map': self.label_map,
                'reduce_zero_label': self.reduce_zero_label,
                'seg_fields': [],
            }
            for index in range(self.length)
        ]
