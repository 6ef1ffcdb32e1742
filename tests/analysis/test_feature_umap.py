"""Pixels drawn for a picture of the last features, and the numbers of them, against naive numpy."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmseg_fusion.analysis.feature_umap import (
    Embedding,
    PixelSample,
    Sample,
    draw_embeddings,
    embed_sample,
    find_classes,
    load_umap,
    pca_embedding,
    save_embeddings,
    silhouette,
    umap_embedding,
    within_between,
)
from mmseg_fusion.analysis.layer_features import (
    DataInfo,
    ImageSet,
    InputError,
    Observation,
    Placement,
    batches,
    load_segmentor,
    observe,
)

from ..engine.small import LEVELS
from .test_layer_features import FCN, model_config

pytestmark = pytest.mark.filterwarnings('ignore')


# ------------------------------------------------------------------------------------ the numbers


def naive_silhouette(features, labels):
    x = features.double().numpy()
    values = []
    for i in range(len(x)):
        distances = np.sqrt(((x - x[i]) ** 2).sum(1))
        own = labels == labels[i]
        if own.sum() == 1:
            values.append(0.0)
            continue
        a = distances[own].sum() / (own.sum() - 1)
        b = min(distances[labels == c].mean() for c in set(labels.tolist()) - {labels[i]})
        values.append((b - a) / max(a, b))
    return np.mean(values)


def naive_within_between(features, labels):
    x = features.double().numpy()
    groups = [x[labels == c] for c in sorted(set(labels.tolist()))]
    centers = [g.mean(0) for g in groups]
    within = [np.mean([np.linalg.norm(p - m) for p in g]) for g, m in zip(groups, centers)]
    pairs = [np.linalg.norm(centers[k] - centers[j]) for j in range(len(centers)) for k in range(j)]
    return np.mean(within) / np.mean(pairs)


@pytest.mark.parametrize('size', [37, 1300], ids=['one stripe', 'two stripes'])
def test_numbers_against_loops(size):
    random = np.random.default_rng(0)
    # Class ids with gaps, and one pixel that is alone in its class.
    labels = random.choice([2, 5, 11], size)
    labels[-1] = 40
    features = torch.randn(size, 7) + torch.from_numpy(labels)[:, None] * 0.2 + 100
    assert silhouette(features, labels) == pytest.approx(
        naive_silhouette(features, labels), rel=1e-9
    )
    assert within_between(features, labels) == pytest.approx(
        naive_within_between(features, labels), rel=1e-9
    )


def test_numbers_by_hand():
    """Two classes on a line, at 0 and 2, at 10 and 12."""
    features, labels = torch.tensor([[0.0], [2.0], [10.0], [12.0]]), np.array([0, 0, 1, 1])
    # a = 2 for all; b = 11 outside, 9 inside.
    assert silhouette(features, labels) == pytest.approx((9 / 11 + 7 / 9) / 2)
    assert within_between(features, labels) == pytest.approx(1 / 10)


@pytest.mark.parametrize('number', [silhouette, within_between])
def test_numbers_compare_features_of_other_length_and_offset(number):
    features, labels = torch.randn(60, 5).double(), np.arange(60) % 3
    expected = number(features, labels)
    assert number(features * 1e-3 + 7, labels) == pytest.approx(expected, rel=1e-6)
    assert number(features * 1e4, labels) == pytest.approx(expected)


def test_numbers_tell_compact_classes_from_spread_ones():
    labels = np.arange(80) % 4
    centers, noise = torch.eye(4)[torch.from_numpy(labels)], torch.randn(80, 4)
    compact, spread = centers + 0.05 * noise, centers + 2 * noise
    assert silhouette(compact, labels) > 0.8 > 0.3 > silhouette(spread, labels)
    assert within_between(compact, labels) < 0.2 < 1 < within_between(spread, labels)


def test_numbers_that_are_not_defined():
    features, alone = torch.randn(6, 3), np.zeros(6, int)
    assert math.isnan(silhouette(features, alone))
    assert math.isnan(within_between(features, alone))
    # All features the same: neither nearer nor farther.
    same, labels = torch.full((6, 3), 0.1), np.arange(6) % 2
    assert silhouette(same, labels) == 0
    assert math.isnan(within_between(same, labels))
    for number in (silhouette, within_between):
        with pytest.raises(ValueError, match=r'\(6, 3\) and \(5,\)'):
            number(features, alone[:5])


# ------------------------------------------------------------------------------------- the pixels


def view(label, grid=None, placement=None, path='a.png', channels=2):
    """An image whose feature holds row and column of every cell."""
    label = np.asarray(label)
    placement = placement or Placement(label.shape, (0, 0, *label.shape), label.shape)
    height, width = grid or label.shape
    places = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    feature = torch.stack([*places, *[places[0] * 0] * (channels - 2)]).float()
    return Observation(path, np.zeros((1, 1, 3), np.uint8), feature, None, label, placement)


def test_pixels_have_their_class_and_feature():
    random = np.random.default_rng(0)
    labels = [random.integers(0, 4, (9, 7)) for _ in range(3)]
    labels[1][labels[1] == 3] = 255
    drawn = PixelSample(5, 20)
    for i, label in enumerate(labels):
        drawn.add([view(label, path=f'{i}.png')])
    sample = drawn.take([3, 4, 0])
    assert set(sample.labels.tolist()) == {0, 3}
    assert sample.images == ['0.png', '1.png', '2.png']
    for place, category, feature in zip(sample.places, sample.labels, sample.features[0]):
        image, row, column = place
        assert labels[image][row, column] == category
        assert feature.tolist() == [row, column]
    assert len({tuple(place) for place in sample.places.tolist()}) == len(sample.places)
    assert drawn.counts.tolist() == [sum(int((x == c).sum()) for x in labels) for c in range(5)]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(5, 30), st.integers(0, 99))
def test_every_image_gives_as_many_as_any_other(available, limit, seed):
    drawn = PixelSample(2, limit, seed)
    for number in available:
        label = np.ones((4, 5), int)
        label.reshape(-1)[:number] = 0
        drawn.add([view(label)])
    # Class 1 has eight pixels at least, class 0 may have none.
    sample = drawn.take([0, 1])
    images = sample.places[sample.labels == 0, 0]
    gave = np.bincount(images, minlength=len(available)).tolist()
    assert sum(gave) == min(limit, sum(available))
    # One that gave two less than another had no more.
    for mine, had in zip(gave, available):
        assert mine == had or mine >= max(gave) - 1


def test_seeds():
    label = np.random.default_rng(0).integers(0, 2, (6, 6))

    def places(seed):
        drawn = PixelSample(2, 3, seed)
        for _ in range(9):
            drawn.add([view(label)])
        return drawn.take([0, 1]).places

    np.testing.assert_array_equal(places(1), places(1))
    several = np.concatenate([places(seed) for seed in range(60)])
    # Any image and any pixel may be drawn, no earlier one first.
    assert len(np.unique(several[:, 0])) == 9
    assert len(np.unique(several[:, 1:], axis=0)) == 36


def test_classes_do_not_change_what_is_drawn_of_others():
    label = np.random.default_rng(0).integers(0, 2, (6, 6))
    both, one = PixelSample(2, 6), PixelSample(2, 6)
    both.add([view(label)])
    one.add([view(np.where(label == 1, 255, label))])
    np.testing.assert_array_equal(both.take([0, 1]).places[:6], one.take([0, 1]).places)


def test_models_of_other_strides_see_the_same_places():
    """Maps of stride 4, 8 and 2; the second network pads the image and the third enlarges it."""
    size = (32, 48)
    label = np.random.default_rng(0).integers(0, 3, size)
    whole = Placement(size, (0, 0, *size), size)
    padded = Placement(size, (8, 0, *size), (48, 64))
    double = Placement(size, (0, 0, 64, 96), (64, 96))
    drawn = PixelSample(3, 50)
    drawn.add(
        [
            view(label, (8, 12), whole),
            view(label, (6, 8), padded, channels=3),
            view(label, (32, 48), double),
        ]
    )
    sample = drawn.take([0, 1, 2])
    # As many as the coarsest has cells on the image: 4 x 6 of its 6 x 8.
    assert len(sample.labels) == drawn.counts.sum() == 24
    assert [f.shape[1] for f in sample.features] == [2, 3, 2]
    for (_, row, column), category, fine, coarse, same in zip(
        sample.places, sample.labels, *sample.features
    ):
        assert label[row, column] == category
        # The centre of a cell of the coarsest.
        assert (row % 8, column % 8) == (4, 4)
        assert fine.tolist() == [row // 4, column // 4]
        assert coarse.tolist() == [(row + 8) // 8, column // 8, 0]
        assert same.tolist() == [row, column]


def test_cells_finer_than_the_label_count_once():
    label = np.arange(6).reshape(2, 3)
    drawn = PixelSample(6, 50)
    drawn.add([view(label, (8, 12))])
    assert drawn.counts.tolist() == [1] * 6
    places = {tuple(p) for p in drawn.take(range(6)).places[:, 1:].tolist()}
    assert places == {(r, c) for r in range(2) for c in range(3)}


def test_no_more_is_held_than_is_asked_for():
    drawn = PixelSample(2, 5)
    for _ in range(20):
        drawn.add([view(np.random.default_rng(0).integers(0, 2, (8, 8)))])
        assert all(len(k.features[0]) <= 5 for k in drawn._kept.values())
        # No view of the whole map, which would keep it alive.
        assert all(k.features[0].untyped_storage().size() <= 40 for k in drawn._kept.values())


def test_most_frequent_classes():
    drawn = PixelSample(5, 2)
    drawn.add([view([[0, 3, 3, 255], [3, 1, 1, 255]])])
    assert drawn.most_frequent(8) == [3, 1, 0]
    assert drawn.most_frequent(2) == [3, 1]


def test_images_that_do_not_fit():
    drawn = PixelSample(3, 5)
    bare = view(np.zeros((4, 4), int))
    bare.label = None
    with pytest.raises(InputError, match=r'a\.png has no label.*--ann-dir'):
        drawn.add([bare])
    with pytest.raises(InputError, match=r'class 3, but there are 3 .*reduce_zero_label'):
        drawn.add([view([[0, 3]])])
    with pytest.raises(InputError, match='class -1'):
        drawn.add([view([[0, -1]])])
    with pytest.raises(InputError, match=r'a\.png is \(1, 2\), b\.png is \(1, 3\)'):
        drawn.add([view([[0, 1]]), view([[0, 1, 1]], path='b.png')])
    broken = view([[0, 1]])
    broken.feature[0, 0, 1] = math.inf
    with pytest.raises(InputError, match=r'model 2 is not finite on a\.png'):
        drawn.add([view([[0, 1]]), broken])
    # None of them left a trace.
    drawn.add([view([[0, 1, 1, 1]])])
    assert drawn.counts.tolist() == [1, 3, 0]
    with pytest.raises(InputError, match=r'^4 labelled pixels .* in 1 images .*--num-samples'):
        drawn.take([0, 1])


def test_classes_by_name_and_number():
    classes = ('grass', 'floor', 'ground', '0')
    assert find_classes(['floor', '2', 'floor', '1'], classes) == [1, 2]
    # A name goes before a number.
    assert find_classes(['0'], classes) == [3]
    with pytest.raises(InputError, match=r"no class 'gras'\. Did you mean grass\? .*0 to 3"):
        find_classes(['grass', 'gras'], classes)
    for wrong in ('4', '-1', '²'):
        with pytest.raises(InputError, match='one of: grass, floor, ground, 0'):
            find_classes([wrong], classes)


@pytest.mark.stack
@pytest.mark.parametrize('size', [(64, 64), (75, 50)])
def test_features_of_two_models(tmp_path, size):
    """The second one's map is coarser."""
    heads = [dict(FCN, in_channels=LEVELS[i], in_index=i) for i in (0, 1)]
    cfgs = [model_config(tmp_path, head, size=size, length=2) for head in heads]
    models = [load_segmentor(cfg, None) for cfg in cfgs]
    images = ImageSet(cfgs[0])
    drawn = PixelSample(8, 6)
    for batch in batches(images):
        raw = batch['inputs'][0].clone()
        views = []
        for model in models:
            sample = dict(inputs=[raw.clone()], data_samples=batch['data_samples'])
            views.append(observe(model, sample, predict=False))
        drawn.add(views)
    sample = drawn.take(range(8))
    assert len(sample.labels) > 20
    labels = [s['data_samples'].gt_sem_seg.data[0].numpy() for s in images]
    for model, found in zip(models, sample.features):
        maps = []
        for one in images:
            with torch.no_grad():
                x = (one['inputs'].float()[None] - 127) / 58
                maps.append(model.decode_head._forward_feature(model.extract_feat(x))[0])
        height, width = maps[0].shape[1:]
        for (image, row, column), category, feature in zip(sample.places, sample.labels, found):
            assert labels[image][row, column] == category
            i, j = int((row + 0.5) * height / size[0]), int((column + 0.5) * width / size[1])
            torch.testing.assert_close(feature, maps[image][:, i, j], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_features_on_a_gpu():
    label = np.random.default_rng(0).integers(0, 3, (9, 9))
    here, there = PixelSample(3, 20), PixelSample(3, 20)
    moved = view(label)
    moved.feature = moved.feature.cuda()
    here.add([view(label)])
    there.add([moved])
    assert torch.equal(here.take([0, 1, 2]).features[0], there.take([0, 1, 2]).features[0])


# ---------------------------------------------------------------------------------- the embedding


def test_principal_components_against_the_covariance():
    features = (torch.randn(50, 6) @ torch.randn(6, 6) + 3).numpy()
    points = pca_embedding(features)
    values, vectors = np.linalg.eigh(np.cov(features.T.astype(np.float64)))
    for k in (0, 1):
        axis = vectors[:, -1 - k]
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        expected = (features - features.mean(0)) @ axis
        np.testing.assert_allclose(points[:, k], expected, rtol=1e-3, atol=1e-4)
        assert points[:, k].var(ddof=1) == pytest.approx(values[-1 - k], rel=1e-4)


def test_principal_components_of_one_channel():
    points = pca_embedding(np.array([[1.0], [3.0], [8.0]], np.float32))
    np.testing.assert_allclose(points, [[-3, 0], [-1, 0], [4, 0]], atol=1e-6)


def sample_of(features, labels):
    labels = np.asarray(labels)
    places = np.stack([np.zeros_like(labels), np.arange(len(labels)), labels], 1)
    return Sample(features, labels, places, ['a.png'])


def test_every_model_is_embedded_on_its_own():
    labels = np.arange(12) % 3
    sample = sample_of([torch.randn(12, 4), torch.randn(12, 9)], labels)
    maps = embed_sample(sample, ('a', 'b'), pca_embedding)
    for name, channels, entry, features in zip('ab', (4, 9), maps, sample.features):
        assert (entry.name, entry.channels) == (name, channels)
        np.testing.assert_array_equal(entry.points, pca_embedding(features.numpy()))
        assert entry.silhouette == silhouette(features, labels)
        assert entry.within_between == within_between(features, labels)


@pytest.mark.parametrize('wrong', [lambda x: x[:, :3], lambda x: x[:, :2] * math.nan])
def test_embeddings_are_points_in_the_plane(wrong):
    sample = sample_of([torch.randn(6, 4)], np.arange(6) % 2)
    with pytest.raises(ValueError, match='expected 6 finite points in the plane'):
        embed_sample(sample, ('a',), wrong)


def test_without_umap_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'umap', None)
    with pytest.raises(ImportError, match=r"pip install 'mmseg-fusion\[umap\]'.*--embedding pca"):
        load_umap()


@pytest.mark.parametrize('size', [5, 90])
def test_umap_keeps_classes_apart(size):
    """Runs where ``mmseg-fusion[umap]`` is installed."""
    pytest.importorskip('umap')
    labels = np.arange(size) % 3
    random = np.random.default_rng(0)
    features = (20 * np.eye(3, 16)[labels] + random.normal(size=(size, 16))).astype(np.float32)
    points = umap_embedding(features, seed=1, num_neighbors=8)
    assert points.shape == (size, 2)
    np.testing.assert_array_equal(points, umap_embedding(features, seed=1, num_neighbors=8))
    if size > 5:
        distances = np.linalg.norm(points[:, None] - points, axis=2) + np.eye(size) * 1e9
        assert (labels[distances.argmin(1)] == labels).all()
        far = umap_embedding(features, seed=1, num_neighbors=8, min_dist=0.9)
        assert not np.allclose(points, far)


# ------------------------------------------------------------------------------------ what is kept


def test_numbers_are_saved(tmp_path):
    sample = sample_of([torch.randn(6, 4)], [2, 2, 2, 0, 0, 0])
    maps = embed_sample(sample, ('first',), pca_embedding)
    maps.append(Embedding('undefined', maps[0].points, 4, math.nan, math.nan))
    path = tmp_path / 'new' / 'a.json'
    save_embeddings(maps, sample, ('sky', 'sea', 'land'), path, seed=3)
    text = path.read_text()
    # NaN is no JSON.
    assert 'NaN' not in text
    saved = json.loads(text)
    assert saved['seed'] == 3
    assert saved['classes'] == ['land', 'sky']
    assert saved['labels'] == ['land'] * 3 + ['sky'] * 3
    assert saved['pixels'] == sample.places.tolist()
    assert saved['images'] == ['a.png']
    first, undefined = saved['models']
    np.testing.assert_allclose(first['points'], maps[0].points)
    assert first['silhouette'] == maps[0].silhouette
    assert first['within_between'] == maps[0].within_between
    assert undefined['silhouette'] is undefined['within_between'] is None


INFO = DataInfo(
    classes=('red', 'green', 'blue'),
    palette=((255, 0, 0), (0, 255, 0), (0, 0, 255)),
    ignore_index=255,
    label_map=None,
    reduce_zero_label=False,
    suffixes=('.jpg', '.png'),
)


def where(path, channel):
    """Columns, from 0 to 1, of the pixels above the legend in which one colour stands out."""
    with Image.open(path) as image:
        drawn = np.asarray(image.convert('RGB')).astype(int)
    drawn = drawn[: int(len(drawn) * 0.85)]
    mask = drawn[..., channel] - np.delete(drawn, channel, 2).max(2) > 100
    return np.flatnonzero(mask.any(0)) / drawn.shape[1]


def test_picture(tmp_path):
    """Red on the left and blue on the right in the first model, the other way in the second."""
    labels = np.repeat([0, 2], 40)
    points = np.random.default_rng(0).normal(size=(80, 2)) * 0.1
    points[:, 0] += np.repeat([-1, 1], 40)
    maps = [Embedding('a', points, 4, 0.5, 0.1), Embedding('b', -points, 4, math.nan, math.nan)]
    draw_embeddings(maps, labels, INFO, tmp_path / 'new' / 'a.png', 'title')
    red, blue = (where(tmp_path / 'new' / 'a.png', c) for c in (0, 2))
    assert red.min() < 0.2 < 0.3 < blue[blue < 0.5].min()
    assert blue[blue > 0.5].min() < 0.7 < 0.8 < red.max()
    assert not len(where(tmp_path / 'new' / 'a.png', 1))


def test_more_models_make_a_wider_picture(tmp_path):
    points, labels = np.random.default_rng(0).normal(size=(9, 2)), np.arange(9) % 3
    shapes = []
    for names in ('a', 'ab', ['hfgd_efficientnet-l2_4xb4-30k_pascal-context-59-513x513'] * 2):
        maps = [Embedding(name, points, 4, 0.5, 0.1) for name in names]
        draw_embeddings(maps, labels, INFO, tmp_path / 'a.png')
        with Image.open(tmp_path / 'a.png') as image:
            shapes.append(image.size)
    assert shapes[1][0] > 1.8 * shapes[0][0]
    # A long name takes more lines, and no more width.
    assert shapes[2][0] == shapes[1][0]
    assert shapes[2][1] > shapes[1][1]


@pytest.mark.parametrize('suffix', ['.pdf', '.svg'])
def test_other_formats(tmp_path, suffix):
    maps = [Embedding('a', np.eye(5, 2), 4, 0.5, 0.1)]
    draw_embeddings(maps, np.arange(5) % 2, INFO, tmp_path / f'a{suffix}')
    assert (tmp_path / f'a{suffix}').stat().st_size > 1000
