"""Pixel relation maps against naive numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmseg_fusion.analysis.layer_features import (
    DataInfo,
    ImageSet,
    InputError,
    Observation,
    Placement,
    batches,
    data_info,
    load_segmentor,
    observe,
)
from mmseg_fusion.analysis.pixel_relation import (
    Point,
    automatic_points,
    class_at,
    class_contrast,
    draw_relations,
    over_image,
    pixel_relation,
    relate,
)

from .test_layer_features import model_config

pytestmark = pytest.mark.filterwarnings('ignore')


def naive_relation(feature, row, column, similarity):
    channels, height, width = feature.shape
    result = np.zeros((height, width))
    x = feature[:, row, column]
    for i in range(height):
        for j in range(width):
            y = feature[:, i, j]
            if similarity == 'cosine':
                result[i, j] = x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-30)
            else:
                result[i, j] = x @ y / math.sqrt(channels)
    if similarity == 'softmax':
        result = np.exp(result) / np.exp(result).sum()
    return result


@pytest.mark.parametrize('similarity', ['dot', 'cosine', 'softmax'])
def test_relation_against_loops(similarity):
    feature = torch.randn(5, 4, 7)
    feature[:, 2, 3] = 0
    for cell in ((0, 0), (3, 6), (2, 3), (1, 4)):
        np.testing.assert_allclose(
            pixel_relation(feature, cell, similarity).numpy(),
            naive_relation(feature.double().numpy(), *cell, similarity),
            rtol=1e-10,
            atol=1e-12,
        )


def test_wrong_relation_arguments():
    with pytest.raises(ValueError, match=r'\(C, H, W\)'):
        pixel_relation(torch.ones(1, 2, 3, 4), (0, 0))
    with pytest.raises(ValueError, match='outside the feature of 3 x 4'):
        pixel_relation(torch.ones(2, 3, 4), (0, 4))
    with pytest.raises(ValueError, match="'dots'"):
        pixel_relation(torch.ones(2, 3, 4), (0, 0), 'dots')


def test_contrast_by_hand():
    relation = np.array([[1.0, 3.0], [2.0, 9.0]])
    label = np.array([[0, 1], [0, 255]])
    # Without the ignored 9 the range is 1 to 3.
    assert class_contrast(relation, label, 0) == pytest.approx((0.25, 1.0))
    assert math.isnan(class_contrast(relation, label, 2)[0])
    assert class_contrast(np.ones((2, 2)), label, 0) == (0, 0)


def test_contrast_does_not_care_for_length():
    relation, label = np.random.default_rng(0).normal(size=(2, 6, 6))
    label = (label > 0).astype(int)
    assert class_contrast(relation, label, 1) == pytest.approx(
        class_contrast(relation * 7 + 3, label, 1)
    )


def test_points_are_deep_inside_the_largest_regions():
    label = np.full((20, 30), 255)
    label[2:17, 3:18] = 4
    label[5:12, 20:27] = 1
    label[19, 29] = 2
    points = automatic_points(label, (20, 30), 8)
    assert points == [Point(10, 9, 4), Point(23, 8, 1), Point(29, 19, 2)]
    assert automatic_points(label, (20, 30), 8, 2) == points[:2]
    # Ids that are no class.
    assert [p.category for p in automatic_points(label, (20, 30), 2)] == [1]
    assert automatic_points(np.full((4, 4), 255), (4, 4), 8) == []


@given(st.tuples(*[st.integers(1, 40)] * 4), st.integers(0, 1000))
def test_points_have_their_class(sizes, seed):
    """In any resolution of label and file the pixel lies in its class."""
    label_size, size = sizes[:2], sizes[2:]
    label = np.random.default_rng(seed).integers(0, 3, label_size)
    for point in automatic_points(label, size, 3):
        assert 0 <= point.y < size[0]
        assert 0 <= point.x < size[1]
        if all(t >= s for s, t in zip(label_size, size)):
            assert class_at(label, size, point.x, point.y) == point.category


def test_class_at_a_pixel():
    label = np.array([[0, 1], [2, 255]])
    found = [[class_at(label, (4, 6), x, y) for x in range(6)] for y in range(4)]
    assert found == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, None, None, None]] * 2
    assert class_at(None, (4, 6), 0, 0) is None


def test_map_over_the_image_is_cut_from_the_padded_one():
    values = np.random.default_rng(0).normal(size=(3, 4))
    placement = Placement((50, 60), (2, 3, 10, 12), (24, 32))
    whole = F.interpolate(torch.from_numpy(values)[None, None], (24, 32), mode='bilinear')
    np.testing.assert_allclose(
        over_image(values, placement), whole[0, 0, 2:12, 3:15].numpy(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.stack
@pytest.mark.parametrize('size', [(64, 64), (75, 50)])
def test_relation_on_a_model(tmp_path, size):
    cfg = model_config(tmp_path, size=size, length=1)
    seen = observe(load_segmentor(cfg, None), next(iter(batches(ImageSet(cfg)))))
    for point in automatic_points(seen.label, size, 8, 3):
        relation = relate(seen, point)
        grid = seen.feature.shape[1:]
        row = int((point.y + 0.5) * grid[0] / size[0])
        column = int((point.x + 0.5) * grid[1] / size[1])
        expected = naive_relation(seen.feature.double().numpy(), row, column, 'dot')
        np.testing.assert_allclose(relation.values, expected, rtol=1e-10)
        label = seen.placement.on_grid(seen.label, grid)
        assert (relation.own, relation.others) == class_contrast(expected, label, point.category)


def test_point_outside_names_the_image(tmp_path):
    seen = view(np.zeros((4, 4), int))
    with pytest.raises(InputError, match=r'--point 6 0 is outside the image a\.png of width 6'):
        relate(seen, Point(6, 0, None))


def view(label, prediction=None, size=(4, 6), feature=None):
    """An image of 4 x 6 that entered the network in 8 x 12, padded to 10 x 12."""
    return Observation(
        path='a.png',
        image=np.zeros((8, 12, 3), np.uint8),
        feature=torch.rand(3, 5, 6) if feature is None else feature,
        prediction=np.zeros(size, int) if prediction is None else prediction,
        label=label,
        placement=Placement(size, (0, 0, 8, 12), (10, 12)),
    )


def test_without_label_the_prediction_tells_classes_apart():
    feature = torch.zeros(2, 5, 6)
    feature[0, :, :3] = 1
    feature[1, :, 3:] = 1
    prediction = np.repeat([[0, 0, 0, 1, 1, 1]], 4, 0)
    found = relate(view(None, prediction, feature=feature), Point(0, 0, 0))
    assert (found.own, found.others) == (1, 0)
    assert math.isnan(relate(view(None, prediction), Point(0, 0, None)).own)


INFO = DataInfo(
    classes=('one', 'two'),
    palette=((255, 0, 0), (0, 255, 0)),
    ignore_index=255,
    label_map=None,
    reduce_zero_label=False,
    suffixes=('.jpg', '.png'),
)


def colours(path, colour):
    with Image.open(path) as image:
        drawn = np.asarray(image.convert('RGB')).astype(int)
    return (np.abs(drawn - np.array(colour)).max(2) < 3).mean(), drawn.shape


@pytest.mark.parametrize('similarity', ['dot', 'cosine', 'softmax'])
def test_picture(tmp_path, similarity):
    label = np.array([[0, 0, 255], [0, 1, 1]])
    seen = [view(label, np.ones((4, 6), int)), view(label)]
    points = [Point(0, 0, 0), Point(5, 3, None)]
    relations = [[relate(s, p, similarity) for s in seen] for p in points]
    path = tmp_path / 'a.png'
    draw_relations(seen, points, relations, ('a', 'b'), INFO, path, 'title', similarity)
    green, shape = colours(path, (0, 255, 0))
    assert green > 0.05
    # One column more with a label than without.
    bare = [view(None, s.prediction) for s in seen]
    draw_relations(bare, points, relations, ('a', 'b'), INFO, tmp_path / 'b.png')
    assert colours(tmp_path / 'b.png', (0, 255, 0))[1][1] < shape[1]


def test_no_point_to_draw(tmp_path):
    with pytest.raises(InputError, match='--point'):
        draw_relations([view(None)], [], [], ('a',), INFO, tmp_path / 'a.png')


def test_long_names_do_not_widen_the_picture(tmp_path):
    """A name of 69 letters would otherwise run over its neighbours."""
    seen, points = [view(None)] * 2, [Point(0, 0, 0)]
    relations = [[relate(s, p) for s in seen] for p in points]
    shapes = []
    for names in (
        ('a', 'b'),
        ('deeplabv3plus_r101-d8_car_4xb4-30k_pascal-context-59-513x513',) * 2,
    ):
        draw_relations(seen, points, relations, names, INFO, tmp_path / 'a.png')
        red, shape = colours(tmp_path / 'a.png', (255, 0, 0))
        shapes.append((shape, red))
    assert shapes[0][0] == shapes[1][0]
    # The panels keep most of their size.
    assert shapes[1][1] > 0.6 * shapes[0][1]


def test_classes_of_a_config_reach_the_legend(tmp_path):
    info = data_info(model_config(tmp_path))
    seen = view(np.arange(8).reshape(2, 4), np.full((4, 6), 6))
    relation = relate(seen, Point(0, 0, 0))
    draw_relations([seen], [Point(0, 0, 0)], [[relation]], ('a',), info, tmp_path / 'a.png')
    for colour in info.palette:
        assert colours(tmp_path / 'a.png', colour)[0] > 0.0005, colour
