"""Pictures of predictions: what is right, in which model alone, and that it is drawn."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmseg_fusion.analysis.layer_features import DataInfo
from mmseg_fusion.analysis.predictions import (
    FIRST,
    SECOND,
    Predictions,
    compared,
    draw_predictions,
    right,
)

INFO = DataInfo(('a', 'b'), ((10, 20, 30), (200, 100, 0)), 255, None, False, ('.jpg', '.png'))


def test_right_counts_labelled_pixels_alone() -> None:
    label = np.array([[0, 1, 255, 1]])
    assert right(np.array([[0, 0, 0, 1]]), label) == pytest.approx(2 / 3)
    assert math.isnan(right(label, np.full((1, 4), 255)))


def test_compared() -> None:
    label = np.array([[0, 0, 0, 0, 255]])
    first = np.array([[0, 0, 1, 1, 0]])
    second = np.array([[0, 1, 0, 1, 1]])
    both, only_first, only_second, none, unlabelled = compared(first, second, label)[0].tolist()
    assert (tuple(only_first), tuple(only_second)) == (FIRST, SECOND)
    assert both == [225] * 3
    assert none == [140] * 3
    assert unlabelled == [255] * 3


@pytest.mark.parametrize('models', [1, 2, 3])
def test_draws_every_model(models: int, tmp_path: Path) -> None:
    label = np.zeros((40, 60), int)
    label[:, :20], label[:5] = 1, 255
    predictions = tuple(np.full((40, 60), i % 2) for i in range(models))
    image = np.full((20, 30, 3), 128, np.uint8)
    view = Predictions('folder/x.jpg', image, label, predictions)
    path = tmp_path / 'picture.png'
    draw_predictions([view, view], [f'm{i}' for i in range(models)], INFO, path)
    picture = cv2.imread(str(path))[..., ::-1]
    # Image, truth, one per model, and with two models where they differ.
    assert picture.shape[1] == pytest.approx(72 * 2.4 * (2 + models + (models == 2)), abs=2)
    colours = {tuple(c) for c in picture.reshape(-1, 3).tolist()}
    assert {*INFO.palette, (128, 128, 128)} <= colours
    assert ({FIRST, SECOND} <= colours) == (models == 2)


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='at least one image'):
        draw_predictions([], ['a'], INFO, tmp_path / 'x.png')
